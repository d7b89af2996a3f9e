"""Time and memory in LAMMPS against the number of atoms, on one rank and on two.

    python benchmarks/size.py --element Cu hl.pt2

A crystal (front_rows.py) at 300 K in boxes from a thousand to a hundred thousand atoms; all
measurements are taken in turn, `--repeats` times. Time is that which passes, so nothing else
should run. Memory is the peak of a rank's process; what an atom takes is its increase between the
largest two boxes. Tensors do not grow: the pair style evaluates atoms in portions (`memory`).
"""

import argparse
import dataclasses
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import front_process
from ase.data import atomic_masses, atomic_numbers
from front_lammps import TIMING, WARM_STEPS, pair_lines
from front_rows import CRYSTALS
from provenance import one_line, provenance

from lmp_hl.lammps import command

RESULTS = Path(__file__).resolve().parent / "results"
Key = tuple[str, int, int]  # file, cells, ranks


def measure(model: Path, element: str, cells: int, ranks: int, seconds: float) -> dict[str, float]:
    """Atoms, µs per atom and step, and peak memory of a rank in MiB."""
    crystal = dataclasses.replace(CRYSTALS[element], cells=(cells, cells, cells))
    script = TIMING.format(
        lattice=crystal.lattice,
        constant=crystal.constant,
        cells=crystal.cells,
        mass=atomic_masses[atomic_numbers[element]],
        pair=pair_lines(f"mliap model {model}", element),
        warm=WARM_STEPS,
        seconds=seconds,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in.size").write_text(script)
        done = front_process.run(command(ranks, "-in", "in.size", "-log", "none"), folder)
    loops = re.findall(
        r"^Loop time of (\S+) on \d+ procs for (\d+) steps with (\d+) atoms", done.output, re.M
    )
    if len(loops) != 2:
        raise SystemExit(f"LAMMPS stopped: {front_process.reason_in(done.output)}")
    took, steps, atoms = loops[-1]
    microseconds = 1e6 * float(took) / int(steps) / int(atoms)
    return {"atoms": int(atoms), "us": microseconds, "MiB": done.peak}


def page(element: str, found: dict[Key, list[dict[str, float]]], made: dict[str, Any]) -> str:
    """Markdown: one line a file and size, and what they say about the targets of scaling."""
    ranks = sorted({key[2] for key in found})
    head = ["file", "atoms", "µs/atom/step, 1 rank", "of the smallest", "MiB"]
    head += [f"{n} ranks" for n in ranks[1:]] + [f"1 rank / {n} ranks" for n in ranks[1:]]
    lines = [
        f"{element} crystal, one thread a rank, median (range) of measurements in turn",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    memory = []
    for model in dict.fromkeys(key[0] for key in found):
        sizes = sorted({key[1] for key in found if key[0] == model})
        times = {
            (cells, n): [m["us"] for m in found[model, cells, n]] for cells in sizes for n in ranks
        }
        middle = {key: statistics.median(values) for key, values in times.items()}
        peak = {c: max(m["MiB"] for m in found[model, c, ranks[0]]) for c in sizes}
        count = {c: found[model, c, ranks[0]][0]["atoms"] for c in sizes}
        for c in sizes:
            spread = [f"{middle[c, n]:.1f} ({min(times[c, n]):.1f}-{max(times[c, n]):.1f})"
                      for n in ranks]  # fmt: skip
            gain = [f"{middle[c, ranks[0]] / middle[c, n]:.2f}" for n in ranks[1:]]
            first = f"{middle[c, ranks[0]] / middle[sizes[0], ranks[0]]:.2f}"
            cells = [model, f"{count[c]:,}", spread[0], first, f"{peak[c]:.0f}"]
            lines.append("| " + " | ".join([*cells, *spread[1:], *gain]) + " |")
        if len(sizes) > 1:
            a, b = sizes[-2:]
            each = 2**20 * (peak[b] - peak[a]) / (count[b] - count[a])
            memory += ["", f"`{model}`: {each / 1000:.1f} kB of memory an atom."]
    return "\n".join([*lines, *memory, "", one_line(made)]) + "\n"


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="hl.pt")
    parser.add_argument("--element", choices=CRYSTALS, default="Cu")
    parser.add_argument("--cells", type=int, nargs="+", default=[6, 13, 20, 29])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a measurement, at least")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[Key, list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for model in args.models:
            name = "/".join(model.resolve().parts[-2:])
            for cells in args.cells:
                for ranks in args.ranks:
                    one = measure(model.resolve(), args.element, cells, ranks, args.seconds)
                    found.setdefault((name, cells, ranks), []).append(one)
                    print(f"{name}, {one['atoms']} atoms, {ranks} ranks: {one['us']:.1f} µs",
                          flush=True)  # fmt: skip
    made = provenance()
    text = page(args.element, found, made)
    print(text)
    (args.results / "size.md").write_text(text, encoding="utf-8")
    rows = [{"file": f, "cells": c, "ranks": n, "measured": m} for (f, c, n), m in found.items()]
    content = {"element": args.element, "rows": rows, "made": made}
    (args.results / "size.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
