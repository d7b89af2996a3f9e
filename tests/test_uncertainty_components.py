"""Histograms of force-error components: the sphere's logits, their symmetry, and plain x/y/z."""

import copy
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CUTOFF, ELEMENTS, make_card, make_structure
from scipy.integrate import lebedev_rule
from scipy.spatial.transform import Rotation
from test_uncertainty_posthoc import assert_compiled_gives_the_same, dataset, with_methods
from torch.fx.experimental.proxy_tensor import make_fx

from lmp_hl import histogram, keys, model_file
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import invariants
from lmp_hl.training.calibrate import calibrate, collect_atoms, recalibrate
from lmp_hl.uncertainty import Sizes, spherical
from lmp_hl.uncertainty.spherical import BIN_WIDTH, NUM_BINS, REACH, SIGMA, WIDTHS, SphericalLogits

NAMES = ("spherical", "xyz")
FIELDS = [
    keys.SPHERICAL_FORCE_STD,
    keys.SPHERICAL_FORCE_ENTROPY,
    keys.XYZ_FORCE_STD,
    keys.XYZ_FORCE_ENTROPY,
]
# the same sums in another order, through a whitening of condition numbers up to 1e6
EXACT = 1e-8


def inputs_of(structure, layers=1):
    return graph_inputs(structure, ELEMENTS[:2], CUTOFF, layers, "float64")


def evaluate(potential, structure):
    found = potential(inputs_of(structure), True)
    return {name: found[name].detach() for name in FIELDS}


def fields_of(potential, atoms):
    edges = atoms.edge_index, atoms.edge_weights
    return potential.fields(atoms.features, atoms.energy, atoms.species, *edges)


def true_covariances(method, atoms):
    """Covariances that errors are drawn with: degree-2 features say which way they are long.

    In proportion to the method's feature distance, and larger for the second element.
    """
    tensors = atoms.features.tensors[4:9].sum(2).T  # (num_atoms, 5)
    g = (tensors @ method.cartesian.T).reshape(-1, 3, 3)
    g = 1.2 * g / g.square().sum((1, 2), keepdim=True).sqrt()
    size = 0.1 * (1.0 + atoms.species) * method.distance(invariants(atoms.features), atoms.species)
    return size.square()[:, None, None] * torch.linalg.matrix_exp(g)


@pytest.fixture(scope="module")
def fitted():
    """Potential with both methods, its training and its validation atoms, what the fits said."""
    potential = with_methods(names=NAMES)
    seen, held = (collect_atoms(potential, dataset(n, seed=k)) for k, n in enumerate((12, 36)))
    first, *_ = methods = potential.uncertainty_methods()
    first.distance.fit(seen)
    first.distance.set_unit(held)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(held.errors.shape, generator=generator, dtype=torch.float64)
    root = torch.linalg.cholesky(true_covariances(first, held))
    held = held._replace(errors=torch.matmul(root, noise.unsqueeze(2)).squeeze(2))
    said = {}
    for method in methods:
        said |= method.fit(seen, held)
    return potential, seen, held, said


@pytest.fixture(scope="module")
def sphere(fitted):
    return fitted[0].methods["spherical"]


# symmetry ---------------------------------------------------------------------------------------
def test_spherical_fields_do_not_change_when_the_structure_is_turned_and_xyz_do(fitted):
    """The control is a control: the root mean square over its axes is no invariant."""
    potential, changes = fitted[0], {name: 0.0 for name in FIELDS}
    atoms = make_structure(ELEMENTS[:2], 20, pbc=False, seed=77)
    before = evaluate(potential, atoms)
    for seed in range(5):
        matrix = Rotation.random(rng=seed).as_matrix() * (-1) ** seed
        turned = atoms.copy()
        turned.positions = atoms.positions @ matrix.T
        for name, after in evaluate(potential, turned).items():
            assert after.shape == (20,)
            change = float((after / before[name] - 1.0).abs().max())
            changes[name] = max(changes[name], change)
    assert changes[keys.SPHERICAL_FORCE_STD] < 1e-6
    assert changes[keys.SPHERICAL_FORCE_ENTROPY] < 1e-6
    assert 0.02 < changes[keys.XYZ_FORCE_STD] < 1.0


def test_logits_turn_with_the_structure_and_mirror_along_the_opposite_direction(fitted, sphere):
    potential = fitted[0]
    atoms = make_structure(ELEMENTS[:2], 9, pbc=False, seed=7)
    directions = torch.from_numpy(Rotation.random(4, rng=1).as_matrix()[:, 0].copy())

    def logits(structure, n):
        features = potential.backbone(inputs_of(structure))
        return sphere.coefficients(features, n) @ sphere.functions

    before = logits(atoms, directions)
    assert float((before - before.mean(1, keepdim=True)).abs().max()) > 0.3  # along n it matters
    torch.testing.assert_close(logits(atoms, -directions), before.flip(2), rtol=1e-10, atol=1e-10)
    for matrix in (Rotation.random(rng=5).as_matrix(), -Rotation.random(rng=6).as_matrix()):
        turned = atoms.copy()
        turned.positions = atoms.positions @ matrix.T
        found = logits(turned, directions @ torch.from_numpy(matrix).T)
        # constants of the methods are rounded to float32
        torch.testing.assert_close(found, before, rtol=1e-6, atol=1e-6)


def test_rule_is_half_of_lebedevs_and_good_for_all_logits_within_their_bounds():
    torch.manual_seed(0)
    head = SphericalLogits(Sizes(6, 3, 2, 1)).double().requires_grad_(False)
    points, weights = spherical._half_sphere()
    whole, their_weights = lebedev_rule(17)
    assert whole.shape == (3, 110) and points.shape == (55, 3)
    both = np.concatenate([points, -points])
    distances = np.linalg.norm(both[:, None] - whole.T, axis=2)
    assert (distances.min(0) < 1e-12).all()
    nearest = their_weights[distances.argmin(1)]
    np.testing.assert_allclose(torch.cat([weights, weights]), nearest, rtol=1e-12)

    fine = [torch.from_numpy(x) for x in lebedev_rule(59)]  # 1202 points
    head.directions, head.weights = points, weights / weights.sum()
    n, number = 300, len(WIDTHS)
    alpha = torch.tensor([0.5, -2.0, 0.0]) - torch.arange(n).reshape(-1, 1) % 5 * 4.0
    alpha = alpha + REACH * torch.sign(torch.randn(n, number))

    def bounded(*shape):
        x = torch.randn(shape, dtype=torch.float64)
        x[: n // 2] = x[: n // 2, :, :1] * torch.randn(n // 2, 1, number)  # all along one axis
        return spherical.shortened(1e6 * x, 0.5 * REACH)

    beta, gamma = bounded(n, 3, number), bounded(n, 5, number)

    def mean_square(directions, weights):
        even = alpha.unsqueeze(1) + head.harmonics(directions) @ gamma
        logits = torch.cat([even, directions @ beta], 2) @ head.functions
        squares = torch.softmax(logits, 2) @ head.centers.square()
        return squares @ (weights / weights.sum()), squares

    rough, _ = mean_square(points, weights)
    exact, squares = mean_square(fine[0].T, fine[1])
    assert float((squares.amax(1) / squares.amin(1)).max()) > 3.0  # far from a sphere
    assert float((rough / exact - 1.0).abs().max()) < 2e-6  # of the square


# what is fitted ---------------------------------------------------------------------------------
def test_errors_of_known_covariance_are_found_along_every_direction(fitted, sphere):
    potential, *_, said = fitted
    fresh = collect_atoms(potential, dataset(10, seed=2))
    truth = true_covariances(sphere, fresh)
    found = sphere.second_moments(fresh.features, fresh.species)
    std = fields_of(potential, fresh)[keys.SPHERICAL_FORCE_STD]
    trace = found.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close((trace / 3).sqrt(), std, rtol=1e-6, atol=0)
    log_ratio = 0.5 * torch.log(trace / truth.diagonal(dim1=1, dim2=2).sum(1))
    assert float(log_ratio.mean().abs()) < 0.1 and float(log_ratio.std()) < 0.15
    eye = torch.eye(3, dtype=torch.float64)
    shapes = [
        (3 * s / s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] - eye) for s in (truth, found)
    ]
    overlap = (shapes[0] * shapes[1]).sum() / (shapes[0].norm() * shapes[1].norm())
    assert float(overlap) > 0.9  # 1: the same ellipsoids but for how long they are
    assert said["spherical_penalty"] < 1.0  # cross-validation saw that features matter
    assert said["spherical_raw_size_ratio"] == pytest.approx(1.0, abs=0.1)
    assert said["spherical_rank_correlation"] > 0.3


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_cross_entropy_with_hl_gauss_targets(fitted, name):
    potential, _, held, _ = fitted
    method = potential.methods[name]
    directions = method.training_directions(len(held.species))
    assert directions.shape == (720, 6 if name == "spherical" else 3, 3)
    triads = directions.reshape(720, -1, 3, 3)
    eye = torch.eye(3, dtype=torch.float64).expand_as(triads)
    torch.testing.assert_close(triads @ triads.transpose(2, 3), eye, rtol=1e-12, atol=1e-12)

    unit = method.unit(held.features, held.species)
    y = torch.einsum("idx,ix->id", directions, held.errors) / unit[:, None]
    edges = histogram.uniform_edges(NUM_BINS, BIN_WIDTH)
    targets = histogram.hl_gauss(y, edges, torch.full_like(y, SIGMA * BIN_WIDTH))
    logits = method.coefficients(held.features, directions) @ method.functions
    expected = histogram.cross_entropy(targets, logits).mean()
    found = method._cross_entropy(held.features, directions, targets @ method.functions.T)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_size_is_that_of_the_validation_errors_and_entropy_of_their_density(fitted, name):
    potential, _, held, _ = fitted
    fields = fields_of(potential, held)
    std, entropy = fields[f"{name}_force_std"], fields[f"{name}_force_entropy"]
    ratio = (std.square().mean() / held.errors.square().mean()).sqrt()
    assert float(ratio) == pytest.approx(1.0, rel=1e-9)
    # of all densities of that variance the normal has the largest entropy; bins add w^2 / 12
    bound = torch.log(std) + 0.5 * np.log(2 * np.pi * np.e)
    assert bool((entropy < bound + 0.02).all()) and bool((entropy > bound - 0.5).all())


def test_marginals_belong_to_no_vector(fitted, sphere):
    """No S has n^T S n as the second moments; `second_moments` is the nearest one."""
    _, _, held, _ = fitted
    atoms = held.rows(torch.arange(50))
    directions = torch.from_numpy(lebedev_rule(29)[0].T.copy())
    weights = torch.from_numpy(lebedev_rule(29)[1])
    logits = sphere.coefficients(atoms.features, directions) @ sphere.functions
    unit = sphere.unit(atoms.features, atoms.species)
    squares = (torch.softmax(logits, 2) @ sphere.centers.square()) * unit.square()[:, None]
    columns = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 1], [0, 2], [1, 2]])
    pairs = directions[:, columns[:, 0]] * directions[:, columns[:, 1]]
    pairs[:, 3:] *= 2.0
    root = weights.sqrt()[:, None]
    nearest = torch.linalg.lstsq(root * pairs, root * squares.T).solution.T
    found = sphere.second_moments(atoms.features, atoms.species)
    found = found[:, columns[:, 0], columns[:, 1]]
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-7)
    left = (squares - nearest @ pairs.T).abs().amax(1) / squares.mean(1)
    assert float(left.max()) > 1e-3


def test_without_frames_to_compare_or_tensors_to_read_there_is_one_shape(fitted):
    _, seen, held, _ = fitted
    potential = with_methods(names=NAMES)
    one = held.rows(torch.nonzero(held.frame == 0).squeeze(1))
    one = one._replace(energy_errors=one.energy_errors[:1])
    one = one._replace(features=one.features._replace(tensors=0.0 * one.features.tensors))
    for method in potential.uncertainty_methods():
        said = method.fit(seen, one)
        assert said[f"{method.NAME}_penalty"] == spherical.PENALTIES[0]
    for values in fields_of(potential, one).values():
        assert bool(torch.isfinite(values).all()) and float(values.std()) > 0


def test_errors_beyond_the_support_are_counted(fitted, monkeypatch):
    monkeypatch.setattr(spherical, "PENALTIES", spherical.PENALTIES[:1])
    _, seen, held, said = fitted
    assert said["xyz_outside"] == 0
    errors = held.errors.clone()
    errors[3] = 1e3
    (method,) = with_methods(names=("xyz",)).uncertainty_methods()
    said = method.fit(seen, held._replace(errors=errors))
    assert said["xyz_outside"] == pytest.approx(3 / (3 * 720))


# in use -----------------------------------------------------------------------------------------
def test_fields_travel_in_the_model_file_and_are_calibrated_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(spherical, "PENALTIES", (1.0, 1e-2))
    potential = with_methods("mp", names=NAMES)
    train, valid = dataset(5, layers=2), dataset(4, seed=1, layers=2)
    summary = calibrate(potential, train, valid)
    assert set(FIELDS) <= set(summary["ranking"])
    card = make_card()
    del card["calibration"]["size_ratio"]  # nothing but `scales` says one
    path = export_potential(potential, ELEMENTS[:2], card, tmp_path / "hl.pt")
    model = model_file.load(path)
    units = dict(zip(model.fields, model.field_units, strict=True))
    assert [units[name] for name in FIELDS] == ["eV/Angstrom", "nat"] * 2
    for structure in (
        make_structure(ELEMENTS[:2], 11, seed=3),
        make_structure(ELEMENTS[:1], 1, pbc=False),
        make_structure(ELEMENTS[:1], 1)[:0],
    ):
        inputs = inputs_of(structure, 2)
        eager, read = potential(inputs, True), model.evaluate(inputs)
        for name in FIELDS:
            assert read[name].shape == (len(structure),)
            assert torch.isfinite(read[name]).all()
            torch.testing.assert_close(read[name], eager[name].detach(), rtol=EXACT, atol=EXACT)

    from ase import Atoms as Structure
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    frames = []
    for frame in valid.frames:
        atoms = Structure(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
        atoms.calc = SinglePointCalculator(atoms, energy=frame.energy, forces=30 * frame.forces)
        frames.append(atoms)
    write(tmp_path / "other.xyz", frames)
    said = recalibrate(path, tmp_path / "other.xyz", tmp_path / "new.pt")["calibration"]
    larger = said["force_rmse"]
    assert larger > 2 * summary["force_rmse"]
    new = model_file.load(tmp_path / "new.pt")
    found = [new.evaluate(inputs_of(atoms, 2)) for atoms in frames]
    for name in (keys.SPHERICAL_FORCE_STD, keys.XYZ_FORCE_STD):
        std = torch.cat([of_one[name] for of_one in found])
        assert float(std.square().mean().sqrt()) == pytest.approx(larger, rel=1e-6)


def test_numbers_of_atoms_stay_symbols_when_the_fields_are_traced(fitted):
    """What exporting a compiled model does first, without the minutes that the rest takes."""
    potential, _, held, _ = fitted

    def fields(scalars, tensors, species, *edges):
        energy = potential.energy_head(scalars, species)
        out = potential.fields(Features(scalars, tensors), energy, species, *edges)
        return tuple(out[name] for name in FIELDS)

    def inputs(number):
        atoms = held.rows(torch.arange(number))
        edges = atoms.edge_index, atoms.edge_weights
        return atoms.features.scalars, atoms.features.tensors, atoms.species, *edges

    traced = make_fx(fields, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs(40))
    for value, expected in zip(traced(*inputs(7)), fields(*inputs(7)), strict=True):
        torch.testing.assert_close(value, expected, rtol=EXACT, atol=EXACT)
    assert [len(value) for value in traced(*inputs(0))] == [0] * len(FIELDS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs g++")
def test_compiled_model_gives_the_same_fields(fitted, tmp_path):
    assert_compiled_gives_the_same(fitted[0], FIELDS, tmp_path)


def test_float32_keeps_the_fields_and_gradients_reach_the_positions(fitted):
    potential, _, held, _ = fitted
    atoms = held.rows(torch.arange(60))
    exact = fields_of(potential, atoms)
    single = copy.deepcopy(potential).float()
    features = Features(*(x.float() for x in atoms.features))
    energy = type(atoms.energy)(*(x.float() for x in atoms.energy))
    weights = atoms.edge_weights.float()
    found = fields_of(
        single, atoms._replace(features=features, energy=energy, edge_weights=weights)
    )
    inputs = inputs_of(make_structure(ELEMENTS[:2], 9, seed=4))
    vectors = inputs[keys.EDGE_VECTORS].requires_grad_(True)
    out = potential(inputs, True, True)
    for name in FIELDS:
        assert found[name].dtype == torch.float32
        # rounding of features (6e-8) times the largest whitening factor, about 1e3
        torch.testing.assert_close(found[name].double(), exact[name], rtol=2e-4, atol=2e-4)
        (gradient,) = torch.autograd.grad(out[name].sum(), vectors, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
