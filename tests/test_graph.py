"""Neighbour lists and graph inputs against a brute-force list over explicit images."""

import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from lmp_hl import keys
from lmp_hl.graph import edge_vectors, graph_inputs, neighbor_list, periodic_cell, species_indices

TRICLINIC = np.array([[5.1, 0.0, 0.0], [1.9, 4.3, 0.0], [-1.2, 1.4, 6.2]])
SMALL = np.array([[2.1, 0.0, 0.3], [0.9, 1.9, 0.0], [0.2, -0.8, 2.4]])  # below the cutoff
SKEWED = np.array([[3.0, 0.0, 0.0], [8.9, 2.5, 0.0], [-5.8, 4.9, 2.7]])


def brute_force(positions, cell, pbc, cutoff):
    """All (i, j, shift) with 0 < |r_j + shift @ cell - r_i| < cutoff, by trying every image."""
    reach = [0, 0, 0]
    periodic = [a for a in range(3) if pbc[a]]
    if periodic:
        # |fractional difference| + cutoff / plane distance bounds the shift
        inverse = np.linalg.pinv(cell[periodic])  # (3, num_periodic)
        spread = np.ptp(positions @ inverse, axis=0) if len(positions) else np.zeros(len(periodic))
        bound = spread + cutoff * np.linalg.norm(inverse, axis=0)
        for axis, b in zip(periodic, bound, strict=True):
            reach[axis] = int(np.ceil(b)) + 1
    found = set()
    for shift in itertools.product(*(range(-n, n + 1) for n in reach)):
        offset = sum((n * cell[a] for a, n in enumerate(shift) if pbc[a]), np.zeros(3))
        distances = np.linalg.norm(positions[None] + offset - positions[:, None], axis=-1)
        for i, j in np.argwhere(distances < cutoff).tolist():
            if i != j or shift != (0, 0, 0):
                found.add((i, j, *shift))
    return found


def as_list(edge_index, cell_shifts):
    return [
        (int(i), int(j), *map(int, s)) for i, j, s in zip(*edge_index, cell_shifts, strict=True)
    ]


@pytest.mark.parametrize("pbc", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("cell", [TRICLINIC, SMALL, SKEWED], ids=["triclinic", "small", "skewed"])
def test_neighbor_list_equals_brute_force(cell, pbc):
    rng = np.random.default_rng(sum(1 << a for a in range(3) if pbc[a]))
    # atoms on both sides of the cell's faces: positions need not be wrapped
    positions = rng.uniform(-0.6, 1.7, size=(5, 3)) @ cell
    edges = as_list(*neighbor_list(positions, cell, pbc, 4.0))
    assert len(edges) == len(set(edges))
    assert set(edges) == brute_force(positions, cell, pbc, 4.0)
    assert edges == sorted(edges)


@pytest.mark.parametrize("pbc", [(True, False, True), (False, False, True), (False, False, False)])
def test_zero_cell_vectors_are_fine_where_not_periodic(pbc):
    rng = np.random.default_rng(3)
    cell = np.where(np.array(pbc)[:, None], TRICLINIC, 0.0)
    positions = rng.uniform(-30.0, 30.0, size=(40, 3))
    edges = as_list(*neighbor_list(positions, cell, pbc, 5.0))
    assert edges == sorted(brute_force(positions, cell, pbc, 5.0))
    assert edges


def test_what_stands_in_a_non_periodic_direction_does_not_matter():
    positions = np.random.default_rng(4).uniform(-6.0, 6.0, size=(12, 3))
    expected = neighbor_list(positions, np.diag([5.0, 6.0, 0.0]), [True, True, False], 5.0)
    assert expected[0].shape[1] > 0
    for third in ([5.0, 6.0, 0.0], [np.nan] * 3, [0.0, 0.0, 0.1]):
        cell = [[5.0, 0.0, 0.0], [0.0, 6.0, 0.0], third]
        found = neighbor_list(positions, cell, [True, True, False], 5.0)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        atoms = Atoms("H12", positions, cell=cell, pbc=[True, True, False])
        assert graph_inputs(atoms, ["H"], 5.0, 1, "float64")[keys.EDGE_VECTORS].isfinite().all()


def test_pairs_at_the_cutoff_are_outside():
    positions = [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    for cutoff, expected in [(2.0, 0), (np.nextafter(2.0, 3.0), 2)]:
        edge_index, _ = neighbor_list(positions, np.zeros((3, 3)), False, cutoff)
        assert edge_index.shape == (2, expected)


def test_one_atom_sees_its_own_images():
    edge_index, shifts = neighbor_list([[0.3, 0.2, 0.1]], np.eye(3) * 2.0, True, 2.1)
    assert edge_index.tolist() == [[0] * 6, [0] * 6]
    assert sorted(np.abs(shifts).sum(axis=1).tolist()) == [1] * 6


@pytest.mark.parametrize("pbc", [True, False])
def test_zero_atoms_and_isolated_atoms_have_no_edges(pbc):
    for positions in (np.zeros((0, 3)), [[0.0, 0.0, 0.0], [0.0, 0.0, 20.0]]):
        edge_index, shifts = neighbor_list(positions, np.eye(3) * 50.0, pbc, 5.0)
        assert edge_index.shape == (2, 0) and edge_index.dtype == np.int64
        assert shifts.shape == (0, 3) and shifts.dtype == np.int64


def test_edges_of_a_supercell_are_those_of_the_unit_cell_repeated():
    atoms = bulk("Si")
    atoms.rattle(0.1, seed=1)
    unit, _ = neighbor_list(atoms.positions, atoms.cell, True, 5.0)
    big = atoms.repeat((2, 3, 1))
    repeated, _ = neighbor_list(big.positions, big.cell, True, 5.0)
    assert repeated.shape[1] == 6 * unit.shape[1]


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.zeros((3, 3)), True),
        (np.diag([5.0, 0.0, 5.0]), [True, True, False]),
        (np.array([[5.0, 0, 0], [10.0, 0, 0], [0, 0, 5.0]]), True),
        (np.array([[5.0, 0, 0], [10.0, 0, 0], [0, 0, 0]]), [True, True, False]),
        (np.diag([5.0, np.nan, 5.0]), True),
    ],
)
def test_periodic_cell_without_volume_is_refused(cell, pbc):
    with pytest.raises(ValueError, match="no volume"):
        periodic_cell(cell, pbc)


def test_bad_positions_and_cutoff_are_refused():
    with pytest.raises(ValueError, match=r"atoms \[1\] .* not finite"):
        neighbor_list([[0, 0, 0], [0, np.inf, 0]], np.eye(3), False, 5.0)
    with pytest.raises(ValueError, match="cutoff must be positive"):
        neighbor_list([[0, 0, 0]], np.eye(3), False, 0.0)


def test_unknown_elements_are_named():
    assert species_indices([8, 14, 8], ["Si", "O"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"element H, C is unknown to the model; it knows Si, O"):
        species_indices([14, 6, 1], ["Si", "O"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_graph_inputs_have_the_shapes_and_dtypes_of_keys(dtype):
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=2)
    inputs = graph_inputs(atoms, ["O", "Si"], 4.0, 2, dtype)
    edge_index, shifts = neighbor_list(atoms.positions, atoms.cell, atoms.pbc, 4.0)
    assert list(inputs) == [
        keys.SPECIES,
        keys.EDGE_INDEX,
        keys.EDGE_VECTORS,
        keys.LAYER_NODES,
        keys.LAYER_EDGES,
    ]
    assert inputs[keys.SPECIES].tolist() == [1] * 8
    assert inputs[keys.EDGE_INDEX].tolist() == edge_index.tolist()
    assert inputs[keys.LAYER_NODES].tolist() == [8, 8]
    assert inputs[keys.LAYER_EDGES].tolist() == [edge_index.shape[1]] * 2
    vectors = edge_vectors(atoms.positions, atoms.cell.array, edge_index, shifts)
    assert inputs[keys.EDGE_VECTORS].dtype == getattr(torch, dtype)
    # one rounding to the model's dtype of numbers up to 4 Å, nothing else
    tolerance = 4.0 * torch.finfo(getattr(torch, dtype)).eps
    assert np.abs(inputs[keys.EDGE_VECTORS].double().numpy() - vectors).max() <= tolerance
    assert np.linalg.norm(vectors, axis=1).max() < 4.0


def test_graph_inputs_of_a_molecule_and_of_nothing():
    water = graph_inputs(molecule("H2O"), ["H", "O"], 5.0, 1, "float64")
    assert water[keys.SPECIES].tolist() == [1, 0, 0]
    assert water[keys.EDGE_INDEX].shape == (2, 6)
    nothing = graph_inputs(Atoms(), ["H", "O"], 5.0, 1, "float64")
    assert nothing[keys.SPECIES].shape == (0,) and nothing[keys.EDGE_VECTORS].shape == (0, 3)
    assert nothing[keys.LAYER_NODES].tolist() == nothing[keys.LAYER_EDGES].tolist() == [0]
