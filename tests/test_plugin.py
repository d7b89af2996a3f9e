"""The pair style in LAMMPS gives what the model file says, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lammps_cases import (
    BAR_PER_EV_A3,
    Atoms,
    cluster,
    crystal,
    export,
    read_dump,
    reference,
    run_lammps,
)

# LAMMPS and the reference sum in different orders; both are float64
TOLERANCE = 1e-9

COLUMNS = "id x y z fx fy fz c_e c_s[1] c_s[2] c_s[3] c_s[4] c_s[5] c_s[6] c_u[1] c_u[2]"


def small_cell() -> Atoms:
    positions = [[0.1, 0.2, 0.3], [1.2, 0.9, 1.6], [2.2, 2.6, 0.9]]
    return Atoms(positions, [0, 1, 1], np.diag([2.9, 3.1, 3.0]))


def slab() -> Atoms:
    atoms = crystal(5)
    cell = atoms.cell + np.diag([0, 0, 9.0])
    return Atoms(atoms.positions + np.array([0, 0, 4.0]), atoms.species, cell, (True, True, False))


def with_unseen_type() -> Atoms:
    atoms = crystal(6)
    atoms.types[::4] = 3
    return atoms


SYSTEMS = {
    "periodic": crystal(1),
    "triclinic": crystal(2, triclinic=True),
    "slab": slab(),
    "cluster": cluster(3),  # on two ranks along x one rank has no atoms; one atom has no neighbours
    "small_cell": small_cell(),
    "null_type": with_unseen_type(),
    "large": crystal(4, triclinic=True, repeat=5),  # wider than two cutoffs and the skin
}


def setup(name: str, layers: int, style: str = "mliap", extra: str = "") -> str:
    """Commands from `clear` to the computes for one system."""
    boundary = " ".join("p" if p else "f" for p in SYSTEMS[name].periodic)
    return f"""
clear
units metal
boundary {boundary}
processors * 1 1
box tilt large
read_data {name}.data
pair_style {style} model layers{layers}.pt
pair_coeff * * Si O NULL
{extra}
compute e all pe/atom
compute s all stress/atom NULL virial
compute u all hlgauss/atom entropy force_std
compute p all pressure NULL virial
thermo_style custom step pe c_p[1] c_p[2] c_p[3] c_p[4] c_p[5] c_p[6]
thermo_modify format float %.16g
dump d all custom 1000000 {{out}} {COLUMNS}
dump_modify d format float %.17g
"""


FINISH = """
run {steps}
write_dump all custom {out}.last {columns} modify format float %.17g
print "$(pe:%.17g) $(vol:%.17g) $(c_p[1]:%.17g) $(c_p[2]:%.17g) $(c_p[3]:%.17g) $(c_p[4]:%.17g) $(c_p[5]:%.17g) $(c_p[6]:%.17g)" file {out}.thermo
"""  # noqa: E501


def case(name: str, layers: int, out: str, steps: int = 0, **options: str) -> str:
    return setup(name, layers, **options).replace("{out}", out) + FINISH.format(
        steps=steps, out=out, columns=COLUMNS
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin")
    for layers in (1, 2):
        export(path / f"layers{layers}.pt", layers)
    export(path / "single.pt", 1, "float32")
    for name, atoms in SYSTEMS.items():
        atoms.write(path / f"{name}.data")
    return path


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def ranks(request: pytest.FixtureRequest, folder: Path) -> int:
    """Runs every static and dynamic case in one LAMMPS process on this many ranks."""
    n = request.param
    script = ""
    for layers in (1, 2):
        for name in SYSTEMS:
            style = "mliap" if layers == 1 else "hlgauss"
            script += case(name, layers, f"{name}.{layers}.{n}", style=style)
        script += case(
            "periodic",
            layers,
            f"md.{layers}.{n}",
            steps=60,
            extra="velocity all create 3000 11\nfix 1 all nve\ntimestep 0.001\n"
            "neighbor 0.6 bin\nneigh_modify every 1 delay 0 check yes",
        )
        script += case(
            "large",
            layers,
            f"tiled.{layers}.{n}",
            extra="comm_style tiled\nbalance 1.0 rcb\nneighbor 1.1 bin",
        )
    result = run_lammps(script, folder, n)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    return n


def check(folder: Path, out: str, atoms: Atoms, layers: int) -> None:
    """Compare everything LAMMPS wrote about the last step with the reference at its positions."""
    rows = read_dump(folder / f"{out}.last")
    moved = Atoms(rows[:, 1:4], atoms.species, atoms.cell, atoms.periodic)
    moved.types = atoms.types
    want = reference(moved, layers)
    thermo = np.loadtxt(folder / f"{out}.thermo")

    def close(got: np.ndarray, expected: np.ndarray, what: str, scale: float = 1.0) -> None:
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=TOLERANCE * scale, err_msg=what)

    close(rows[:, 4:7], want["forces"], "forces")
    close(rows[:, 7], want["energies"], "per-atom energies")
    # LAMMPS rounds its conversion from eV/Å³ to bar to eight digits
    stress = -rows[:, 8:14] / BAR_PER_EV_A3
    np.testing.assert_allclose(stress, want["virials"], rtol=1e-6, atol=1e-8)
    close(rows[:, 14], want["entropy"], "entropy")
    close(rows[:, 15], want["force_std"], "force_std")
    close(thermo[0], want["energies"].sum(), "energy")
    pressure = thermo[2:] * thermo[1] / BAR_PER_EV_A3
    np.testing.assert_allclose(pressure, want["virials"].sum(0), rtol=1e-6, atol=1e-7)
    assert np.abs(want["forces"]).max() > 0.01  # the comparison is not of zeros


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", SYSTEMS)
def test_lammps_equals_reference(folder: Path, ranks: int, name: str, layers: int) -> None:
    check(folder, f"{name}.{layers}.{ranks}", SYSTEMS[name], layers)


@pytest.mark.parametrize("layers", [1, 2])
def test_last_step_of_dynamics_equals_reference(folder: Path, ranks: int, layers: int) -> None:
    out = f"md.{layers}.{ranks}"
    moved = read_dump(folder / f"{out}.last")[:, 1:4] - read_dump(folder / out)[:, 1:4]
    assert np.abs(moved).max() > 0.6  # far enough for a new neighbour list (skin 0.6 Å)
    check(folder, out, SYSTEMS["periodic"], layers)


@pytest.mark.parametrize("layers", [1, 2])
def test_tiled_decomposition_and_skin_change_nothing(folder: Path, ranks: int, layers: int) -> None:
    check(folder, f"tiled.{layers}.{ranks}", SYSTEMS["large"], layers)


def test_reference_forces_are_minus_energy_gradient() -> None:
    atoms = SYSTEMS["triclinic"]
    for layers in (1, 2):
        forces = reference(atoms, layers)["forces"]
        for k, a in ((0, 0), (13, 1), (26, 2)):
            energies = []
            for step in (1e-4, -1e-4):
                positions = atoms.positions.copy()
                positions[k, a] += step
                moved = Atoms(positions, atoms.species, atoms.cell)
                energies.append(reference(moved, layers)["energies"].sum())
            # central differences: error of order step² times the third derivative
            assert forces[k, a] == pytest.approx(-(energies[0] - energies[1]) / 2e-4, abs=1e-6)
