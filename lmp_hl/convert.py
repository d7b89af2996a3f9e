"""Writes an H5MD trajectory as extended XYZ (ASE) or as a LAMMPS text dump (OVITO, rerun)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmp_hl.h5md import Trajectory, open_trajectory

_ROWS: Final = 1 << 15  # atoms that are turned into text at once
_DUMP_NAMES: Final = {
    "id": ["id"],
    "type": ["type"],
    "species": ["element"],
    "mass": ["mass"],
    "charge": ["q"],
    "position": ["x", "y", "z"],
    "position_unwrapped": ["xu", "yu", "zu"],
    "image": ["ix", "iy", "iz"],
    "velocity": ["vx", "vy", "vz"],
    "force": ["fx", "fy", "fz"],
}


def convert(
    source: str | Path, target: str | Path, frames: slice = slice(None), progress: bool = False
) -> int:
    """Write frames of a trajectory in the format that the ending of `target` names.

    One frame is held at a time. Numbers keep every digit they have in the trajectory. The target
    appears, or replaces an older file, when it is complete.

    Args:
        source: H5MD trajectory, also one that is being written.
        target: `.xyz` or `.extxyz`: extended XYZ in ASE's units and names, with `step`, `time` (in
            the trajectory's unit) and, if it is not zero, `Origin` of the cell in each comment
            line; `.lammpstrj` or `.dump`: LAMMPS text dump in LAMMPS's units and names.
        frames: which frames.
        progress: show a bar on stderr.

    Returns:
        Number of frames written.

    Raises:
        ValueError: unknown ending, no such frames, or a frame that the format cannot hold.
    """
    target = Path(target)
    write = _WRITERS.get(target.suffix)
    if write is None:
        raise ValueError(
            f"{target}: unknown ending {target.suffix!r}; wanted {', '.join(_WRITERS)}"
        )
    with open_trajectory(source) as trajectory:
        chosen = range(trajectory.num_frames)[frames]
        if not chosen:
            raise ValueError(
                f"{source} has {trajectory.num_frames} frames; start, stop and step leave none"
            )
        partial = target.with_name(target.name + ".part")
        try:
            with partial.open("w", encoding="utf-8") as file:
                for text in write(trajectory, _steps(chosen, target, progress)):
                    file.write(text)
            os.replace(partial, target)
        except OSError as error:
            raise ValueError(
                f"cannot write {target}: {error.strerror}; make room or choose another place"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    return len(chosen)


def _steps(chosen: range, target: Path, progress: bool) -> Any:
    if not progress:
        return chosen
    from rich.console import Console
    from rich.progress import track

    return track(chosen, f"writing {target.name}", console=Console(stderr=True), transient=True)


def _extended_xyz(trajectory: Trajectory, steps: Any) -> Iterator[str]:
    digits = _digits(trajectory)
    for i in steps:
        atoms = trajectory.to_ase(i)
        arrays = {
            name: a for name, a in atoms.arrays.items() if name not in ("numbers", "positions")
        }
        if atoms.calc is not None:
            arrays.update(atoms.calc.results)
        columns = {"species": np.array(atoms.get_chemical_symbols()), "pos": atoms.positions}
        columns.update(sorted(arrays.items()))
        properties = ":".join(
            f"{name}:{'S' if a.dtype.kind == 'U' else 'I' if a.dtype.kind in 'iu' else 'R'}"
            f":{_width(a)}"
            for name, a in columns.items()
        )
        info = {"Properties": properties, **atoms.info}
        if atoms.get_celldisp().any():
            info["Origin"] = _quoted(atoms.get_celldisp())
        info["pbc"] = _quoted("T" if side else "F" for side in atoms.pbc)
        comment = " ".join(f"{key}={value}" for key, value in info.items())
        yield f"{len(atoms)}\nLattice={_quoted(atoms.cell)} {comment}\n"
        yield from _table(list(columns.values()), digits)


def _lammps_dump(trajectory: Trajectory, steps: Any) -> Iterator[str]:
    digits = _digits(trajectory)
    boxes = trajectory.box
    cells = boxes if boxes.ndim == 3 else boxes[:, None] * np.eye(3)
    if np.triu(cells, 1).any():
        raise ValueError(
            f"{trajectory.path}: a LAMMPS dump needs cell vectors a = (x, 0, 0), b = (xy, y, 0), "
            "c = (xz, yz, z); write extended XYZ"
        )
    tilted = bool(np.tril(cells, -1).any())
    # in reduced units a species is a LAMMPS type, no element
    skipped = {"species"} if trajectory.unit_style == "lj" else set()
    first = [name for name in _DUMP_NAMES if name in trajectory.columns]
    names = [
        n for n in first + [c for c in trajectory.columns if c not in first] if n not in skipped
    ]
    for i in steps:
        frame = trajectory.frame(i)
        yield f"ITEM: TIMESTEP\n{frame.step}\nITEM: NUMBER OF ATOMS\n{frame.num_atoms}\n"
        yield _box_bounds(frame.cell, frame.origin, frame.periodic, tilted)
        labels = [label for name in names for label in _labels(name, frame[name])]
        yield f"ITEM: ATOMS {' '.join(labels)}\n"
        yield from _table(
            [_symbols(frame[n]) if n == "species" else frame[n] for n in names], digits
        )


_WRITERS: Final[dict[str, Callable[[Trajectory, Any], Iterator[str]]]] = {
    ".xyz": _extended_xyz,
    ".extxyz": _extended_xyz,
    ".lammpstrj": _lammps_dump,
    ".dump": _lammps_dump,
}


def _box_bounds(cell: np.ndarray, origin: np.ndarray, periodic: np.ndarray, tilted: bool) -> str:
    """Corners of the box around the cell, with the tilts behind them if there are any."""
    tilts = cell[1, 0], cell[2, 0], cell[2, 1]  # xy, xz, yz
    low, high = np.array(origin, float), origin + cell.diagonal()
    low += [min(0, tilts[0]) + min(0, tilts[1]), min(0, tilts[2]), 0]
    high += [max(0, tilts[0]) + max(0, tilts[1]), max(0, tilts[2]), 0]
    lines = [
        "ITEM: BOX BOUNDS" + " xy xz yz" * tilted + "".join(" pp" if p else " ff" for p in periodic)
    ]
    for k in range(3):
        lines.append(f"{low[k]:.16e} {high[k]:.16e}" + f" {tilts[k]:.16e}" * tilted)
    return "\n".join(lines) + "\n"


def _labels(name: str, values: np.ndarray) -> list[str]:
    if name in _DUMP_NAMES:
        return _DUMP_NAMES[name]
    return [f"{name}[{k + 1}]" for k in range(values.shape[1])] if values.ndim == 2 else [name]


def _symbols(species: np.ndarray) -> np.ndarray:
    from ase.data import chemical_symbols

    return np.array(chemical_symbols)[species]


def _width(values: np.ndarray) -> int:
    return 1 if values.ndim == 1 else values.shape[1]


def _quoted(values: Any) -> str:
    texts = [v if isinstance(v, str) else repr(float(v)) for v in np.ravel(list(values)).tolist()]
    return f'"{" ".join(texts)}"'


def _digits(trajectory: Trajectory) -> int:
    """Digits that give the number back: single or double precision, as the fix wrote it."""
    real = [trajectory.dtypes[n] for n in trajectory.columns if trajectory.dtypes[n].kind == "f"]
    return 9 if all(dtype.itemsize <= 4 for dtype in real) else 17


def _table(columns: list[np.ndarray], digits: int) -> Iterator[str]:
    """Rows of text, a few thousand atoms at a time."""
    parts = [part for values in columns for part in values.reshape(len(values), _width(values)).T]
    kinds = {"i": "%d", "u": "%d", "U": "%s", "f": f"%.{digits}g"}
    row = " ".join(kinds[part.dtype.kind] for part in parts) + "\n"
    num_atoms = len(parts[0])
    for start in range(0, num_atoms, _ROWS):
        lists = [part[start : start + _ROWS].tolist() for part in parts]
        yield row * len(lists[0]) % tuple(chain.from_iterable(zip(*lists, strict=True)))
