"""Strong and weak scaling on the ranks at hand; ghosts and traffic of many more, computed.

    python benchmarks/scaling.py runs/quickstart/train/model.ckpt

local: the trained model. mp: a message-passing network of the same widths with RANDOM weights
(speed and traffic do not depend on them), once with the exchange of features per layer, once with
extended ghosts. The time step is so short that nothing moves: all evaluate the same crystal.

Counts are checked against LAMMPS: ghosts as it prints them, bytes as MPI_Send sees them (a small
library counts them), on 1 to 8 ranks. Timings are kept in runs/scaling/timings.json and added to by
every call until each case has --repeats of them; --fresh starts again.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from ase.build import bulk
from provenance import ROOT, one_line, provenance

from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.lammps import command
from lmp_hl.nn.backbone import fit_scales
from lmp_hl.training import frames as fr
from lmp_hl.training.checkpoint import export_checkpoint, load_checkpoint
from lmp_hl.training.config import ModelConfig
from lmp_hl.training.module import build_potential

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
LATTICE = 5.47  # Å
SKIN = 2.0  # Å, LAMMPS's default in units metal
GRIDS = ((1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2))  # along x, y, z
RANKS = 2  # of the largest timed run
DOUBLE = 8  # bytes; LAMMPS communicates doubles
ORIGIN = (0.05, 0.03, 0.07)  # of the crystal, in cells: no atom lies on a border
DIAMOND = [(0, 0, 0), (0, 2, 2), (2, 0, 2), (2, 2, 0), (1, 1, 1), (1, 3, 3), (3, 1, 3), (3, 3, 1)]

INPUT = """
units metal
processors {grid}
lattice diamond {lattice} origin {origin}
region box block 0 {cells[0]} 0 {cells[1]} 0 {cells[2]}
create_box 1 box
create_atoms 1 box
mass 1 28.0855
pair_style mliap model {model}
pair_coeff * * Si
velocity all create 300 77
fix nve all nve
timestep 1e-9
thermo 1000000
run {warm}
run {steps}
"""

COUNT_BYTES = """
#include <stdio.h>
#include <stdlib.h>
/* what passes through MPI_Send; a line with the sum so far at every barrier: LAMMPS has one before
   and one after the time steps of a run. Types as in the MPICH ABI. */
int PMPI_Send(const void *, int, int, int, int, int);
int PMPI_Type_size(int, int *);
int PMPI_Barrier(int);
int PMPI_Comm_rank(int, int *);
static long long bytes;
int MPI_Send(const void *data, int count, int type, int to, int tag, int comm)
{
  int size;
  PMPI_Type_size(type, &size);
  bytes += (long long) count * size;
  return PMPI_Send(data, count, type, to, tag, comm);
}
int MPI_Barrier(int comm)
{
  int rank;
  char name[4096];
  PMPI_Comm_rank(comm, &rank);
  snprintf(name, sizeof(name), "%s.%d", getenv("COUNT_BYTES"), rank);
  FILE *file = fopen(name, "a");
  fprintf(file, "%lld\\n", bytes);
  fclose(file);
  return PMPI_Barrier(comm);
}
"""


@dataclass
class Traffic:
    """Per rank: owned atoms, ghosts, and those of the ghosts that another rank owns."""

    owned: int
    ghosts: int
    remote: int

    def bytes_per_step(self, features: int) -> int:
        """Positions out and forces back; `features` values per ghost out and gradients back."""
        return self.remote * 2 * (3 + features) * DOUBLE


def sites(low: list[float], high: list[float]) -> int:
    """Atoms of the infinite crystal in a box, Å. Each basis atom is a lattice of its own."""
    total = 0
    for basis in DIAMOND:
        number = 1
        for axis in range(3):
            offset = ORIGIN[axis] + basis[axis] / 4
            first, last = low[axis] / LATTICE - offset, high[axis] / LATTICE - offset
            number *= math.ceil(last) - math.ceil(first)
        total += number
    return total


def traffic(cells: tuple[int, ...], grid: tuple[int, ...], reach: float) -> list[Traffic]:
    """Of every rank of a brick decomposition whose ghosts lie up to `reach` Å beyond its box.

    LAMMPS communicates along x, then y, then z, ghosts of the directions before included; along a
    direction with one rank it copies to itself.
    """
    ranks = []
    for place in (
        (i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])
    ):
        size = [LATTICE * cells[axis] / grid[axis] for axis in range(3)]
        low = [place[axis] * size[axis] for axis in range(3)]
        high = [low[axis] + size[axis] for axis in range(3)]
        counts = [sites(low, high)]
        remote = 0
        for axis in range(3):
            low[axis] -= reach
            high[axis] += reach
            counts.append(sites(low, high))
            remote += (counts[-1] - counts[-2]) if grid[axis] > 1 else 0
        ranks.append(Traffic(counts[0], counts[-1] - counts[0], remote))
    return ranks


def sites_near(size: float, reach: float) -> int:
    """Atoms of the infinite crystal in a cube or at most `reach` from its surface, Å."""
    total = 0
    for basis in DIAMOND:
        squares = []
        for axis in range(3):
            cells = np.arange(-reach // LATTICE - 2, (size + reach) // LATTICE + 2)
            x = LATTICE * (cells + ORIGIN[axis] + basis[axis] / 4)
            squares.append(np.maximum(np.maximum(-x, x - size), 0.0) ** 2)
        distances = squares[0][:, None, None] + squares[1][None, :, None] + squares[2]
        total += int((distances < reach**2).sum())
    return total


def export_models(checkpoint: Path, folder: Path) -> tuple[int, float]:
    """Writes local.pt, trained, and mp.pt, random -> features per atom of mp, cutoff in Å."""
    _, elements, card = load_checkpoint(checkpoint)
    config = ModelConfig(**{**card["config"]["model"], "preset": "mp", "num_layers": None})
    torch.manual_seed(1)
    potential = build_potential(config, len(elements))
    crystal = bulk("Si", cubic=True, a=LATTICE)
    crystal.rattle(0.1, seed=2)
    graph = graph_inputs(crystal, elements, config.cutoff, config.layers, config.dtype)
    graph[fr.NUM_ATOMS] = torch.tensor([len(crystal)])
    fit_scales(potential.backbone, fr.collate_graphs([graph]))
    if not (folder / "mp.pt").exists():
        card["name"] = "random weights"
        export_potential(potential, elements, card, folder / "mp.pt")
        export_checkpoint(checkpoint, folder / "local.pt")
    return potential.backbone.num_features, config.cutoff


MODELS = {
    "local": "local.pt",
    "mp, exchange": "mp.pt comm exchange",
    "mp, extended ghosts": "mp.pt comm extended",
}


def lammps(
    folder: Path, model: str, cells: tuple[int, ...], grid: tuple[int, ...], steps: int, **env: str
) -> str:
    """What a run of LAMMPS prints."""
    script = INPUT.format(
        lattice=LATTICE,
        origin=" ".join(map(str, ORIGIN)),
        grid=" ".join(map(str, grid)),
        cells=cells,
        model=model,
        warm=2,
        steps=steps,
    )
    (folder / "in.scaling").write_text(script)
    done = subprocess.run(
        command(math.prod(grid), "-in", "in.scaling", "-log", "none"),
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    if done.returncode != 0:
        raise SystemExit(f"scaling: LAMMPS failed\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def check_counts(folder: Path, features: int, reach: dict[str, float]) -> list[dict]:
    """Ghosts and bytes that LAMMPS has, beside the computed ones, on 1, 2, 4 and 8 ranks."""
    library = folder / "count_bytes.so"
    source = folder / "count_bytes.c"
    source.write_text(COUNT_BYTES)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    cells, steps, rows = (4, 4, 4), 3, []
    for grid in GRIDS:
        for name, model in MODELS.items():
            for old in folder.glob("bytes.*"):
                old.unlink()
            env = {"LD_PRELOAD": str(library), "COUNT_BYTES": str(folder / "bytes")}
            printed = lammps(folder, model, cells, grid, steps, **env)
            sent = 0
            for file in folder.glob("bytes.*"):
                # the last barrier is that of LAMMPS's end
                before, after, _ = (int(line) for line in file.read_text().split()[-3:])
                sent += after - before
            found = re.findall(r"^Nghost: +(\S+) ave +(\S+) max +(\S+) min", printed, re.M)[-1]
            expected = traffic(cells, grid, reach[name])
            ghosts = [rank.ghosts for rank in expected]
            wide = features if name == "mp, exchange" else 0
            rows.append(
                {
                    "model": name,
                    "ranks": math.prod(grid),
                    "owned": statistics.mean(rank.owned for rank in expected),
                    "ghosts_computed": [statistics.mean(ghosts), max(ghosts), min(ghosts)],
                    "ghosts_lammps": [float(number) for number in found],
                    "bytes_computed": sum(rank.bytes_per_step(wide) for rank in expected),
                    "bytes_sent": sent / steps,
                }
            )
    return rows


def cases() -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name -> (model, cells, ranks along x, y, z): 512 atoms, and 512 atoms per rank."""
    found = {}
    for name in MODELS:
        found[f"{name}; 512 atoms, 1 rank"] = (name, (4, 4, 4), (1, 1, 1))
        found[f"{name}; 512 atoms, 2 ranks"] = (name, (4, 4, 4), (1, 1, 2))
        found[f"{name}; 1024 atoms, 2 ranks"] = (name, (4, 4, 8), (1, 1, 2))
    return found


def measure(folder: Path, repeats: int, steps: int) -> dict[str, list[dict]]:
    """Milliseconds per step of every case, the cases in turn; kept after each one."""
    kept = folder / "timings.json"
    times = json.loads(kept.read_text()) if kept.exists() else {}
    for number in range(1, repeats + 1):
        for case, (model, cells, grid) in cases().items():
            if len(times.setdefault(case, [])) >= number:
                continue
            printed = lammps(folder, MODELS[model], cells, grid, steps)
            seconds = float(re.findall(r"^Loop time of (\S+)", printed, re.M)[-1])
            load = round(os.getloadavg()[0], 1)
            times[case].append({"ms_per_step": 1e3 * seconds / steps, "load": load})
            kept.write_text(json.dumps(times))
    return times


def timing_table(times: dict[str, list[dict]]) -> str:
    """Markdown: ms per step (median, range), and the efficiency of two ranks against one."""
    text = "| model | 512 atoms, 1 rank | 512, 2 ranks | 1,024, 2 ranks | strong | weak |\n"
    text += "|---|---|---|---|---|---|\n"
    for name in MODELS:
        columns = []
        for case in ("512 atoms, 1 rank", "512 atoms, 2 ranks", "1024 atoms, 2 ranks"):
            values = [run["ms_per_step"] for run in times[f"{name}; {case}"]]
            columns.append((statistics.median(values), min(values), max(values)))
        one, strong, weak = (median for median, _, _ in columns)
        row = [f"{m:.1f} ({low:.1f}-{high:.1f})" for m, low, high in columns]
        row += [f"{one / strong / 2:.0%}", f"{one / weak:.0%}"]
        text += f"| {name} | {' | '.join(row)} |\n"
    return text


def thousand_ranks(features: int, cutoff: float, reach: dict[str, float]) -> list[dict]:
    """One rank of 10 x 10 x 10, with 512 to 64,000 atoms each; all ranks are alike.

    Without the exchange a rank evaluates the first layer also for the ghosts within one cutoff.
    """
    rows = []
    for side in (4, 5, 10, 20):
        for name in MODELS:
            rank = traffic((10 * side,) * 3, (10, 10, 10), reach[name])[0]
            wide = features if name == "mp, exchange" else 0
            rows.append(
                {
                    "model": name,
                    "owned": rank.owned,
                    "ghosts": rank.ghosts,
                    "first_layer": sites_near(side * LATTICE, cutoff)
                    if name == "mp, extended ghosts"
                    else rank.owned,
                    "positions_and_forces": rank.bytes_per_step(0),
                    "features": rank.bytes_per_step(wide) - rank.bytes_per_step(0),
                }
            )
    return rows


def figure(checked: list[dict], reach: dict[str, float], features: int, path: Path) -> None:
    """Ghosts and bytes per rank against the atoms of a rank; circles are what LAMMPS has."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    colors = {"local": "#00798c", "mp, exchange": "#edae49", "mp, extended ghosts": "#d1495b"}
    sides = [2, 3, 4, 5, 6, 8, 10, 14, 20, 28]
    for name, color in colors.items():
        ranks = [traffic((10 * side,) * 3, (10, 10, 10), reach[name])[0] for side in sides]
        wide = features if name == "mp, exchange" else 0
        owned = [rank.owned for rank in ranks]
        mega = [1e-6 * rank.bytes_per_step(wide) for rank in ranks]
        style = "--" if name == "mp, exchange" else "-"  # as many ghosts as local
        left.loglog(owned, [rank.ghosts for rank in ranks], style, color=color, label=name)
        right.loglog(owned, mega, color=color, label=name)
        for row in checked:
            if row["model"] != name:
                continue
            left.plot(row["owned"], row["ghosts_lammps"][0], "o", color=color, mfc="none", ms=7)
            if row["ranks"] == 8:  # fewer ranks copy some ghosts to themselves
                sent = 1e-6 * row["bytes_sent"] / 8
                right.plot(row["owned"], sent, "o", color=color, mfc="none", ms=7)
    left.set(xlabel="atoms per rank", ylabel="ghosts per rank")
    right.set(xlabel="atoms per rank", ylabel="sent per rank and step (MB)")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def report(times: dict, checked: list[dict], thousand: list[dict], features: int) -> str:
    """The tables in Markdown."""
    number = min(len(runs) for runs in times.values())
    text = f"Si crystal, ms per step: median (range) of {number} runs in turn\n\n"
    text += timing_table(times)
    loads = [run["load"] for runs in times.values() for run in runs]
    text += f"\nLoad of the machine when the runs ended: {min(loads)} to {max(loads)}."
    if statistics.median(loads) > 1.5 * RANKS:
        text += " **Other work was running: these times do not show how ranks scale.**"
    text += (
        "\n"
        "\nComputed and found: ghosts per rank (mean) and bytes that all ranks send in a step, "
        "512 atoms\n\n| model | ranks | ghosts computed | LAMMPS | bytes computed | sent |\n"
        "|---|---|---|---|---|---|\n"
    )
    for row in checked:
        text += (
            f"| {row['model']} | {row['ranks']} | {row['ghosts_computed'][0]:,.1f} | "
            f"{row['ghosts_lammps'][0]:,.1f} | {row['bytes_computed']:,} | "
            f"{row['bytes_sent']:,.0f} |\n"
        )
    text += (
        "\nComputed for 1,000 ranks (10 x 10 x 10): per rank, MB sent per step as positions and "
        f"forces, and as {features} features of a ghost and their gradients\n\n"
        "| atoms per rank | model | ghosts | ghosts per atom | atoms in the first layer | "
        "positions, forces | features | all ranks |\n|---|---|---|---|---|---|---|---|\n"
    )
    for row in thousand:
        plain, wide = 1e-6 * row["positions_and_forces"], 1e-6 * row["features"]
        text += (
            f"| {row['owned']:,} | {row['model']} | {row['ghosts']:,} | "
            f"{row['ghosts'] / row['owned']:.2f} | {row['first_layer']:,} | "
            f"{plain:.2f} | {wide:.2f} | {1e3 * (plain + wide):,.0f} |\n"
        )
    return text


def main() -> None:
    """Export, check, measure what is missing, write json, tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "scaling")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--fresh", action="store_true", help="forget earlier timings")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    features, cutoff = export_models(args.checkpoint, args.work)
    reach = {"local": cutoff + SKIN, "mp, exchange": cutoff + SKIN}
    reach["mp, extended ghosts"] = 2 * cutoff + SKIN

    checked = check_counts(args.work, features, reach)
    times = measure(args.work, args.repeats, args.steps)
    thousand = thousand_ranks(features, cutoff, reach)
    made = provenance()
    text = report(times, checked, thousand, features) + f"\nmp: random weights. {one_line(made)}\n"
    content = {"timings": times, "checked": checked, "thousand_ranks": thousand}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "scaling.json").write_text(json.dumps({**made, **content}) + "\n")
    (args.results / "scaling.md").write_text(text)
    figure(checked, reach, features, args.results / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
