"""Density, D-optimality grade and last-layer rigidity: their formulas, limits and promises."""

import copy
import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from ase import Atoms as Structure
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from conftest import CUTOFF, ELEMENTS, make_card, make_potential, make_structure
from torch.fx.experimental.proxy_tensor import make_fx

from lmp_hl import keys, model_file
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import invariants
from lmp_hl.predictions import predict
from lmp_hl.training import frames as fr
from lmp_hl.training.calibrate import calibrate, collect_atoms, recalibrate
from lmp_hl.training.config import ModelConfig
from lmp_hl.uncertainty import Sizes, density, grade, llpr, make_methods, per_element

NAMES = ("density", "grade", "llpr")
FIELDS = [
    keys.LATENT_NLL,
    keys.DENSITY_FORCE_STD,
    keys.EXTRAPOLATION_GRADE,
    keys.LLPR_ENERGY_STD,
    keys.LLPR_FORCE_STD,
]
# sums of the same numbers in another order, through matrices with condition numbers up to 1e6
EXACT = 1e-8


def with_methods(preset="local", head="hlgauss", names=NAMES):
    """A random potential that carries unfitted methods."""
    potential = copy.deepcopy(make_potential(preset, head, num_elements=2))
    many_body = potential.backbone.many_body
    sizes = Sizes(
        num_scalars=many_body.out.out_features,
        channels=potential.backbone.element_density.mix.weight.shape[2],
        l_max=many_body.l_out,
        num_elements=2,
        num_bins=32 if head == "hlgauss" else 0,
    )
    potential.methods = make_methods(names, sizes).double()
    potential.shared = [[], *(list(m.SHARED) for m in potential.uncertainty_methods())]
    return potential.requires_grad_(False).eval()


def dataset(num_frames, num_atoms=20, seed=0, elements=ELEMENTS[:2], layers=1):
    """Frames with random labels."""
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(num_frames):
        atoms = make_structure(elements, num_atoms, seed=1000 * seed + k)
        frames.append(
            fr.Frame(
                positions=atoms.positions,
                numbers=atoms.numbers,
                cell=np.asarray(atoms.cell),
                pbc=atoms.pbc,
                energy=float(rng.normal()),
                forces=rng.normal(size=(num_atoms, 3)),
                stress=None,
                source=f"frame {k}",
                config_type="",
            )
        )
    references = dict.fromkeys(ELEMENTS[:2], 0.0)
    return fr.GraphDataset(frames, ELEMENTS[:2], references, CUTOFF, layers, "float64")


@pytest.fixture(scope="module")
def fitted():
    """Potential with fitted methods, its training and its validation atoms, what the fits said."""
    potential = with_methods()
    seen, held = collect_atoms(potential, dataset(12)), collect_atoms(potential, dataset(6, seed=1))
    said = {}
    for method in potential.uncertainty_methods():
        said |= method.fit(seen, held)
    return potential, seen, held, said


def fields_of(potential, atoms):
    edges = atoms.edge_index, atoms.edge_weights
    return potential.fields(atoms.features, atoms.energy, atoms.species, *edges)


def evaluate(potential, structure, layers=1):
    inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, layers, "float64")
    return {name: value for name, value in potential(inputs, True).items() if name in FIELDS}


def assert_compiled_gives_the_same(potential, names, folder):
    """Fields of compiled and of eager code, also of no atoms."""
    from lmp_hl.compile import export_compiled

    path = export_compiled(potential, ELEMENTS[:2], make_card(), folder / "hl.pt2")
    model = model_file.load(path)
    for structure in (
        make_structure(ELEMENTS[:2], 11, seed=3),
        make_structure(ELEMENTS[:1], 1)[:0],
    ):
        inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, 1, "float64")
        eager, read = potential(inputs, True), model.evaluate(inputs)
        for name in names:
            torch.testing.assert_close(read[name], eager[name].detach(), rtol=EXACT, atol=EXACT)


def atoms_of(potential, structures):
    graphs = []
    for structure in structures:
        graph = graph_inputs(structure, ELEMENTS[:2], CUTOFF, 1, "float64")
        graph[fr.NUM_ATOMS] = torch.tensor([len(structure)])
        graph[fr.TARGET_FORCES] = torch.zeros(len(structure), 3)
        graph[fr.TARGET_ENERGY] = torch.zeros(1)
        graphs.append(graph)
    return collect_atoms(potential, graphs)


# laws of every field ----------------------------------------------------------------------------
def test_fields_do_not_change_when_the_structure_is_turned_moved_or_relabelled(fitted):
    potential = fitted[0]
    atoms = make_structure(ELEMENTS[:2], 20, pbc=False, seed=77)
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # with or without inversion
    order = rng.permutation(len(atoms))
    moved = Structure(atoms.symbols, atoms.positions @ turn.T + [3.0, -1.0, 8.0])[order]
    before, after = evaluate(potential, atoms), evaluate(potential, moved)
    assert set(before) == set(FIELDS)
    for name in FIELDS:
        torch.testing.assert_close(after[name], before[name][order], rtol=1e-6, atol=1e-6)


def test_an_atom_does_not_know_of_atoms_beyond_the_cutoff(fitted):
    potential = fitted[0]
    one = make_structure(ELEMENTS[:2], 9, pbc=False, seed=5)
    far = one.copy()
    far.translate([100.0, 0.0, 0.0])
    alone, together = evaluate(potential, one), evaluate(potential, one + far)
    for name in FIELDS:
        torch.testing.assert_close(together[name][:9], alone[name], rtol=EXACT, atol=EXACT)


def test_fields_grow_without_bound_away_from_the_data_and_sizes_in_proportion(fitted):
    potential, _, held, _ = fitted
    start = held.rows(torch.arange(8))
    torch.manual_seed(0)
    along = torch.randn_like(start.features.scalars)
    values = []
    for t in (10.0, 100.0, 1000.0, 2000.0):
        features = Features(start.features.scalars + t * along, start.features.tensors)
        energy = potential.energy_head(features.scalars, start.species)
        values.append(fields_of(potential, start._replace(features=features, energy=energy)))
    near = fields_of(potential, start)
    for name in FIELDS:
        chain = [near[name], *(v[name] for v in values)]
        assert all((b > a).all() for a, b in itertools.pairwise(chain)), name
    for name in (keys.DENSITY_FORCE_STD, keys.LLPR_FORCE_STD, keys.EXTRAPOLATION_GRADE):
        # silu keeps a bounded part that does not grow, hence not exactly 2
        assert values[3][name] / values[2][name] == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("preset", ["local", "mp"])
@pytest.mark.parametrize("head", ["hlgauss", "scalar"])
def test_fields_travel_in_the_model_file_with_their_units(preset, head, tmp_path):
    potential = with_methods(preset, head)
    layers = 1 if preset == "local" else 2
    train, valid = dataset(5, layers=layers), dataset(3, seed=1, layers=layers)
    summary = calibrate(potential, train, valid)
    assert set(FIELDS) <= set(summary["ranking"]) and "llpr_alpha" in summary
    assert "largest" not in summary  # three frames promise nothing
    card = make_card(head)
    del card["calibration"]["size_ratio"]  # nothing but `scales` says one
    path = export_potential(potential, ELEMENTS[:2], card, tmp_path / "hl.pt")
    model = model_file.load(path)
    units = dict(zip(model.fields, model.field_units, strict=True))
    assert [units[name] for name in FIELDS] == ["nat", "eV/Angstrom", "1", "eV", "eV/Angstrom"]
    assert "18 validation atoms\n" in model_file.describe(path)
    for structure in (
        make_structure(ELEMENTS[:2], 11, seed=3),
        make_structure(ELEMENTS[:1], 1, pbc=False),
        make_structure(ELEMENTS[:1], 1)[:0],
    ):
        inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, layers, "float64")
        eager, read = potential(inputs, True), model.evaluate(inputs)
        for name in FIELDS:
            assert read[name].shape == (len(structure),)
            assert torch.isfinite(read[name]).all()
            torch.testing.assert_close(read[name], eager[name].detach(), rtol=EXACT, atol=EXACT)
    found = predict(model, valid.frames).energy_std
    atoms = collect_atoms(potential, valid)
    expected = potential.methods["llpr"].frame_energy_std(atoms)
    assert list(found) == [keys.LLPR_ENERGY_STD]  # of frames, not from squares of the atoms'
    np.testing.assert_allclose(found[keys.LLPR_ENERGY_STD], expected, rtol=EXACT)


def test_numbers_of_atoms_stay_symbols_when_the_fields_are_traced(fitted):
    """What exporting a compiled model does first, without the minutes that the rest takes."""
    potential, _, held, _ = fitted

    def fields(scalars, tensors, species, *edges):
        energy = potential.energy_head(scalars, species)
        out = potential.fields(Features(scalars, tensors), energy, species, *edges)
        return tuple(out[name] for name in FIELDS)

    def inputs(atoms):
        edges = atoms.edge_index, atoms.edge_weights
        return atoms.features.scalars, atoms.features.tensors, atoms.species, *edges

    traced = make_fx(fields, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs(held))
    sixty, none = torch.arange(60), torch.arange(0)
    for atoms in (held.rows(sixty), held.rows(torch.nonzero(held.species).squeeze(1)[:7])):
        found = traced(*inputs(atoms))
        for value, expected in zip(found, fields(*inputs(atoms)), strict=True):
            torch.testing.assert_close(value, expected, rtol=EXACT, atol=EXACT)
    assert [len(value) for value in traced(*inputs(held.rows(none)))] == [0] * len(FIELDS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs g++")
def test_compiled_model_gives_the_same_fields(fitted, tmp_path):
    assert_compiled_gives_the_same(fitted[0], FIELDS, tmp_path)


def test_float32_keeps_the_fields(fitted):
    potential, _, held, _ = fitted
    single = copy.deepcopy(potential).float()
    exact = fields_of(potential, held)
    features = Features(*(x.float() for x in held.features))
    energy = type(held.energy)(*(x.float() for x in held.energy))
    weights = held.edge_weights.float()
    rounded = held._replace(features=features, energy=energy, edge_weights=weights)
    for name, value in fields_of(single, rounded).items():
        assert value.dtype == torch.float32
        # rounding of features (6e-8) times the largest whitening factor, about 1e3
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-4, atol=2e-3)


def test_gradients_reach_the_positions_through_every_field(fitted):
    potential = fitted[0]
    structure = make_structure(ELEMENTS[:2], 9, seed=4)
    inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, 1, "float64")
    vectors = inputs[keys.EDGE_VECTORS].requires_grad_(True)
    out = potential(inputs, True, True)
    for name in FIELDS:
        (gradient,) = torch.autograd.grad(out[name].sum(), vectors, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


# bad or thin data -------------------------------------------------------------------------------
@pytest.mark.parametrize("num_atoms", [0, 1, 2, 5])
def test_element_with_few_training_atoms_or_none_gets_finite_numbers(num_atoms):
    potential = with_methods()
    seen, held = collect_atoms(potential, dataset(4)), collect_atoms(potential, dataset(3, seed=1))
    second = torch.nonzero(seen.species == 1).squeeze(1)
    seen = seen.rows(torch.cat([torch.nonzero(seen.species == 0).squeeze(1), second[:num_atoms]]))
    for method in potential.uncertainty_methods():
        method.fit(seen, held.rows(torch.nonzero(held.species == 0).squeeze(1)))
    for buffer in potential.methods.state_dict().values():
        assert torch.isfinite(buffer).all()
    for values in fields_of(potential, held).values():
        assert torch.isfinite(values).all()


def test_constant_features_are_no_division_by_zero(fitted):
    potential = with_methods()
    _, seen, held, _ = fitted

    def constant(atoms):
        scalars = torch.full_like(atoms.features.scalars, 0.3)
        energy = potential.energy_head(scalars, atoms.species)
        features = Features(scalars, torch.zeros_like(atoms.features.tensors))
        return atoms._replace(features=features, energy=energy)

    for method in potential.uncertainty_methods():
        method.fit(constant(seen), constant(held))
    same, other = fields_of(potential, constant(held)), fields_of(potential, held)
    for name in FIELDS:
        assert torch.isfinite(same[name]).all() and torch.isfinite(other[name]).all()
    assert (other[keys.LATENT_NLL] > same[keys.LATENT_NLL]).all()
    assert (other[keys.EXTRAPOLATION_GRADE] > same[keys.EXTRAPOLATION_GRADE]).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_atoms_and_features_that_are_not_finite_are_refused(fitted, name):
    _, seen, held, _ = fitted
    method = with_methods(names=(name,)).uncertainty_methods()[0]
    with pytest.raises(ValueError, match="needs atoms"):
        method.fit(seen.rows(torch.zeros(0, dtype=torch.int64)), held)
    scalars = seen.features.scalars.clone()
    scalars[3] = torch.nan
    broken = seen._replace(features=seen.features._replace(scalars=scalars))
    with pytest.raises(ValueError, match="features of 1 of 240 atoms are not finite"):
        method.fit(broken, held)


def test_rigidity_of_a_committee_is_refused():
    with pytest.raises(ValueError, match=r"model.head must be hlgauss or scalar with .* llpr"):
        ModelConfig(head="committee", uncertainty=("scales", "llpr"))


def test_calibrating_anew_changes_sizes_and_nothing_else(fitted):
    potential, _, held, _ = fitted
    potential = copy.deepcopy(potential)
    before = fields_of(potential, held)
    errors, energy_errors = 3.0 * held.errors, 5.0 * held.energy_errors
    for method in potential.uncertainty_methods():
        method.calibrate(held._replace(errors=errors, energy_errors=energy_errors))
    after = fields_of(potential, held)
    factors = (1.0, 3.0, 1.0, 5.0, 3.0)
    for name, factor in zip(FIELDS, factors, strict=True):
        torch.testing.assert_close(after[name], factor * before[name], rtol=1e-9, atol=1e-9)


def test_model_file_is_calibrated_anew_to_other_frames(fitted, tmp_path):
    potential = fitted[0]
    path = export_potential(potential, ELEMENTS[:2], make_card(), tmp_path / "hl.pt")
    frames = []
    for graph_frame in dataset(5, seed=2).frames:
        atoms = Structure(
            graph_frame.numbers, graph_frame.positions, cell=graph_frame.cell, pbc=graph_frame.pbc
        )
        atoms.calc = SinglePointCalculator(
            atoms, energy=graph_frame.energy, forces=graph_frame.forces
        )
        frames.append(atoms)
    write(tmp_path / "other.xyz", frames)
    said = recalibrate(path, tmp_path / "other.xyz", tmp_path / "new.pt")["calibration"]
    assert set(FIELDS) <= set(said["ranking"]) and "llpr_alpha" in said
    structure = make_structure(ELEMENTS[:2], 11, seed=3)
    inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, 1, "float64")
    old, new = (model_file.load(p).evaluate(inputs) for p in (path, tmp_path / "new.pt"))
    assert torch.equal(old[keys.EXTRAPOLATION_GRADE], new[keys.EXTRAPOLATION_GRADE])
    ratio = new[keys.LLPR_ENERGY_STD] / old[keys.LLPR_ENERGY_STD]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0])))
    assert abs(float(ratio[0]) - 1.0) > 1e-3


def test_error_scale_gives_the_mean_square_error_of_each_element_with_enough_atoms():
    torch.manual_seed(0)
    species = torch.tensor([0] * 100000 + [1])
    size = torch.rand(len(species), dtype=torch.float64) + 0.5
    errors = torch.randn(len(species), 3, dtype=torch.float64) * (0.2 * size).unsqueeze(1)
    errors[-1] = 1e3  # one atom alone decides nothing
    scale = per_element.error_scale(size, errors, species, 3)
    assert scale[0] == pytest.approx(0.2, rel=0.05)
    pooled = (errors.square().mean() / size.square().mean()).sqrt()
    assert scale[2] == pytest.approx(float(pooled))
    own = float(errors[-1].square().mean().sqrt() / size[-1])
    prior = per_element.PRIOR_ATOMS
    expected = np.exp((np.log(own) + prior * np.log(float(pooled))) / (1 + prior))
    assert scale[1] == pytest.approx(expected)


# density ----------------------------------------------------------------------------------------
def test_density_is_that_of_the_mixture(fitted):
    from sklearn.mixture import GaussianMixture

    potential, seen, held, said = fitted
    found = fields_of(potential, held)[keys.LATENT_NLL]
    for element, count in enumerate(said["latent_components"]):
        assert 1 <= count <= density.COMPONENTS
        rows = invariants(seen.features)[seen.species == element].numpy()
        axes = per_element.principal_axes(rows)

        def whiten(x, axes=axes):
            return ((x - axes.mean) / axes.scale) @ axes.axes / axes.std

        mixture = GaussianMixture(count, reg_covar=1e-3, random_state=density.SEED)
        mixture.fit(whiten(rows))
        chosen = held.species == element
        expected = -mixture.score_samples(whiten(invariants(held.features)[chosen].numpy()))
        expected -= 0.5 * np.log(2 * np.pi) * rows.shape[1]  # the constant that a median removes
        lower_median = np.sort(expected)[(len(expected) - 1) // 2]
        np.testing.assert_allclose(
            found[chosen].numpy(), expected - lower_median, rtol=EXACT, atol=1e-7
        )


def test_density_sees_what_its_axes_leave_out(fitted, monkeypatch):
    monkeypatch.setattr(density, "COLUMNS", 4)
    potential = with_methods(names=("density",))
    _, seen, held, _ = fitted
    (method,) = potential.uncertainty_methods()
    method.fit(seen, held)
    x = invariants(held.features)[held.species == 0]
    axes = per_element.principal_axes(invariants(seen.features)[seen.species == 0].numpy())
    axis = torch.from_numpy(axes.scale * axes.axes[:, -1])
    t = (x - torch.from_numpy(axes.mean)) / torch.from_numpy(axes.scale)
    before = (t @ torch.from_numpy(axes.axes[:, -1])).square()
    after = (t @ torch.from_numpy(axes.axes[:, -1]) + 3.0).square()
    rest = np.square(axes.std[4:]).mean()
    change = method._nll(x + 3.0 * axis, 0) - method._nll(x, 0)
    torch.testing.assert_close(change, 0.5 * (after - before) / rest, rtol=1e-6, atol=1e-6)


def test_mixture_finds_the_clusters_and_a_handful_of_atoms_gets_the_normal_density():
    rng = np.random.default_rng(0)
    corners = np.array([[-1.4, 0.0], [0.7, 1.2], [0.7, -1.2]])
    z = corners[rng.integers(3, size=600)] + 0.2 * rng.normal(size=(600, 2))
    count, means, factors, log_weights = density._mixture(z)
    assert count == 3
    nearest = np.linalg.norm(means[:, None] - corners, axis=2).min(1)
    assert nearest.max() < 0.05
    assert factors.shape == (3, 2, 2) and log_weights.shape == (3,)
    count, means, factors, _ = density._mixture(z[:3])
    assert count == 0
    np.testing.assert_array_equal(means, 0)
    np.testing.assert_array_equal(factors[0], np.eye(2))


def test_density_force_std_has_the_size_of_the_validation_errors(fitted):
    potential, _, held, _ = fitted
    for name in (keys.DENSITY_FORCE_STD, keys.LLPR_FORCE_STD):
        std = fields_of(potential, held)[name]
        ratio = (std.square().mean() / held.errors.square().mean()).sqrt()
        # elements lean a little on each other (PRIOR_ATOMS of 60 atoms)
        assert float(ratio) == pytest.approx(1.0, abs=0.02)


# D-optimality -----------------------------------------------------------------------------------
def test_maxvol_finds_a_volume_that_no_swap_enlarges():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(30, 4))
    chosen = grade.maxvol(a)
    volume = abs(np.linalg.det(a[chosen]))
    for place, row in itertools.product(range(4), range(30)):
        swapped = chosen.copy()
        swapped[place] = row
        assert abs(np.linalg.det(a[swapped])) <= grade.TOLERANCE * volume * (1 + 1e-9)
    largest = max(
        abs(np.linalg.det(a[list(rows)])) for rows in itertools.combinations(range(30), 4)
    )
    assert volume >= 0.5 * largest  # guaranteed is 4^-2; a swap-free set is usually near


def test_training_atoms_interpolate_and_the_active_set_reproduces_itself(fitted):
    potential, seen, _, _ = fitted
    values = fields_of(potential, seen)[keys.EXTRAPOLATION_GRADE]
    assert float(values.max()) <= grade.TOLERANCE + EXACT
    for element in (0, 1):
        own = values[seen.species == element]
        on_edge = torch.isclose(own, torch.ones(()).double(), atol=1e-9).sum()
        assert on_edge >= seen.features.scalars.shape[1] + 1


def test_grade_does_not_depend_on_the_coordinates_of_the_features(fitted):
    _, seen, held, _ = fitted
    torch.manual_seed(1)
    num_scalars = seen.features.scalars.shape[1]
    mix = torch.randn(num_scalars, num_scalars, dtype=torch.float64)
    values = []
    for change in (torch.eye(num_scalars, dtype=torch.float64), mix):
        method = with_methods(names=("grade",)).uncertainty_methods()[0]

        def changed(atoms, change=change):
            features = atoms.features._replace(scalars=atoms.features.scalars @ change + 5.0)
            return atoms._replace(features=features)

        method.fit(changed(seen), changed(held))
        atoms = changed(held)
        values.append(method(atoms.features, atoms.energy, atoms.species)[FIELDS[2]])
    # the active set may end in another local maximum of the volume
    assert torch.corrcoef(torch.stack(values))[0, 1] > 0.9


# last-layer rigidity ----------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["hlgauss", "scalar"])
def test_jacobian_is_the_derivative_by_the_last_layers_weights(fitted, head):
    potential = with_methods(head=head, names=("llpr",))
    _, seen, _, _ = fitted
    energy = potential.energy_head(seen.features.scalars, seen.species)
    (method,) = potential.uncertainty_methods()
    seen = seen._replace(energy=energy)
    method.fit(seen, seen)
    num_scalars = seen.features.scalars.shape[1]
    torch.manual_seed(0)
    linear, out = (torch.randn(1, num_scalars, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(2, 1, dtype=torch.float64)
    energies = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            moved = copy.deepcopy(potential.energy_head)
            moved.anchor.linear.weight.add_(sign * 1e-3 * linear)
            moved.anchor.out.weight.add_(sign * 1e-3 * out)
            moved.anchor.element_bias.weight.add_(sign * 1e-3 * bias)
            energies.append(moved(seen.features.scalars, seen.species).energy)
    measured = (energies[0] - energies[1]) / 2e-3  # exact: the energy is linear in them
    # the same step in the method's coordinates, where inputs are centred and scaled
    step = torch.cat([linear, out], dim=1).squeeze(0)
    constant = bias.squeeze(1) + method.mean @ step
    rows = method.jacobian(seen.features, energy, seen.species)
    projections = rows.shape[1] - 2 * num_scalars - 2
    assert projections == (llpr.PROJECTIONS if head == "hlgauss" else 0)
    coordinates = torch.cat([method.std * step, torch.zeros(projections).double(), constant])
    derivative = potential.energy_head.scale * (rows @ coordinates)
    torch.testing.assert_close(derivative, measured, rtol=EXACT, atol=EXACT)


def test_logit_columns_are_a_random_projection_of_the_outer_product(fitted):
    potential, seen, _, _ = fitted
    method, head = potential.methods["llpr"], potential.energy_head
    logits = seen.energy.logits.clone().requires_grad_(True)
    expectation = torch.softmax(logits, 1) @ head.offsets
    (g,) = torch.autograd.grad(expectation.sum(), logits)
    num_scalars = seen.features.scalars.shape[1]
    inputs = method.jacobian(seen.features, seen.energy, seen.species)[:, : 2 * num_scalars]
    scalars = torch.cat([inputs[:, :num_scalars], torch.ones_like(inputs[:, :1])], dim=1)
    dense = torch.einsum(
        "ik,il,kr,lr->ir", g, scalars, method.project_logits, method.project_scalars
    )
    torch.testing.assert_close(method._projected(inputs, seen.energy), dense, rtol=1e-9, atol=1e-9)


def test_energy_std_is_the_formula_in_dense_numpy(fitted):
    potential, seen, held, said = fitted
    method = potential.methods["llpr"]

    def frames(atoms):
        rows = method.jacobian(atoms.features, atoms.energy, atoms.species).numpy()
        return rows, np.stack(
            [rows[atoms.frame.numpy() == k].sum(0) for k in range(atoms.num_frames)]
        )

    (_, train), (atom_rows, valid) = frames(seen), frames(held)
    h = train.T @ train / np.mean(seen.energy_errors.numpy() ** 2)
    best = None
    for ridge in llpr.RIDGES:
        inverse = np.linalg.inv(h + ridge * np.diag(h).mean() * np.eye(len(h)))
        variance = np.einsum("fa,ab,fb->f", valid, inverse, valid)
        alpha2 = np.mean(held.energy_errors.numpy() ** 2 / variance)
        nll = np.mean(np.log(alpha2 * variance))
        if best is None or nll < best[0]:
            best = nll, ridge, alpha2, alpha2 * inverse
    assert said["llpr_ridge"] == best[1]
    assert said["llpr_alpha"] == pytest.approx(np.sqrt(best[2]), rel=EXACT)
    for rows, found in (
        (atom_rows, fields_of(potential, held)[keys.LLPR_ENERGY_STD]),
        (valid, method.frame_energy_std(held)),
    ):
        expected = np.sqrt(np.einsum("fa,ab,fb->f", rows, best[3], rows))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    z = held.energy_errors / method.frame_energy_std(held)
    assert float(z.square().mean()) == pytest.approx(1.0, rel=EXACT)


def test_a_replicated_cell_has_one_error_as_often_as_copies(fitted):
    potential = fitted[0]
    method = potential.methods["llpr"]
    cell = make_structure(ELEMENTS[:2], 20, seed=9)
    one, eight = (atoms_of(potential, [s]) for s in (cell, cell.repeat((2, 2, 2))))
    own = fields_of(potential, one)[keys.LLPR_ENERGY_STD]
    torch.testing.assert_close(
        fields_of(potential, eight)[keys.LLPR_ENERGY_STD], own.repeat(8), rtol=EXACT, atol=EXACT
    )
    small, large = method.frame_energy_std(one), method.frame_energy_std(eight)
    torch.testing.assert_close(large, 8 * small, rtol=EXACT, atol=EXACT)
    assert float(small) <= float(own.sum())  # equal only if all atoms err alike


def test_more_training_frames_never_make_the_energy_less_certain(fitted):
    potential, seen, held, _ = fitted
    method = potential.methods["llpr"]
    rows = method._frame_rows(seen)
    level = 1e-3 * torch.eye(rows.shape[1], dtype=torch.float64)
    frames = method._frame_rows(held)
    lengths = []
    for count in (3, 6, 12):
        h = rows[:count].T @ rows[:count]
        # the same absolute ridge
        root = llpr._inverse_root(h + level, 1e-12)
        lengths.append((frames @ root).norm(dim=1))
    assert (lengths[0] >= lengths[1]).all() and (lengths[1] >= lengths[2]).all()
