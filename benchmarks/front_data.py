"""Frames of benchmarks/front.py as each maker wants them; which test energies were trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from numpy.typing import NDArray

SAME_ENERGY: Final = 1e-6  # eV, of the whole frame
PILOT_ATOMS: Final = 1000  # in the frames that the speed of a training is measured on


def read_all(path: Path) -> list[Atoms]:
    """Every frame of an extended XYZ file."""
    return list(read(path, ":"))


def known_energy(test: Sequence[Atoms], train: Sequence[Atoms]) -> NDArray[np.bool_]:
    """Whether a training frame has a test frame's number of atoms and energy.

    Such frames are the same crystal strained in equivalent directions: their energy is no test.

    Returns:
        (num_test,)
    """
    seen = [(len(a), a.get_potential_energy()) for a in train]
    return np.array(
        [
            any(n == len(a) and abs(e - a.get_potential_energy()) <= SAME_ENERGY for n, e in seen)
            for a in test
        ]
    )


def pilot(frames: Sequence[Atoms], num_atoms: int = PILOT_ATOMS) -> list[Atoms]:
    """Every k-th frame, with at least `num_atoms` atoms in all if there are as many."""
    total = sum(map(len, frames))
    k = max(1, total // num_atoms)
    while k > 1 and sum(map(len, frames[::k])) < num_atoms:
        k -= 1
    return list(frames[::k])


def write_plain(frames: Sequence[Atoms], path: Path) -> None:
    """Extended XYZ as ASE writes it."""
    write(path, list(frames), format="extxyz")


def write_mace(frames: Sequence[Atoms], path: Path) -> None:
    """Extended XYZ with MACE's keys; a missing stress is left out."""
    out = []
    for atoms in frames:
        results = atoms.calc.results
        copy = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        copy.info["REF_energy"] = float(results["energy"])
        copy.arrays["REF_forces"] = np.asarray(results["forces"])
        if "stress" in results:
            copy.info["REF_stress"] = np.asarray(results["stress"])
        out.append(copy)
    write(path, out, format="extxyz")


def write_nequip(frames: Sequence[Atoms], path: Path) -> None:
    """Extended XYZ in which a missing stress is nan."""
    out = []
    for atoms in frames:
        copy = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        results = {"stress": np.full(6, np.nan), **atoms.calc.results}
        wanted = {name: results[name] for name in ("energy", "forces", "stress")}
        copy.calc = SinglePointCalculator(copy, **wanted)
        out.append(copy)
    write(path, out, format="extxyz")


def write_deepmd(frames: Sequence[Atoms], folder: Path) -> list[str]:
    """DeePMD-kit's systems: frames of one composition, those with and those without a virial.

    The virial is -V times the stress (ASE's sign), eV.

    Returns:
        Their folders.
    """
    groups: dict[tuple[str, bool], list[Atoms]] = {}
    for atoms in frames:
        order = np.argsort(atoms.numbers, kind="stable")
        key = (atoms[order].get_chemical_formula("reduce"), "stress" in atoms.calc.results)
        groups.setdefault(key, []).append(atoms)
    kinds = sorted({s for atoms in frames for s in atoms.get_chemical_symbols()})
    written = []
    for k, ((_, has_stress), members) in enumerate(sorted(groups.items())):
        system = folder / f"system{k}"
        (system / "set.000").mkdir(parents=True)
        orders = [np.argsort(a.numbers, kind="stable") for a in members]
        symbols = members[0][orders[0]].get_chemical_symbols()
        (system / "type_map.raw").write_text("\n".join(kinds) + "\n")
        (system / "type.raw").write_text("\n".join(str(kinds.index(s)) for s in symbols) + "\n")
        pairs = list(zip(members, orders, strict=True))
        arrays = {
            "coord": [a.positions[o] for a, o in pairs],
            "box": [a.cell.array for a in members],
            "energy": [a.get_potential_energy() for a in members],
            "force": [a.get_forces()[o] for a, o in pairs],
        }
        if has_stress:
            arrays["virial"] = [-a.get_volume() * a.get_stress(voigt=False) for a in members]
        for name, values in arrays.items():
            rows = np.array([np.ravel(v) for v in values], dtype=np.float64)
            np.save(system / "set.000" / f"{name}.npy", rows)
        written.append(str(system))
    return written
