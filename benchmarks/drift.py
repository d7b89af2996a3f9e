"""Energy drift of silicon crystals: NVE, and langevin with the thermostat's energy counted.

    python benchmarks/drift.py runs/quickstart/train/model.ckpt

The same weights are exported with a float32 and a float64 network. All runs start from one
configuration that a thermostat has heated. Finished runs are not repeated (runs/drift); --fresh
repeats them.

NVE: forces that are the gradient of the energy make velocity Verlet follow a nearby Hamiltonian:
the energy fluctuates by an amount that falls with dt² and does not drift. Langevin: kinetic +
potential energy + what `fix langevin ... tally yes` gave to its bath must stay as well.
"""

import argparse
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from provenance import one_line, provenance, thermo_table

from lmp_hl.lammps import command
from lmp_hl.training.checkpoint import export_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Array = NDArray[np.float64]
HERE = Path(__file__).resolve().parent
TEMPERATURE = 600  # K
SAMPLE = 0.02  # ps between energies
LINE_BLOCK = 1.0  # ps; energies within it are averaged, so that errors of blocks are independent
WALK_BLOCK = 2.0  # ps
ROW = 0.18  # meV/atom between the lines of the figure

START = """
units metal
lattice diamond 5.47
region box block 0 {cells} 0 {cells} 0 {cells}
create_box 1 box
create_atoms 1 box
mass 1 28.0855
pair_style mliap model float64.{suffix}
pair_coeff * * Si
velocity all create {hot} 4928 mom yes rot no
fix nve all nve
fix bath all langevin {temperature} {temperature} 0.1 777 zero yes
timestep 0.001
run 3000
unfix bath
write_restart start.restart
"""

RUN = """
read_restart start.restart
pair_style mliap model {dtype}.{suffix}
pair_coeff * * Si
timestep {dt}
fix nve all nve
{bath}
thermo_style custom step time temp etotal econserve
thermo_modify format float %.12g
thermo {every}
run {steps}
"""
BATH = f"fix bath all langevin {TEMPERATURE} {TEMPERATURE} 0.1 777 zero yes tally yes"


def lammps(script: str, name: str, folder: Path) -> None:
    """Run a script in the folder on one rank; the log is called NAME.log once it is complete."""
    (folder / f"in.{name}").write_text(script)
    done = subprocess.run(
        ["env", "OMP_NUM_THREADS=1", *command(1, "-in", f"in.{name}", "-log", f"{name}.part")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"drift: LAMMPS failed\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    (folder / f"{name}.part").rename(folder / f"{name}.log")


def finished(folder: Path, name: str, script: str) -> bool:
    """Whether this very script has run to its end."""
    log, source = folder / f"{name}.log", folder / f"in.{name}"
    return log.exists() and source.exists() and source.read_text() == script


def slope(time: Array, energy: Array, block: float) -> tuple[float, float]:
    """Slope of a straight line through averages over blocks of time, and its standard error."""
    number = max(3, int((time[-1] - time[0]) / block))
    groups = np.array_split(np.arange(len(time)), number)
    t = np.array([time[g].mean() for g in groups])
    e = np.array([energy[g].mean() for g in groups])
    t = t - t.mean()
    value = float(t @ e / (t @ t))
    residual = e - e.mean() - value * t
    return value, float(np.sqrt(residual @ residual / (number - 2) / (t @ t)))


def walk(time: Array, energy: Array, block: float) -> tuple[float, float]:
    """Drift of a random walk, from end to end, and its standard error from its increments.

    Random forces disturb the conservation that velocity Verlet owes to its nearby Hamiltonian, a
    little in each step: residuals about a line would not be independent. The values between which
    increments are taken are averages over a tenth of a block, as single ones are noisy.
    """
    number = max(3, int((time[-1] - time[0]) / block))
    window = max(1, len(time) // (10 * number))
    smooth = np.convolve(energy, np.ones(window) / window, "valid")
    places = np.linspace(0, len(smooth) - 1, number + 1).astype(int)
    steps, length = np.diff(smooth[places]), time[places[-1]] - time[0]
    return float(steps.sum() / length), float(steps.std(ddof=1) * np.sqrt(number) / length)


def result(
    folder: Path, name: str, num_atoms: int, window: float
) -> dict[str, float | list[float]]:
    """Drift, its error (meV/atom/ns), fluctuation in the first `window` ps and what is drawn."""
    table = thermo_table((folder / f"{name}.log").read_text())
    time = np.array(table["Time"]) - table["Time"][0]
    energy = 1e3 * (np.array(table["Econserve"]) - table["Econserve"][0]) / num_atoms
    if name.startswith("langevin"):
        value, error = walk(time, energy, WALK_BLOCK)
    else:
        value, error = slope(time, energy, LINE_BLOCK)
    first = time <= window
    line = np.polyval(np.polyfit(time[first], energy[first], 1), time[first])
    return {
        "drift": 1e3 * value,
        "drift_error": 1e3 * error,
        "fluctuation_rms": float(np.std(energy[first] - line)),
        "temperature": float(np.mean(table["Temp"])),
        "length_ps": round(float(time[-1]), 6),
        "time_ps": time.round(4).tolist(),
        "energy_meV_per_atom": energy.round(6).tolist(),
    }


def table(runs: dict[str, dict]) -> str:
    """Markdown: a row for each run, and how the fluctuation grows with the time step."""
    columns = ("run", "network", "step, fs", "length, ps", "drift, meV/atom/ns")
    columns += ("fluctuation rms, meV/atom", "mean T, K")
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for name, run in runs.items():
        kind, dtype, dt = name.split("-")
        drift = f"{run['drift']:+.3f} ± {run['drift_error']:.3f}"
        cells = (kind, dtype, dt[:-2], f"{run['length_ps']:g}", drift)
        cells += (f"{run['fluctuation_rms']:.4f}", f"{run['temperature']:.0f}")
        lines.append(" | ".join(cells))
    text = "".join(f"| {line} |\n" for line in lines) + "\n"
    for dtype in ("float32", "float64"):
        half, one, two = (
            runs[f"nve-{dtype}-{dt}fs"]["fluctuation_rms"] for dt in ("0.5", "1", "2")
        )
        text += f"{dtype}: the fluctuation grows {one / half:.2f} times from 0.5 to 1 fs and "
        text += f"{two / one:.2f} times from 1 to 2 fs (dt² gives 4).\n"
    return text


def figure(runs: dict[str, dict], path: Path) -> None:
    """Energies over time, and the fluctuation against the time step with a line of dt²."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[1.7, 1])
    colors = {"float32": "#d1495b", "float64": "#00798c"}
    rows = [(kind, dtype) for kind in ("langevin", "nve") for dtype in colors]
    for number, (kind, dtype) in enumerate(rows):
        run = runs[f"{kind}-{dtype}-1fs"]
        energy = np.array(run["energy_meV_per_atom"])
        level = energy - energy.mean() + ROW * number
        left.plot(run["time_ps"], level, color=colors[dtype], lw=0.6)
    names = {"langevin": "langevin\n+ bath", "nve": "NVE"}
    left.set_yticks([ROW * n for n in range(len(rows))], [f"{names[k]}\n{d}" for k, d in rows])
    end = 1.02 * run["time_ps"][-1]
    left.plot([end, end], [0, 0.1], color="k", lw=1.5, clip_on=False)
    left.text(1.01 * end, 0.05, "0.1\nmeV/atom", va="center", fontsize=8, clip_on=False)
    for dtype, color in colors.items():
        steps = sorted(float(n.split("-")[2][:-2]) for n in runs if n.startswith(f"nve-{dtype}"))
        rms = [runs[f"nve-{dtype}-{dt:g}fs"]["fluctuation_rms"] for dt in steps]
        mark = "o" if dtype == "float32" else "x"
        right.loglog(steps, rms, mark, color=color, ms=8, mfc="none", label=dtype)
    middle = runs["nve-float64-1fs"]["fluctuation_rms"]
    line = np.array([0.4, 2.5])
    right.loglog(line, middle * line**2, color="0.5", lw=1, zorder=0, label="∝ dt²")
    left.set(
        xlabel="time (ps)", title="conserved energy, time step 1 fs", xlim=(0, run["time_ps"][-1])
    )
    right.set(xlabel="time step (fs)", ylabel="NVE fluctuation, rms (meV/atom)")
    right.set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
    right.minorticks_off()
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def main() -> None:
    """Run what is missing, fit, write json, table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cells", type=int, default=2, help="2 cells are 64 atoms")
    parser.add_argument("--ps", type=float, default=20.0, help="length of each run")
    parser.add_argument("--runtime", choices=["torchscript", "aoti"], default="torchscript")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "drift")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--fresh", action="store_true", help="repeat finished runs")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    num_atoms = 8 * args.cells**3
    suffix = "pt" if args.runtime == "torchscript" else "pt2"

    scripts = {}
    for dtype in ("float32", "float64"):
        model = args.work / f"{dtype}.{suffix}"
        if not model.exists():
            export_checkpoint(args.checkpoint, model, args.runtime, dtype)
        for kind, dt in (("langevin", 1.0), ("nve", 1.0), ("nve", 0.5), ("nve", 2.0)):
            ps = args.ps if dt >= 1.0 else args.ps / 4  # the fluctuation is soon known
            scripts[f"{kind}-{dtype}-{dt:g}fs"] = RUN.format(
                dtype=dtype,
                suffix=suffix,
                dt=1e-3 * dt,
                bath=BATH if kind == "langevin" else "",
                every=round(SAMPLE / (1e-3 * dt)),
                steps=round(ps / (1e-3 * dt)),
            )
    if not (args.work / "start.log").exists():
        start = START.format(
            cells=args.cells, suffix=suffix, temperature=TEMPERATURE, hot=2 * TEMPERATURE
        )
        lammps(start, "start", args.work)
    missing = [name for name in scripts if not finished(args.work, name, scripts[name])]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: lammps(scripts[name], name, args.work), missing))

    runs = {name: result(args.work, name, num_atoms, args.ps / 4) for name in scripts}
    made = provenance()
    text = (
        f"Energy conservation of {num_atoms} Si atoms at {TEMPERATURE} K, one trained model "
        f"({args.runtime}) in two precisions; langevin: with the bath's energy.\n\n"
        f"{table(runs)}\nFluctuation: about a line, in the first {args.ps / 4:g} ps of each run. "
        f"Drift ± standard error; NVE: of a line through averages over {LINE_BLOCK:g} ps; "
        f"langevin: from end to end of a random walk, error from increments of {WALK_BLOCK:g} "
        f"ps.\n\n{one_line(made)}\n"
    )
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "drift.md").write_text(text)
    (args.results / "drift.json").write_text(json.dumps({**made, "runs": runs}) + "\n")
    figure(runs, args.results / "drift.png")
    print(text)


if __name__ == "__main__":
    main()
