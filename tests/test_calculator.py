"""The ASE calculator against the potential, finite differences and conservation of energy."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, make_supercell
from ase.calculators.fd import calculate_numerical_stress
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from conftest import CUTOFF, FIELDS

import lmp_hl
from lmp_hl import keys
from lmp_hl.calculator import HLCalculator
from lmp_hl.graph import graph_inputs
from lmp_hl.potential import edge_forces


@pytest.fixture(scope="module")
def calculator(tiny_model):
    return HLCalculator(tiny_model)


def test_results_are_those_of_the_potential(calculator, potential_factory, structure_factory):
    atoms = structure_factory(["Si", "O"], pbc=[True, False, True])
    atoms.calc = calculator
    potential = potential_factory(num_elements=2)
    inputs = graph_inputs(atoms, ["Si", "O"], CUTOFF, 1, "float64")
    out = {k: v.detach() for k, v in potential(inputs, True).items()}
    energy = float(out[keys.ENERGY].sum())
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(atoms.get_potential_energies(), out[keys.ENERGY], rtol=1e-12)
    forces = edge_forces(inputs[keys.EDGE_INDEX], out[keys.EDGE_GRADIENTS], len(atoms))
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-12)
    for field in FIELDS:
        np.testing.assert_allclose(calculator.results[field], out[field], rtol=1e-9)


def test_the_package_offers_it_at_the_top():
    assert lmp_hl.HLCalculator is HLCalculator


def test_cell_smaller_than_the_cutoff_equals_its_supercell(calculator):
    primitive = bulk("Si", a=5.5)  # 3.9 Å long vectors, planes 3.2 Å apart
    primitive.rattle(0.15, seed=1)
    matrix = np.array([[3, 0, 0], [1, 2, 0], [0, 0, 3]])
    supercell = make_supercell(primitive, matrix, order="cell-major")
    results = []
    for atoms in (primitive, supercell):
        atoms.calc = calculator
        forces, stress = atoms.get_forces(), atoms.get_stress()
        fields = {name: calculator.results[name] for name in ("energies", *FIELDS)}
        results.append((forces, stress, fields))
    (forces, stress, fields), (big_forces, big_stress, big_fields) = results
    copies = len(supercell) // len(primitive)
    np.testing.assert_allclose(big_forces, np.tile(forces, (copies, 1)), atol=1e-10)
    np.testing.assert_allclose(big_stress, stress, atol=1e-12)
    assert np.abs(forces).max() > 1e-3
    for name, values in fields.items():
        np.testing.assert_allclose(big_fields[name], np.tile(values, copies), rtol=1e-9)


def test_stress_equals_ases_numerical_stress(calculator, structure_factory):
    atoms = structure_factory(["Si", "O"], num_atoms=4, seed=2)
    atoms.calc = calculator
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_stress(), numerical, rtol=1e-5, atol=1e-8)
    assert np.abs(numerical).max() > 1e-4


def test_stress_needs_three_periodic_directions(calculator, structure_factory):
    atoms = structure_factory(["Si", "O"], pbc=[True, True, False])
    atoms.calc = calculator
    assert np.isfinite(atoms.get_potential_energy())
    assert "stress" not in calculator.results


def test_nve_drift_falls_with_the_square_of_the_time_step(calculator, silicon):
    """Verlet keeps a nearby energy: for conservative forces |E - E0| ~ dt^2, a quarter at half dt.

    Forces that are not the gradient of the energy drift alike at both time steps (ratio about 1).
    """
    spread = []
    for step in (0.5, 0.25):
        atoms = silicon.copy()
        atoms.calc = calculator
        MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
        dynamics = VelocityVerlet(atoms, step * units.fs)
        energies = []
        dynamics.attach(lambda atoms=atoms, out=energies: out.append(atoms.get_total_energy()))
        dynamics.run(round(15 / step))
        spread.append(np.ptp(energies))
    assert 3.0 < spread[0] / spread[1] < 5.0
    # kinetic energy is 0.3 eV; the exchange with the potential is much larger than the error
    assert spread[0] < 5e-3


def test_unknown_element_is_named(calculator):
    atoms = Atoms("SiGe", [[0, 0, 0], [0, 0, 2.4]], calculator=calculator)
    with pytest.raises(ValueError, match="element Ge is unknown to the model; it knows Si, O"):
        atoms.get_potential_energy()


def test_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such model file"):
        HLCalculator(tmp_path / "nothing.pt")
