"""Cost in LAMMPS of uncertainty at every step, and of the ways to run a model, beside SNAP's.

    python benchmarks/cost.py --element Cu local/hl.pt local/hl.pt2 mp/hl.pt mp/hl.pt2

The crystal of front_rows.py (864 Cu atoms, say) at 300 K, one MPI rank, one thread. A process runs
some steps without uncertainty and as many with it, in turn: the two of a pair meet the same
machine, and what uncertainty costs is the median of the pairs' ratios. Processes of all files are
started in turn, with SNAP and quadratic SNAP of Zuo et al. (2020), built into LAMMPS, as the
yardstick.
Processor time; read it as ratios.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import front_evaluate
import front_lammps
import front_process
import numpy as np
from ase.data import atomic_masses, atomic_numbers
from front_peers import environment, lammps_command
from front_rows import CRYSTALS, POTENTIALS, Row
from provenance import one_line, provenance
from scipy.stats import bootstrap

from lmp_hl.model_file import load

RESULTS = Path(__file__).resolve().parent / "results"

UNCERTAINTY = """
compute u all hlgauss/atom entropy force_std force_entropy distance
compute umax all reduce max c_u[1] c_u[2] c_u[3] c_u[4]
variable umax equal c_umax[2]
fix stop all halt 1 v_umax > 1e9
run {steps}
unfix stop
variable umax delete
uncompute umax
uncompute u
"""


@dataclass(frozen=True)
class Subject:
    """What is timed."""

    name: str
    pair: str  # lines of input
    uncertain: bool  # can say so


def subjects(models: list[Path], element: str) -> list[Subject]:
    """Files, and what stands beside them."""
    found = []
    for model in models:
        name = "/".join(model.parts[-2:])
        found.append(Subject(name, front_lammps.pair_lines(f"mliap model {model}", element), True))
        if load(model).num_layers > 1:  # else its messages are the same
            pair = front_lammps.pair_lines(f"mliap model {model} comm extended", element)
            found.append(Subject(f"{name}, comm extended", pair, False))
    for potential in ("snap", "qsnap"):
        subject = front_evaluate.subject_of(Row(element, potential, "lammps"), Path(), 0.0)
        found.append(Subject(subject.row.potential.about, subject.pair, False))
    return found


def measure(subject: Subject, element: str, steps: int, pairs: int) -> list[list[float]]:
    """µs per atom and step of runs without and, if it can, with uncertainty: (pairs, 1 or 2)."""
    crystal = CRYSTALS[element]
    script = front_lammps.CRYSTAL.format(
        lattice=crystal.lattice,
        constant=crystal.constant,
        cells=crystal.cells,
        mass=atomic_masses[atomic_numbers[element]],
        pair=subject.pair,
        warm=front_lammps.WARM_STEPS,
    )
    once = f"run {steps}\n" + (UNCERTAINTY.format(steps=steps) if subject.uncertain else "")
    width = 1 + subject.uncertain
    words = lammps_command(environment("lmp-hl", Path()))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.cost").write_text(script + pairs * once)
        done = front_process.run([*words, "-in", "in.cost", "-log", "none"], Path(folder))
    times = front_lammps.times_of_runs(done.output, 1 + pairs * width)[1:]
    return [times[k : k + width] for k in range(0, len(times), width)]


def page(element: str, times: dict[str, list[list[float]]], made: dict[str, object]) -> str:
    """Markdown table with the cost of uncertainty and ratios to SNAP."""

    def spread(values: list[float]) -> str:
        low, high = np.quantile(values, [0.25, 0.75])
        return f"{statistics.median(values):.1f} ({low:.1f}-{high:.1f})"

    pairs = len(next(iter(times.values())))
    snap = statistics.median(t[0] for t in times[POTENTIALS["snap"].about])
    lines = [
        f"{CRYSTALS[element].num_atoms} {element} atoms, one thread, {pairs} measurements each; "
        "µs per atom and step: median (quartiles)",
        "",
        "| potential | without | of SNAP | with uncertainty | with / without, 95 % |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        without = [t[0] for t in values]
        cells = [name, spread(without), f"{statistics.median(without) / snap:.2f}", "-", "-"]
        if len(values[0]) == 2:
            ratios = [after / before for before, after in values]
            found = bootstrap((ratios,), np.median, method="percentile", rng=0)
            interval = found.confidence_interval
            cells[3] = spread([t[1] for t in values])
            cells[4] = f"{statistics.median(ratios):.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", one_line(made)]) + "\n"


def main() -> None:
    """Measure in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="hl.pt")
    parser.add_argument("--element", choices=CRYSTALS, default="Cu")
    parser.add_argument("--steps", type=int, default=40, help="of a measurement")
    parser.add_argument("--pairs", type=int, default=4, help="measurements of a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    chosen = subjects([model.resolve() for model in args.models], args.element)
    times: dict[str, list[list[float]]] = {subject.name: [] for subject in chosen}
    for _ in range(args.repeats):
        for subject in chosen:
            found = measure(subject, args.element, args.steps, args.pairs)
            times[subject.name] += found
            middle = [f"{statistics.median(column):.1f}" for column in zip(*found, strict=True)]
            print(f"{subject.name}: {' and with uncertainty '.join(middle)} µs", flush=True)
    made = provenance()
    text = page(args.element, times, made)
    print(text)
    (args.results / "cost.md").write_text(text, encoding="utf-8")
    (args.results / "cost.json").write_text(json.dumps({"us": times, "made": made}) + "\n")


if __name__ == "__main__":
    main()
