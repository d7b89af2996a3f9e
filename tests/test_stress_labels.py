"""Stress labels that contradict the energies are noticed, and put right by data.stress_offset."""

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from lmp_hl.training.config import DataConfig, TrainConfig
from lmp_hl.training.frames import Frame, Splits, read_frames
from lmp_hl.training.stress_labels import stress_offset
from lmp_hl.training.train import _check_stress

# the trapezoidal rule is off by C strain^2 / 12, C = 6 eV/Å³ of third order, strain up to 0.04
TOLERANCE = 8e-4
PULAY = -0.015  # eV/Å³, what the labels of a plane-wave calculation may lack


def strained(path: Path, missing: float, offset: float = 0.0) -> list[Frame]:
    """Crystals of EMT copper under uniaxial strain and shear, read back from a file."""
    frames = []
    for strain in np.linspace(-0.03, 0.03, 7):
        for gradient in (np.diag([1 + strain, 1, 1]), [[1, strain, 0], [0, 1, 0], [0, 0, 1]]):
            atoms = bulk("Cu", cubic=True)
            atoms.set_cell(atoms.cell @ np.array(gradient), scale_atoms=True)
            atoms.calc = EMT()
            stress = atoms.get_stress()
            stress[:3] -= missing
            atoms.calc = SinglePointCalculator(
                atoms,
                energy=atoms.get_potential_energy(),
                forces=atoms.get_forces(),
                stress=stress,
            )
            frames.append(atoms)
    write(path, frames, format="extxyz")
    return read_frames(path, DataConfig(train=(path,), stress_offset=offset), "train")


def test_what_is_missing_is_found(tmp_path: Path) -> None:
    found = stress_offset(strained(tmp_path / "train.xyz", PULAY))
    assert found is not None
    assert found.explains
    assert found.value == pytest.approx(PULAY, abs=TOLERANCE)


def test_labels_that_agree_pass(tmp_path: Path) -> None:
    for name, missing, offset in (("right", 0.0, 0.0), ("corrected", PULAY, PULAY)):
        found = stress_offset(strained(tmp_path / f"{name}.xyz", missing, offset))
        assert found is not None
        assert not found.explains
        assert abs(found.value) < TOLERANCE


def test_frames_that_differ_otherwise_say_nothing(tmp_path: Path) -> None:
    frames = strained(tmp_path / "train.xyz", PULAY)
    assert stress_offset(frames[:1]) is None
    rattled = bulk("Cu", cubic=True) * 2
    rattled.rattle(0.05, seed=1)
    rattled.calc = EMT()
    rattled.get_stress()
    rattled.get_forces()
    write(tmp_path / "other.xyz", rattled, format="extxyz")
    other = read_frames(tmp_path / "other.xyz", DataConfig(train=(tmp_path / "other.xyz",)), "t")
    assert stress_offset([frames[0], *other]) is None


def test_training_warns_with_the_number_that_puts_it_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.xyz"
    for offset, said in ((0.0, f"data.stress_offset: {PULAY:.3f}"[:-1]), (PULAY, "")):
        frames = strained(path, PULAY, offset)
        splits = Splits(
            elements=("Cu",), reference_energies={"Cu": 0.0}, train=frames, valid=frames, test={}
        )
        data = DataConfig(train=(path,), stress_offset=offset)
        _check_stress(TrainConfig(name="cu", data=data, output_dir=tmp_path), splits)
        printed = capsys.readouterr().out
        assert said in printed if said else printed == ""
