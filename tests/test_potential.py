"""Laws the potential obeys: symmetry, forces and stress as derivatives, locality, smoothness."""

import itertools
import math

import numpy as np
import pytest
import torch
from ase import Atoms
from conftest import CUTOFF, ELEMENTS
from scipy.spatial.transform import Rotation
from scipy.stats import multivariate_normal

from lmp_hl import histogram, keys
from lmp_hl.graph import graph_inputs
from lmp_hl.nn.angular import DegreeLinear, ScaledLinear, SymmetricSquare
from lmp_hl.nn.backbone import Backbone, Features, Standardize
from lmp_hl.nn.heads import AtomicEnergy, invariants
from lmp_hl.potential import Potential, edge_forces
from lmp_hl.training import frames as fr
from lmp_hl.uncertainty import Atoms as FrozenAtoms
from lmp_hl.uncertainty import Sizes
from lmp_hl.uncertainty.scales import ForceDistribution, spd_exponential

# preset, head, number of elements, l_max
ALL = list(itertools.product(["local", "mp"], ["hlgauss", "scalar"], [1, 3], [2, 4]))
SOME = [
    ("local", "hlgauss", 3, 3),
    ("local", "scalar", 1, 2),
    ("mp", "hlgauss", 1, 2),
    ("mp", "scalar", 3, 3),
]
TWO = [SOME[0], ("mp", "hlgauss", 3, 2)]


@pytest.fixture
def potential(request, potential_factory):
    return potential_factory(*request.param)


def cases(names):
    return pytest.mark.parametrize(
        "potential", names, indirect=True, ids=lambda p: "-".join(map(str, p))
    )


def elements_of(potential):
    return ELEMENTS[: len(potential.reference_energies)]


def inputs_of(potential, atoms):
    layers = 1 + len(potential.backbone.message_layers)
    dtype = str(next(potential.parameters()).dtype).removeprefix("torch.")
    return graph_inputs(atoms, elements_of(potential), CUTOFF, layers, dtype)


def evaluate(potential, atoms, with_fields=True):
    """Outputs as numpy arrays, with the forces and the virial sum_e r_e g_e put together."""
    inputs = inputs_of(potential, atoms)
    out = {k: v.detach() for k, v in potential(inputs, with_fields).items()}
    gradients = out.pop(keys.EDGE_GRADIENTS)
    out["forces"] = edge_forces(inputs[keys.EDGE_INDEX], gradients, len(atoms))
    out["virial"] = inputs[keys.EDGE_VECTORS].T @ gradients
    return {k: v.numpy() for k, v in out.items()}


def total_energy(potential, atoms):
    return evaluate(potential, atoms, with_fields=False)[keys.ENERGY].sum()


def assert_same_scalars(a, b, names, order=slice(None)):
    for name in names:
        np.testing.assert_allclose(a[name][order], b[name], rtol=1e-9, atol=1e-10, err_msg=name)


@cases(ALL)
def test_rotation_and_inversion(potential, structure_factory):
    atoms = structure_factory(elements_of(potential), seed=1)
    before = evaluate(potential, atoms)
    assert set(potential.field_names()) <= set(before)
    for matrix in (Rotation.random(rng=5).as_matrix(), -Rotation.random(rng=6).as_matrix()):
        turned = atoms.copy()
        turned.set_cell(atoms.cell @ matrix.T)
        turned.positions = atoms.positions @ matrix.T
        after = evaluate(potential, turned)
        assert_same_scalars(after, before, [keys.ENERGY, *potential.field_names()])
        np.testing.assert_allclose(after["forces"], before["forces"] @ matrix.T, atol=1e-9)
        np.testing.assert_allclose(after["virial"], matrix @ before["virial"] @ matrix.T, atol=1e-8)


@cases(SOME)
def test_translation_permutation_and_choice_of_image(potential, structure_factory):
    atoms = structure_factory(elements_of(potential), seed=2)
    before = evaluate(potential, atoms)
    moved = atoms.copy()
    moved.positions += [3.1, -7.7, 0.4]
    moved.wrap()
    order = np.random.default_rng(0).permutation(len(atoms))
    after = evaluate(potential, moved[order])
    assert_same_scalars(before, after, [keys.ENERGY, "forces", *potential.field_names()], order)


@cases(SOME)
def test_forces_are_minus_the_energys_gradient(potential, structure_factory):
    atoms = structure_factory(elements_of(potential), seed=3)
    forces = evaluate(potential, atoms)["forces"]
    step = 1e-4  # central differences: error O(step^2) times the third derivative
    for atom, axis in ((0, 0), (1, 1), (2, 2), (5, 0)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            energies.append(total_energy(potential, moved))
        numeric = -(energies[0] - energies[1]) / (2 * step)
        assert forces[atom, axis] == pytest.approx(numeric, rel=1e-5, abs=1e-6)
    assert np.abs(forces).max() > 0.05  # there was something to compare
    np.testing.assert_allclose(forces.sum(0), 0.0, atol=1e-11)


def test_narrow_messages_keep_the_laws(potential_factory, structure_factory):
    potential = potential_factory("mp", "hlgauss", 3, message_channels=2)
    test_rotation_and_inversion(potential, structure_factory)
    test_forces_are_minus_the_energys_gradient(potential, structure_factory)


@pytest.mark.parametrize("l_max", [2, 3, 4])
def test_products_one_by_one_are_those_of_the_matrix(l_max):
    square = SymmetricSquare(l_max, 2).double()
    tensors = torch.randn((l_max + 1) ** 2, 5, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for _ in range(2):
        blocks = square(tensors)
        total = sum(block.pow(2).sum() for block in blocks)
        outputs = torch.cat([block.flatten() for block in blocks])
        found.append((outputs, *torch.autograd.grad(total, tensors)))
        square.unroll()
    assert square.unrolled == (l_max > 2)
    for dense, single in zip(*found, strict=True):
        torch.testing.assert_close(single, dense, rtol=1e-12, atol=1e-12)


def test_scaled_linear_is_the_linear_map_of_tensors_of_unit_size():
    scaled, plain = ScaledLinear(2, 4, 3).double(), DegreeLinear(2, 4, 3).double()
    plain.weight.data = scaled.weight.data
    tensors = torch.randn(9, 50, 4, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 30.0, 0.0])
    scaled.fit(tensors)
    unit = []
    for first, last in ((0, 1), (1, 4), (4, 9)):
        block = tensors[first:last]
        rms = block.square().mean((0, 1)).sqrt()
        unit.append(block / torch.where(rms > 0, rms, 1.0))  # what is always zero has no size
    torch.testing.assert_close(scaled(tensors), plain(torch.cat(unit)), rtol=1e-12, atol=1e-12)


def test_invariants_have_the_weight_of_their_order():
    standardize = Standardize([(2, 2), (1, 3), (2, 5)]).double()
    x = 7.0 + torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 5.0, 1e2, 2.0])
    standardize.fit(x)
    y = standardize(x)
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(y.std(0, correction=0), [1, 1, 1 / 2, 1 / 8, 1 / 8], rtol=1e-12)


@cases(SOME)
def test_virial_is_the_energys_derivative_by_strain_and_symmetric(potential, structure_factory):
    atoms = structure_factory(elements_of(potential), seed=4)
    virial = evaluate(potential, atoms)["virial"]
    np.testing.assert_allclose(virial, virial.T, atol=1e-10)
    step = 1e-5
    for a, b in ((0, 0), (1, 2), (2, 0)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * step
            strained = atoms.copy()
            strained.set_cell(atoms.cell @ strain, scale_atoms=True)
            energies.append(total_energy(potential, strained))
        numeric = (energies[0] - energies[1]) / (2 * step)
        assert virial[a, b] == pytest.approx(numeric, rel=1e-5, abs=1e-6)


@cases(SOME)
def test_energy_force_and_its_slope_vanish_smoothly_at_the_cutoff(potential):
    """An atom that leaves the cutoff of one other: E ~ d^4, F ~ d^3, dF/dr ~ d^2 at r_c - d.

    The envelope alone has d^3; the Bessel functions vanish at the cutoff as well.
    """
    elements = elements_of(potential)

    def state(r):
        # the third atom is 2.5 Å from the first, on the far side of the one that leaves
        atoms = Atoms(
            [elements[0], elements[-1], elements[0]], [[0, 0, 0], [r, 0, 0], [-2.5, 0.3, 0]]
        )
        out = evaluate(potential, atoms)
        return out[keys.ENERGY].sum(), out["forces"][1, 0]

    far, no_force = state(CUTOFF + 1e-9)
    assert no_force == 0.0
    distances = (0.08, 0.04, 0.02)
    energies, forces, slopes = [], [], []
    for d in distances:
        energies.append(abs(state(CUTOFF - d)[0] - far))
        forces.append(abs(state(CUTOFF - d)[1]))
        inner, outer = state(CUTOFF - d - 1e-4)[1], state(CUTOFF - d + 1e-4)[1]
        slopes.append(abs(inner - outer) / 2e-4)
    assert energies[0] > 1e-9
    for values, order in ((energies, 3), (forces, 2), (slopes, 1)):
        observed = np.log2(np.array(values[:-1]) / np.array(values[1:]))
        assert (observed > order + 0.5).all(), (order, observed)


@cases(SOME)
def test_batch_equals_singles(potential, structure_factory):
    elements = elements_of(potential)
    structures = [
        structure_factory(elements, n, pbc, n) for n, pbc in ((4, True), (9, False), (1, False))
    ]
    graphs = [
        {**inputs_of(potential, atoms), fr.NUM_ATOMS: torch.tensor([len(atoms)])}
        for atoms in structures
    ]
    together = potential(fr.collate_graphs(graphs), True)
    singles = [potential(graph, True) for graph in graphs]
    for name in (keys.ENERGY, keys.EDGE_GRADIENTS, *potential.field_names()):
        expected = torch.cat([single[name] for single in singles])
        torch.testing.assert_close(together[name], expected, rtol=1e-10, atol=1e-10)


@cases(SOME)
def test_no_atoms_and_no_neighbours(potential):
    empty = evaluate(potential, Atoms())
    assert all(len(empty[name]) == 0 for name in (keys.ENERGY, "forces", *potential.field_names()))
    apart = evaluate(potential, Atoms([elements_of(potential)[0]] * 2, [[0, 0, 0], [0, 0, CUTOFF]]))
    assert (apart["forces"] == 0).all()
    assert apart[keys.ENERGY][0] == pytest.approx(apart[keys.ENERGY][1], rel=1e-14)
    assert all(np.isfinite(apart[name]).all() for name in (keys.ENERGY, *potential.field_names()))


def test_range_of_the_energy_is_layers_times_cutoff(potential_factory):
    """A chain of three: the far end acts on the first atom's energy only by message passing."""
    energies = {}
    for preset in ("local", "mp"):
        energies[preset] = [
            evaluate(
                potential_factory(preset), Atoms("Si3", [[0, 0, 0], [2.5, 0, 0], [4.5, y, 0]])
            )[keys.ENERGY][0]
            for y in (0.0, 1.0)
        ]
    assert energies["local"][0] == energies["local"][1]
    assert abs(energies["mp"][0] - energies["mp"][1]) > 1e-6


@pytest.mark.parametrize("head", ["hlgauss", "scalar"])
def test_reference_energies_shift_the_energy_only(potential_factory, structure_factory, head):
    potential = potential_factory("local", head, 3)
    atoms = structure_factory(ELEMENTS)
    inputs = inputs_of(potential, atoms)
    _, bare = potential.atoms(inputs)
    expected = bare.energy + potential.reference_energies[inputs[keys.SPECIES]]
    torch.testing.assert_close(potential(inputs)[keys.ENERGY], expected, rtol=0, atol=0)


@cases(TWO)
def test_energy_is_the_expectation_of_the_histogram(potential, structure_factory):
    inputs = inputs_of(potential, structure_factory(elements_of(potential)))
    _, atoms = potential.atoms(inputs)
    head = potential.energy_head
    probs = torch.softmax(atoms.logits, 1).numpy()
    centers = atoms.anchor[:, None].numpy() + float(head.bin_width) * head.offsets.numpy()
    np.testing.assert_allclose(atoms.energy, (probs * centers).sum(1), rtol=0, atol=1e-12)
    out = {k: v.detach() for k, v in potential(inputs, True).items()}
    entropy = -(probs * np.log(probs)).sum(1)
    np.testing.assert_allclose(out[keys.ENTROPY], entropy, rtol=1e-12)
    floor = histogram.entropy_floor(head.sigma_in_bins, 1.0)
    np.testing.assert_allclose(out[keys.EXCESS_ENTROPY], entropy - floor, atol=1e-12)
    assert np.ptp(entropy) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_of_the_outputs(potential_factory, structure_factory, dtype):
    potential = potential_factory("local", "hlgauss", 1, 2, dtype)
    out = potential(inputs_of(potential, structure_factory(["Si"])), True)
    assert out[keys.ENERGY].dtype == torch.float64
    others = {v.dtype for k, v in out.items() if k != keys.ENERGY}
    assert others == {getattr(torch, dtype)}


def test_float32_agrees_with_float64(potential_factory, structure_factory):
    """The same weights in both precisions: 1e-4 is some hundred roundings of float32."""
    double = potential_factory("mp", "hlgauss", 3)
    single = potential_factory("mp", "hlgauss", 3, 2, "float32")
    single.load_state_dict(double.state_dict())
    atoms = structure_factory(ELEMENTS, seed=9)
    expected, got = evaluate(double, atoms), evaluate(single, atoms)
    for name in ("forces", keys.ENERGY, *double.field_names()):
        scale = max(1.0, np.abs(expected[name]).max())
        np.testing.assert_allclose(got[name], expected[name], atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_stay_finite_far_from_the_data(potential_factory, structure_factory, dtype):
    """Neighbours at 1 Å: the features are 1e10 standard deviations off."""
    potential = potential_factory("mp", "hlgauss", 1, 2, dtype)
    atoms = structure_factory(["Si"], num_atoms=27, seed=4)
    atoms.set_cell(0.45 * atoms.cell, scale_atoms=True)
    assert all(np.isfinite(values).all() for values in evaluate(potential, atoms).values())


def test_features_that_are_not_finite_give_nan_not_an_error_of_indices(potential_factory, silicon):
    """A simulation that blows up must stop with its own message, on a GPU too."""
    potential = potential_factory("local")
    inputs = inputs_of(potential, silicon)
    inputs[keys.EDGE_VECTORS][0] = np.nan
    out = potential(inputs, True)
    assert bool(out[keys.FORCE_ENTROPY][0].isnan()) and bool(out[keys.DISTANCE][0].isnan())
    assert bool(out[keys.DISTANCE][1:].isfinite().all())  # its neighbours' errors are not known


# message passing over a part of the atoms --------------------------------------------------------
def hop_sorted(inputs, owned, num_layers):
    """The graph of keys.py for the owned atoms, and the old index of each node and edge."""
    center, neighbor = inputs[keys.EDGE_INDEX].numpy()
    reached, hop = {int(i): 0 for i in owned}, 0
    while hop < num_layers:
        hop += 1
        for i, j in zip(center, neighbor, strict=True):
            if reached.get(int(i)) == hop - 1:
                reached.setdefault(int(j), hop)
    nodes = sorted(reached, key=lambda i: reached[i])
    rank = {node: k for k, node in enumerate(nodes)}
    edges = [e for e, i in enumerate(center) if reached.get(int(i), num_layers) < num_layers]
    edges.sort(key=lambda e: reached[int(center[e])])
    hops = [num_layers - 1 - t for t in range(num_layers)]  # centres of layer t are so far away
    index = np.array(
        [[rank[int(center[e])] for e in edges], [rank[int(neighbor[e])] for e in edges]]
    )
    part = {
        keys.SPECIES: inputs[keys.SPECIES][nodes],
        keys.EDGE_INDEX: torch.from_numpy(index),
        keys.EDGE_VECTORS: inputs[keys.EDGE_VECTORS][edges],
        keys.LAYER_NODES: torch.tensor([sum(reached[i] <= h for i in nodes) for h in hops]),
        keys.LAYER_EDGES: torch.tensor(
            [sum(reached[int(center[e])] <= h for e in edges) for h in hops]
        ),
    }
    return part, nodes, edges


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_owned_atoms_alone_give_the_energies_and_gradients_of_all(
    potential_factory, structure_factory, num_layers
):
    preset = "local" if num_layers == 1 else "mp"
    potential = potential_factory(preset, "hlgauss", 3, 2, "float64", num_layers)
    atoms = structure_factory(ELEMENTS, num_atoms=60, pbc=False, seed=8)
    owned = np.argsort(atoms.positions[:, 0])[:4].tolist()
    whole = inputs_of(potential, atoms)
    part, nodes, edges = hop_sorted(whole, owned, num_layers)
    assert part[keys.LAYER_NODES].tolist()[-1] == 4
    sizes = [len(atoms), len(nodes), *part[keys.LAYER_NODES].tolist()]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0]

    got = potential(part, True)
    vectors = whole[keys.EDGE_VECTORS].requires_grad_(True)
    features, energy = potential.atoms(whole)
    (gradient,) = torch.autograd.grad([energy.energy[nodes[:4]].sum()], [vectors])
    references = potential.reference_energies[whole[keys.SPECIES]]
    expected = (energy.energy + references)[nodes[:4]]
    torch.testing.assert_close(got[keys.ENERGY], expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(got[keys.EDGE_GRADIENTS], gradient[edges], rtol=1e-8, atol=1e-10)
    unused = np.setdiff1d(np.arange(len(vectors)), edges)
    assert len(unused) > 0 and bool((gradient[unused] == 0).all())
    values = potential.values(features, energy, whole[keys.SPECIES])
    of_part = potential.values(*potential.atoms(part), part[keys.SPECIES][:4])
    for all_values, some_values in zip(values, of_part, strict=True):
        for name, value in all_values.items():
            torch.testing.assert_close(some_values[name], value[nodes[:4]], rtol=1e-8, atol=1e-10)


# force distribution and distance -----------------------------------------------------------------
@pytest.fixture
def force(potential_factory, structure_factory):
    """Potential, shapes of the force errors of nine atoms, their sizes and distances."""
    potential = potential_factory("local", "hlgauss", 3, 3)
    inputs = inputs_of(potential, structure_factory(ELEMENTS, seed=5))
    features, _ = potential.atoms(inputs)
    species, scales = inputs[keys.SPECIES], potential.methods["scales"]
    head = scales.force_distribution
    distance = scales.distance(invariants(features), species)
    return potential, head(features.tensors), head.size[species], distance


def test_shape_of_the_force_distribution_is_spd_with_determinant_one(force):
    shape = spd_exponential(force[1].generator)
    torch.testing.assert_close(shape, shape.transpose(1, 2))
    assert bool((torch.linalg.eigvalsh(shape) > 0).all())
    torch.testing.assert_close(torch.linalg.det(shape), torch.ones(9, dtype=torch.float64))
    assert float((shape - torch.eye(3)).abs().max()) > 0.1


def test_shape_of_the_force_distribution_turns_with_the_structure(force, structure_factory):
    potential, before, _, _ = force
    atoms = structure_factory(ELEMENTS, seed=5)
    matrix = -Rotation.random(rng=3).as_matrix()
    turned = atoms.copy()
    turned.set_cell(atoms.cell @ matrix.T, scale_atoms=True)
    features, _ = potential.atoms(inputs_of(potential, turned))
    after = potential.methods["scales"].force_distribution(features.tensors)
    expected = matrix @ before.generator.numpy() @ matrix.T
    np.testing.assert_allclose(after.generator, expected, atol=1e-10)
    np.testing.assert_allclose(after.damping, before.damping, atol=1e-10)


def test_log_density_is_scipys_mixture_of_gaussians(force):
    potential, shape, size, distance = force
    head = potential.methods["scales"].force_distribution
    errors = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = head.log_density(shape, size, distance, errors)
    weights, scales = (x.exp().numpy() for x in head.relative())
    assert weights.sum() == pytest.approx(1) and weights @ scales**2 == pytest.approx(1)
    ellipsoid = torch.linalg.matrix_exp(shape.generator).numpy()
    sigma = (size * shape.damping * distance).numpy()
    for i in range(9):
        density = sum(
            q * multivariate_normal(cov=(r * sigma[i]) ** 2 * ellipsoid[i]).pdf(errors[i])
            for q, r in zip(weights, scales, strict=True)
        )
        assert float(got[i]) == pytest.approx(np.log(density), rel=1e-9)


def test_force_std_is_the_root_of_the_mean_variance_of_a_component(force):
    potential, shape, size, distance = force
    head = potential.methods["scales"].force_distribution
    weights, scales = (x.exp() for x in head.relative())
    variance = (weights * scales.square()).sum() * (size * shape.damping * distance).square()
    trace = torch.linalg.matrix_exp(shape.generator).diagonal(dim1=1, dim2=2).sum(1)
    got = size * distance * head.spread(shape)
    torch.testing.assert_close(got, (variance * trace / 3).sqrt(), rtol=1e-12, atol=0)


def test_force_entropy_is_that_of_the_mixtures_bin_masses_and_grows_with_the_size(force):
    potential, *_ = force
    head = potential.methods["scales"].force_distribution
    width = float(head.bin_width)
    std = width * torch.logspace(-3, 4, 57, dtype=torch.float64)
    weights, scales = (x.exp() for x in head.relative())
    edges = histogram.uniform_edges(head.num_bins, width)
    sigma = std.unsqueeze(1) * scales
    masses = histogram.hl_gauss(torch.zeros_like(sigma), edges, sigma)
    expected = histogram.entropy((weights.unsqueeze(1) * masses).sum(1))
    got = head.entropy(std)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)  # of the table
    assert bool((got[1:] >= got[:-1]).all()) and float(got[-1] - got[0]) > 3
    assert bool(torch.isnan(head.entropy(torch.tensor([math.nan]))).all())


@pytest.fixture
def fitted():
    """A distribution for two elements fitted to errors that it can describe, and their atoms."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors, species = normal(9, 600, 4), torch.arange(600) % 2
    tensors[1:4, ::5] *= 1e-3  # every fifth atom is nearly symmetric
    distance = torch.exp(0.5 * normal(600))
    head = ForceDistribution(Sizes(2, 4, 2, 2)).double().requires_grad_(False)
    head.scale_features(Features(normal(600, 2), tensors))
    size = torch.tensor([0.05, 0.4], dtype=torch.float64)
    expected = size[species] * distance * head(tensors).damping
    errors = expected.unsqueeze(1) * normal(600, 3) * torch.exp(0.4 * normal(600, 1))
    empty = torch.zeros(600, 0, dtype=torch.float64)
    energy = AtomicEnergy(empty[:, :0].sum(1), empty.sum(1), empty, empty.sum(1)[:0], empty)
    atoms = FrozenAtoms(
        Features(normal(600, 2), tensors), energy, species, torch.arange(600) // 10, errors,
        normal(60), torch.zeros(2, 0, dtype=torch.int64), empty.sum(1)[:0],
    )  # fmt: skip
    head.fit(atoms, distance)
    return head, atoms, distance, expected


def test_fitted_sizes_are_those_of_each_elements_errors(fitted):
    head, atoms, distance, _ = fitted
    std = head.size[atoms.species] * distance * head.spread(head(atoms.features.tensors))
    square = atoms.errors.square().mean(1)
    for z in range(2):
        chosen = atoms.species == z
        ratio = float((std[chosen].square().mean() / square[chosen].mean()).sqrt())
        assert ratio == pytest.approx(1, abs=0.08)  # some weight is on what all elements say
    symmetric = torch.arange(600) % 5 == 0
    ratio = float((std[symmetric].square().mean() / square[symmetric].mean()).sqrt())
    assert ratio == pytest.approx(1, abs=0.25)  # 120 atoms with heavy tails


def test_fitted_mixture_is_likelier_than_a_gaussian_and_tells_heavy_tails(fitted):
    head, atoms, distance, expected = fitted
    shape, size = head(atoms.features.tensors), head.size[atoms.species]
    mixture = head.log_density(shape, size, distance, atoms.errors).mean()
    scale = expected.unsqueeze(1) * (atoms.errors / expected.unsqueeze(1)).square().mean().sqrt()
    gaussian = torch.distributions.Normal(0.0, scale).log_prob(atoms.errors).sum(1).mean()
    assert float(mixture) > float(gaussian) + 0.05


def test_distance_is_the_mahalanobis_distance_of_the_element(potential_factory, structure_factory):
    potential = potential_factory("local", "hlgauss", 3)
    inputs = inputs_of(potential, structure_factory(ELEMENTS, seed=5))
    features, _ = potential.atoms(inputs)
    head = potential.methods["scales"].distance
    x = invariants(features).numpy()
    got = head(invariants(features), inputs[keys.SPECIES])
    for i, z in enumerate(inputs[keys.SPECIES].tolist()):
        whiten = head.whiten[z].numpy()
        difference = x[i] - head.mean[z].numpy()
        square = difference @ whiten @ whiten.T @ difference / len(difference)
        assert float(got[i]) == pytest.approx(np.sqrt(square) / float(head.median), rel=1e-9)


# bad input ---------------------------------------------------------------------------------------
SIZES = ("channels", "num_radial", "num_scalars", "message_channels")


def test_unknown_architecture_is_refused():
    arguments = {"cutoff": 4.0, **dict.fromkeys(SIZES, 2), "num_elements": 1}
    with pytest.raises(ValueError, match="l_max must be at least 2"):
        Potential(**arguments, num_layers=1, head="scalar", l_max=1, num_bins=8, sigma=0.75)
    with pytest.raises(ValueError, match="'svd_committee' or 'scalar', got 'mlp'"):
        Potential(**arguments, num_layers=1, head="mlp", l_max=2, num_bins=8, sigma=0.75)
    with pytest.raises(ValueError, match="l_max must be 1 to 4"):
        Backbone(**arguments, num_layers=1, l_max=5)
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        Backbone(**arguments, num_layers=0, l_max=2)
