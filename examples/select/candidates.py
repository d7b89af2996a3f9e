"""Uncertain frames of a LAMMPS run -> a few frames to label, as extended XYZ.

    python candidates.py uncertain_frames.dump candidates.xyz --apart 0.5

Frames less than `--apart` ps after one another are nearly the same configuration; of each such
stretch the one with the most uncertain atom is kept.
"""

import argparse
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import ase
import ase.io

FIELD = "f_g"  # column of the dump that holds force_std, eV/Å


def frames(path: Path) -> Iterator[ase.Atoms]:
    """Frames of a `dump custom` file with `time yes` and columns element x y z f_g.

    A last frame that is cut short (LAMMPS was killed) is left out.

    Raises:
        ValueError: other columns, or no times.
    """
    text = path.read_text(encoding="utf-8")
    blocks = text.split("ITEM: TIME\n")[1:]
    if text and not blocks:
        raise ValueError(f"{path}: no times; add 'dump_modify ID time yes'")
    for number, block in enumerate(blocks, start=1):
        head = re.match(r"(.+)\nITEM: TIMESTEP\n(.+)\nITEM: NUMBER OF ATOMS\n(.+)\n", block)
        columns, *rows = block.split("ITEM: ATOMS ")[-1].splitlines()
        whole = head and len(rows) == int(head[3]) and block.endswith("\n")
        if number == len(blocks) and not whole:
            return
        missing = {"element", "x", "y", "z", FIELD} - set(columns.split())
        if missing:
            raise ValueError(f"{path}: no column {sorted(missing)}, found {columns.split()}")
        # positions and cell in Å; ASE adds the columns that it does not know as arrays
        atoms = ase.io.read(io.StringIO(block), format="lammps-dump-text")
        atoms.info = {"step": int(head[2]), "time": float(head[1])}
        atoms.calc = None
        atoms.arrays["force_std"] = atoms.arrays.pop(FIELD).ravel()
        yield atoms


def spaced(found: list[ase.Atoms], apart: float) -> list[ase.Atoms]:
    """The most uncertain frames, at least `apart` ps from each other, in order of time."""
    chosen: list[ase.Atoms] = []
    for atoms in sorted(found, key=lambda atoms: -atoms.arrays["force_std"].max()):
        if all(abs(atoms.info["time"] - other.info["time"]) >= apart for other in chosen):
            chosen.append(atoms)
    return sorted(chosen, key=lambda atoms: atoms.info["time"])


def main() -> None:
    """Read, choose, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--apart", type=float, default=0.5, help="least distance in time, ps")
    args = parser.parse_args()
    try:
        found = list(frames(args.dump))
    except (ValueError, OSError) as error:
        sys.exit(f"candidates.py: {error}")
    chosen = spaced(found, args.apart)
    if chosen:
        ase.io.write(args.out, chosen, format="extxyz")
    print(
        f"{args.dump}: {len(found)} uncertain frames, {len(chosen)} candidates at least "
        f"{args.apart:g} ps apart" + (f" -> {args.out}" if chosen else "")
    )
    for atoms in chosen:
        worst = atoms.arrays["force_std"]
        print(
            f"  step {atoms.info['step']:>8}  {atoms.info['time']:8.3f} ps  force_std max "
            f"{worst.max():.3f} eV/Å"
        )


if __name__ == "__main__":
    main()
