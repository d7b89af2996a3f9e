"""Uncertainty that is trained with the network: formulas, symmetry, limits, runs, export."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import ELEMENTS, make_card, make_potential
from scipy.spatial.transform import Rotation
from scipy.stats import invwishart, multivariate_normal, multivariate_t, norm, poisson
from test_potential import evaluate, inputs_of
from test_training import configure, last_state, numbers, quick_calibration

from lmp_hl import keys, model_file
from lmp_hl.export import export_potential
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import AtomicEnergy, Readout
from lmp_hl.training import energy_targets, losses
from lmp_hl.training import frames as fr
from lmp_hl.training import train as train_module
from lmp_hl.training.checkpoint import load_checkpoint
from lmp_hl.training.config import ModelConfig
from lmp_hl.training.notebook import Notebook
from lmp_hl.training.prediction import by_member, predict
from lmp_hl.training.train import train
from lmp_hl.uncertainty import Atoms, Evidential, MeanVariance, Sizes
from lmp_hl.uncertainty.committee import CommitteeEnergy
from lmp_hl.uncertainty.evidential import PENALTY

SIZES = Sizes(num_scalars=6, channels=3, l_max=2, num_elements=2)
# a case's head and methods
CASES = {
    "mean_variance": ("scalar", ("mean_variance",)),
    "evidential": ("hlgauss", ("scales", "evidential")),
    "committee": ("committee", ()),
    "svd_committee": ("svd_committee", ()),
}


def potential_of(name, preset="local", dtype="float64"):
    head, methods = CASES[name]
    return make_potential(preset, head=head, num_elements=2, dtype=dtype, methods=methods)


def random_atoms(num_atoms=40, num_frames=4, seed=0):
    """Features and errors of two elements; energies are of no concern."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    nothing = torch.zeros(num_atoms, dtype=torch.float64)
    return Atoms(
        Features(normal(num_atoms, 6), normal(9, num_atoms, 3)),
        AtomicEnergy(
            nothing, nothing, nothing.reshape(-1, 1)[:, :0], nothing[:0], normal(num_atoms, 6)
        ),
        torch.arange(num_atoms) % 2,
        torch.arange(num_atoms) * num_frames // num_atoms,
        0.1 * normal(num_atoms, 3),
        0.05 * normal(num_frames),
        torch.zeros(2, 0, dtype=torch.int64),
        nothing[:0],
    )


def random_method(kind, seed=1):
    torch.manual_seed(seed)
    method = kind(SIZES).double()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return method


# in the model ------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["local", "mp"])
@pytest.mark.parametrize("name", CASES)
def test_fields_do_not_change_when_the_structure_is_turned(name, preset, structure_factory):
    potential = potential_of(name, preset)
    atoms = structure_factory(ELEMENTS[:2], seed=1)
    before = evaluate(potential, atoms)
    for matrix in (Rotation.random(rng=5).as_matrix(), -Rotation.random(rng=6).as_matrix()):
        turned = atoms.copy()
        turned.set_cell(atoms.cell @ matrix.T)
        turned.positions = atoms.positions @ matrix.T
        after = evaluate(potential, turned)
        for field in potential.field_names():
            np.testing.assert_allclose(after[field], before[field], rtol=1e-9, atol=1e-12)
    own = [f for f in potential.field_names() if f.startswith(name.removeprefix("svd_"))]
    assert len(own) >= 2
    for field in own:
        assert before[field].shape == (9,) and np.isfinite(before[field]).all()
        assert np.ptp(before[field]) > 1e-3 * np.abs(before[field]).max()  # of the atom


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mean_variance", "float32"), ("evidential", "float64"), ("svd_committee", "float64")],
)
def test_exported_equals_eager_and_takes_no_atoms(name, dtype, structure_factory, tmp_path):
    potential = potential_of(name, "mp", dtype)
    head = CASES[name][0]
    path = export_potential(potential, ELEMENTS[:2], make_card(head), tmp_path / "hl.pt")
    model = model_file.load(path)
    assert model.fields == [keys.ENERGY, *potential.field_names()]
    inputs = inputs_of(potential, structure_factory(ELEMENTS[:2], seed=3))
    expected = potential(inputs, True)
    got = model.evaluate(inputs, True)
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    for field in model.fields:
        torch.testing.assert_close(got[field], expected[field], rtol=tolerance, atol=tolerance)
    assert "of error" in model_file.describe(path)
    for structure in (structure_factory(ELEMENTS[:2], 1, pbc=False)[:n] for n in (0, 1)):
        found = model.evaluate(inputs_of(potential, structure), True)
        for field in model.fields:
            assert found[field].shape == (len(structure),) and torch.isfinite(found[field]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_torchscript(name, structure_factory, tmp_path):
    from lmp_hl.compile import export_compiled

    potential = potential_of(name)
    path = tmp_path / "hl.pt2"  # compared with the network while it is written
    export_compiled(potential, ELEMENTS[:2], make_card(CASES[name][0]), path)
    model = model_file.load(path)
    inputs = inputs_of(potential, structure_factory(ELEMENTS[:2], 20, seed=3))
    expected, got = potential(inputs, True), model.evaluate(inputs, True)
    for field in model.fields:
        torch.testing.assert_close(got[field], expected[field], rtol=1e-9, atol=1e-9)


# mean-variance -----------------------------------------------------------------------------------
def test_joint_likelihood_is_that_of_scipys_normal_distribution():
    """Each term is 2 s0^2 (NLL - ln(s0) - 1/2 ln 2 pi), s0^2 the batch's mean variance."""
    method, atoms = random_method(MeanVariance), random_atoms()
    std = method.log_std(atoms.features, atoms.species).exp().detach().numpy()
    loss = method.loss(atoms)
    nll = -norm.logpdf(atoms.errors, scale=std[:, :1]).mean()
    s0 = np.sqrt((std[:, 0] ** 2).mean())
    expected = 2 * s0**2 * (nll - np.log(s0) - 0.5 * np.log(2 * np.pi))
    assert float(loss.forces.detach()) == pytest.approx(expected, rel=1e-10)
    variance = np.bincount(atoms.frame, std[:, 1] ** 2)  # of the total energy, 10 atoms each
    nll = -norm.logpdf(atoms.energy_errors, scale=np.sqrt(variance)).mean()
    s0 = np.sqrt(variance.mean())
    expected = 2 * s0**2 / 10 * (nll - np.log(s0) - 0.5 * np.log(2 * np.pi))
    assert float(loss.energy.detach()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", [MeanVariance, Evidential])
def test_atoms_that_are_alike_pull_on_errors_as_squared_errors_do(kind):
    """At equal variances; the t's pull is the Gaussian's for errors much smaller than its size."""
    method, atoms = kind(SIZES).double(), random_atoms()
    small = 1.0 if kind is MeanVariance else 1e-3
    errors = (small * atoms.errors).requires_grad_(True)
    energies = atoms.energy_errors.clone().requires_grad_(True)
    loss = method.loss(atoms._replace(errors=errors, energy_errors=energies))
    (gradient,) = torch.autograd.grad(loss.forces, errors, retain_graph=True)
    # of the t, the curvature at 0 is (dof + 3) / dof / scale in units of E[S] = s0^2 / (1 + 1/e)
    e = 10.0
    factor = 1.0 if kind is MeanVariance else (e + 5) / (e + 1) * (e + 1) / e
    np.testing.assert_allclose(gradient, factor * 2 * errors.detach() / errors.numel(), rtol=1e-5)
    if loss.energy is not None:
        (gradient,) = torch.autograd.grad(loss.energy, energies)
        np.testing.assert_allclose(gradient, 2 * energies.detach() / 10 / 4, rtol=1e-10)


def train_alone(method, atoms, steps=150):
    """Minimise the method's own loss on given features and errors; its first and last value."""
    optimizer = torch.optim.Adam(method.parameters(), lr=0.03)
    values = []
    for _ in range(steps):
        loss = method.loss(atoms)
        total = loss.forces + (0 if loss.energy is None else loss.energy)
        # the scale of the loss moves with the variance, its gradient does not
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(float(total.detach()))
    return values


@pytest.mark.parametrize("kind", [MeanVariance, Evidential])
def test_spread_that_depends_on_a_feature_is_found(kind):
    atoms = random_atoms(600, 20)
    std = 0.05 * torch.exp(0.5 * atoms.features.scalars[:, 0]) * (1 + atoms.species)
    noise = torch.randn(600, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    atoms = atoms._replace(errors=std[:, None] * noise)
    torch.manual_seed(0)
    method = kind(SIZES).double()
    values = train_alone(method, atoms)
    assert all(map(math.isfinite, values))
    held = random_atoms(500, 5, seed=8)
    true = 0.05 * torch.exp(0.5 * held.features.scalars[:, 0]) * (1 + held.species)
    found = method(held.features, held.energy, held.species)[kind.FIELDS[0]].detach()
    assert float(torch.log(found / true).std()) < 0.2  # of 0.6
    assert float(torch.log(found / true).mean().abs()) < 0.2


def test_energy_spread_adds_up_over_atoms():
    """Independent atomic errors of two sizes: the variances of frames tell those of elements."""
    atoms = random_atoms(2000, 200)
    atoms = atoms._replace(species=torch.randint(2, (2000,), generator=torch.Generator()))
    nothing = Features(0 * atoms.features.scalars, atoms.features.tensors)
    sizes = torch.tensor([0.003, 0.02], dtype=torch.float64)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    errors = torch.zeros(200, dtype=torch.float64)
    errors = errors.index_add(0, atoms.frame, sizes[atoms.species] * noise)
    atoms = atoms._replace(features=nothing, energy_errors=errors)
    torch.manual_seed(0)
    method = MeanVariance(SIZES).double()
    train_alone(method, atoms)
    two = Features(nothing.scalars[:2], nothing.tensors[:, :2])
    found = method(two, atoms.energy, torch.tensor([0, 1]))[keys.MEAN_VARIANCE_ENERGY_STD]
    assert float(found[1].detach()) == pytest.approx(0.02, rel=0.15)
    assert float(found[0].detach()) < 0.01


# evidential --------------------------------------------------------------------------------------
def test_predictive_density_is_the_t_that_integrates_out_mean_and_covariance():
    method, atoms = random_method(Evidential), random_atoms(3)
    atoms = atoms._replace(errors=0.3 * atoms.errors)  # few draws tell of the far tail
    found = method.evidence(atoms.features, atoms.species)
    got = method.log_density(found, atoms.errors).detach().numpy()
    for i in range(3):
        e, expected = float(found.evidence[i]), found.aleatoric[i].detach().numpy()
        # kappa = e, nu = 4 + e, E[S] = Psi / (nu - 4)
        psi, kappa, nu = e * expected, e, 4 + e
        scale = psi * (1 + 1 / kappa) / (nu - 2)
        t = multivariate_t(np.zeros(3), scale, df=nu - 2)
        assert got[i] == pytest.approx(t.logpdf(atoms.errors[i]), rel=1e-9)
        # mu | S ~ N(0, S / kappa), label | mu, S ~ N(mu, S), S ~ IW(psi, nu)
        draws = invwishart(nu, psi).rvs(4000, random_state=i)
        covariance = draws * (1 + 1 / kappa)
        error = atoms.errors[i].numpy()
        square = np.einsum("a,nab,b->n", error, np.linalg.inv(covariance), error)
        density = np.exp(-square / 2) / np.sqrt(np.linalg.det(2 * np.pi * covariance))
        assert np.log(np.mean(density)) == pytest.approx(got[i], abs=0.1)
        np.testing.assert_allclose(draws.mean(0), expected, atol=0.2 * np.trace(expected))


def test_parts_add_up_to_the_covariance_of_the_t():
    method, atoms = random_method(Evidential), random_atoms()
    fields = method(atoms.features, atoms.energy, atoms.species)
    total, aleatoric, epistemic = (fields[name].detach() for name in Evidential.FIELDS)
    np.testing.assert_allclose(total**2, aleatoric**2 + epistemic**2, rtol=1e-12)
    found = method.evidence(atoms.features, atoms.species)
    dof = found.evidence.detach() + 2
    scale = found.aleatoric.detach() * ((dof - 1) / dof)[:, None, None]
    covariance = scale * (dof / (dof - 2))[:, None, None]  # of multivariate_t
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    np.testing.assert_allclose(total**2, trace / 3, rtol=1e-12)


def test_covariance_is_positive_definite_and_turns_with_the_structure(structure_factory):
    potential = potential_of("evidential")
    method = potential.methods["evidential"]
    atoms = structure_factory(ELEMENTS[:2], seed=1)
    found = []
    for matrix in (np.eye(3), Rotation.random(rng=5).as_matrix()):
        turned = atoms.copy()
        turned.set_cell(atoms.cell @ matrix.T)
        turned.positions = atoms.positions @ matrix.T
        inputs = inputs_of(potential, turned)
        evidence = method.evidence(potential.backbone(inputs), inputs[keys.SPECIES])
        found.append(evidence.aleatoric.numpy())
        assert (np.linalg.eigvalsh(found[-1]) > 0).all()
        assert (evidence.evidence > 0).all()
    np.testing.assert_allclose(found[1], matrix @ found[0] @ matrix.T, rtol=1e-9, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(found[0])
    assert (eigenvalues[:, 2] / eigenvalues[:, 0]).max() > 1.05  # an ellipsoid, not a sphere


def test_much_evidence_is_a_gaussian_and_little_is_all_epistemic():
    method, atoms = random_method(Evidential), random_atoms(5)
    found = method.evidence(atoms.features, atoms.species)
    much = found._replace(evidence=torch.full_like(found.evidence, 1e8))
    got = method.log_density(much, atoms.errors).detach()
    for i in range(5):
        gaussian = multivariate_normal(np.zeros(3), found.aleatoric[i].detach())
        assert float(got[i]) == pytest.approx(gaussian.logpdf(atoms.errors[i]), rel=1e-6)
    with torch.no_grad():
        method.log_sizes.element_bias.weight[:, 1] = -1e3  # at its bound
    fields = method(atoms.features, atoms.energy, atoms.species)
    total, aleatoric, epistemic = (fields[name].detach() for name in Evidential.FIELDS)
    assert (epistemic > 3 * aleatoric).all() and torch.isfinite(total).all()


def test_evidence_of_wrong_predictions_is_penalised():
    method, atoms = random_method(Evidential), random_atoms()
    found = method.evidence(atoms.features, atoms.species)
    inverse = torch.linalg.inv(found.aleatoric)
    square = torch.einsum("ia,iab,ib->i", atoms.errors, inverse, atoms.errors)
    total = found.aleatoric.diagonal(dim1=1, dim2=2).sum(1) / 3 * (1 + 1 / found.evidence)
    nll = -method.log_density(found, atoms.errors).mean() - 1.5 * torch.log(
        2 * math.pi * total.mean()
    )
    penalty = PENALTY * (found.evidence * square / 3).mean()
    expected = float((2 / 3 * total.mean() * (nll + penalty)).detach())
    assert float(method.loss(atoms).forces.detach()) == pytest.approx(expected, rel=1e-9)
    assert method.loss(atoms).energy is None


# committee ---------------------------------------------------------------------------------------
def committee_and_output(num_atoms=9, seed=0):
    """A committee head of two elements, its output for random features, and the species."""
    torch.manual_seed(seed)
    head = CommitteeEnergy(3, 6, 2, 32, 0.75).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    for part in head.parts():
        part.scale.fill_(0.03)
    head.set_bin_width(0.02)
    species = torch.arange(num_atoms) % 2
    with torch.no_grad():
        return head, head(torch.randn(num_atoms, 6, dtype=torch.float64), species), species


def test_fields_of_a_committee_are_those_of_its_densities_in_common_bins():
    """Masses as differences of the members' distribution functions, which are piecewise linear."""
    head, energy, species = committee_and_output()
    head.centers.copy_(torch.tensor([[0.01, -0.02, 0.03], [0.0, 0.017, -0.005]]))
    fields = head.fields(energy, species)
    edges = (np.arange(33) - 16) * 0.02
    shifts = []
    for i in range(9):
        centers = head.centers[species[i]].double().numpy()
        anchors = energy.anchor[i].numpy() - centers
        probs = torch.softmax(energy.logits[i], 1).numpy()
        shifts.append(np.ptp(anchors) / 0.02)
        masses, means = [], []
        for anchor, p in zip(anchors, probs, strict=True):
            cumulative = np.concatenate([[0], np.cumsum(p)])
            at = np.interp(anchors.mean() + edges, anchor + edges, cumulative)
            at[[0, -1]] = 0, 1  # what is beyond the ends goes to the last bins
            masses.append(np.diff(at))
            means.append(anchor + p @ (edges[:-1] + 0.01))
        masses = np.array(masses)
        entropy = [-(m[m > 0] * np.log(m[m > 0])).sum() for m in [masses.mean(0), *masses]]
        aleatoric = np.mean(entropy[1:])
        assert float(fields["committee_entropy"][i]) == pytest.approx(entropy[0], rel=1e-9)
        assert float(fields["aleatoric_entropy"][i]) == pytest.approx(aleatoric, rel=1e-9)
        information = float(fields["mutual_information"][i])
        assert information == pytest.approx(entropy[0] - aleatoric, abs=1e-9)
        assert 0 < information < math.log(3)
        std = float(fields["committee_energy_std"][i])
        assert std == pytest.approx(np.std(means, ddof=1), rel=1e-9)
    assert max(shifts) > 1  # bins apart, not all alike


def test_members_that_agree_have_no_information_and_those_far_apart_all_of_it():
    head, energy, species = committee_and_output()
    same = energy._replace(
        anchor=energy.anchor[:, :1].expand(-1, 3), logits=energy.logits[:, :1].expand(-1, 3, -1)
    )
    fields = head.fields(same, species)
    assert float(fields["mutual_information"].max()) < 1e-12
    assert float(fields["committee_energy_std"].max()) < 1e-9
    apart = same._replace(anchor=same.anchor + torch.tensor([-0.25, 0.0, 0.25]))
    logits = same.logits - 3 * head.heads[0].offsets ** 2  # narrow
    fields = head.fields(apart._replace(logits=logits), species)
    np.testing.assert_allclose(fields["mutual_information"], math.log(3), rtol=1e-3)
    np.testing.assert_allclose(fields["committee_energy_std"], 0.25, rtol=1e-6)


def test_energy_of_a_committee_is_the_mean_and_one_of_equals_is_the_head(structure_factory):
    potential = potential_of("committee")
    head = potential.energy_head
    inputs = inputs_of(potential, structure_factory(ELEMENTS[:2], seed=3))
    scalars, species = potential.backbone(inputs).scalars, inputs[keys.SPECIES]
    each = [part(scalars, species).energy for part in head.parts()]
    torch.testing.assert_close(head(scalars, species).energy, torch.stack(each).mean(0))
    assert float((each[0] - each[1]).abs().max()) > 1e-3


def test_partition_of_the_energy_among_elements_is_no_disagreement():
    """Constants per element and member that a training set cannot tell change no field."""
    head, energy, species = committee_and_output(40)
    frame = torch.arange(40) // 10
    errors = torch.zeros(40, 3, dtype=torch.float64)
    totals = torch.tensor([0.1, -0.3, 0.2, 0.1], dtype=torch.float64)
    nothing = Features(torch.zeros(40, 1), torch.zeros(9, 40, 1))

    def fields_of(energy):
        edges = torch.zeros(2, 0, dtype=torch.int64), totals[:0]
        atoms = Atoms(nothing, energy, species, frame, errors, totals, *edges)
        card = head.fit(atoms, atoms)
        return card["committee_raw_energy_size_ratio"], head.fields(energy, species)

    ratio, fields = fields_of(energy)
    gauge = torch.tensor([[0.3, -0.2, 0.1], [-0.2, 0.2, 0.0]], dtype=torch.float64)
    moved = energy._replace(anchor=energy.anchor + gauge[species])
    other_ratio, others = fields_of(moved)
    assert other_ratio == pytest.approx(ratio, rel=1e-4)
    for name, value in fields.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4, atol=1e-7, err_msg=name)
    # and the factor gives the total energies' disagreement the size of their errors
    total = torch.zeros(4, 3, dtype=torch.float64)
    total = total.index_add(0, frame, head.deviations(moved, species))
    size = float(head.factor) * float(total.var(1).mean().sqrt())
    assert size == pytest.approx(float(totals.square().mean().sqrt()), rel=1e-5)


def labelled_graphs(potential, structure_factory):
    """Two structures of nine atoms with energies near the model's and forces of zero."""
    graphs = []
    for seed in (3, 4):
        graph = inputs_of(potential, structure_factory(ELEMENTS[:2], seed=seed))
        energy = potential.atoms(graph)[1].energy.double().sum().reshape(1)
        graphs.append(
            graph
            | {
                fr.NUM_ATOMS: torch.tensor([9]),
                fr.VOLUME: torch.tensor([100.0], dtype=torch.float64),
                fr.TARGET_ENERGY: energy + 0.03,
                fr.TARGET_FORCES: torch.zeros(9, 3, dtype=torch.float64),
            }
        )
    return graphs


def test_members_of_a_singular_value_ensemble_share_all_but_their_singular_values():
    torch.manual_seed(0)
    head = CommitteeEnergy(3, 6, 2, 32, 0.75, singular=True)
    readouts = [part.anchor for part in head.parts()]
    first = readouts[0]
    scalars, species = torch.randn(5, 6), torch.tensor([0, 1, 0, 1, 1])
    seen = []
    for readout in readouts:
        for name in ("linear", "out", "element_bias", "bias"):
            assert getattr(readout, name) is getattr(first, name)
        weight = readout.u @ torch.diag(readout.singular_values) @ readout.v.T
        found = torch.linalg.svdvals(weight.detach())
        values = readout.singular_values.detach().abs().sort(descending=True).values
        torch.testing.assert_close(found, values)
        seen.append(found)
        # the same readout with that matrix as its hidden layer
        plain = Readout(6, 2, 1)
        plain.linear, plain.out, plain.element_bias = first.linear, first.out, first.element_bias
        plain.hidden.weight, plain.hidden.bias = torch.nn.Parameter(weight), first.bias
        got, want = (r(scalars, r.activations(scalars), species) for r in (readout, plain))
        torch.testing.assert_close(got, want)
    assert float((seen[0] - seen[1]).abs().max()) > 0.05
    num_own = sum(p.numel() for p in readouts[1].parameters()) - sum(
        p.numel() for m in (first.linear, first.out, first.element_bias) for p in m.parameters()
    )
    assert num_own == 6 + first.bias.numel()  # singular values; the bias is shared too


def test_forces_of_every_member_are_trained_in_turn(structure_factory):
    potential = potential_of("committee")
    head = potential.energy_head
    batch = fr.collate_graphs(labelled_graphs(potential, structure_factory))
    forces = [predict(potential, batch, False, turn).forces for turn in range(5)]
    mean = predict(potential, batch, False).forces
    torch.testing.assert_close(torch.stack(forces[:4]).mean(0), mean)
    torch.testing.assert_close(forces[4], forces[0])
    alone = copy.deepcopy(potential)
    for k in range(4):
        alone.energy_head = head.heads[k]
        expected = predict(alone, batch, False).forces
        torch.testing.assert_close(forces[k][:9], expected[:9])
        torch.testing.assert_close(forces[(k - 1) % 4][9:], expected[9:])


def test_bootstrap_draws_the_same_weights_for_a_frame_wherever_it_is():
    energies = torch.randn(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = losses.bootstrap_weights({fr.TARGET_ENERGY: energies}, 4)
    some = losses.bootstrap_weights({fr.TARGET_ENERGY: energies[[7, 3]]}, 4)
    assert torch.equal(some, weights[[7, 3]])
    for k in range(4):  # Poisson: mean and variance 1, no weight in 1/e of all cases
        share = np.bincount(weights[:, k].long(), minlength=5)[:5] / len(energies)
        np.testing.assert_allclose(share, poisson(1).pmf(range(5)), atol=0.015)
    correlation = np.corrcoef(weights.T.numpy()) - np.eye(4)
    assert np.abs(correlation).max() < 0.03


def test_frames_without_weight_train_no_member(structure_factory):
    potential = potential_of("committee")
    batch = fr.collate_graphs(labelled_graphs(potential, structure_factory))
    prediction = predict(potential, batch, False)
    own = by_member(prediction, batch)[1]
    part = potential.energy_head.heads[1]
    ones, first = (torch.tensor(w, dtype=torch.float64) for w in ([1.0, 1.0], [2.0, 0.0]))
    alone = fr.collate_graphs([labelled_graphs(potential, structure_factory)[0]])
    own_alone = by_member(predict(potential, alone, False), alone)[1]
    for name in energy_targets.NAMES:
        whole = energy_targets.energy_loss(name, part, own, batch).loss
        same = energy_targets.energy_loss(name, part, own, batch, ones).loss
        torch.testing.assert_close(whole, same, rtol=1e-12, atol=0)
        half = energy_targets.energy_loss(name, part, own, batch, first).loss
        expected = energy_targets.energy_loss(name, part, own_alone, alone).loss
        torch.testing.assert_close(half, expected, rtol=1e-9, atol=1e-15)
    for loss in (losses.energy_squared, losses.forces_squared):
        torch.testing.assert_close(
            loss(own, batch, first), loss(own_alone, alone), rtol=1e-9, atol=1e-15
        )


# bounds, size, runs ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [MeanVariance, Evidential])
def test_sizes_stay_finite_far_from_the_data(kind):
    method, atoms = random_method(kind).float(), random_atoms()
    far = Features(1e6 * atoms.features.scalars.float(), 1e6 * atoms.features.tensors.float())
    for value in method(far, atoms.energy, atoms.species).values():
        assert torch.isfinite(value).all() and (value > 1e-6).all() and (value < 1e3).all()
    loss = method.loss(atoms._replace(features=far, errors=atoms.errors.float()))
    assert math.isfinite(float(loss.forces.detach()))


@pytest.mark.parametrize("kind", [MeanVariance, Evidential])
def test_size_is_corrected_by_one_factor_and_the_raw_one_kept(kind):
    method, atoms = random_method(kind), random_atoms(200)
    name = kind.FIELDS[0]
    before = method(atoms.features, atoms.energy, atoms.species)[name].detach()
    method.factor.fill_(7.0)  # of an earlier calibration
    card = method.fit(atoms, atoms)
    after = method(atoms.features, atoms.energy, atoms.species)[name].detach()
    rmse = float(atoms.errors.square().mean().sqrt())
    assert float(after.square().mean().sqrt()) == pytest.approx(rmse, rel=1e-9)
    np.testing.assert_allclose(after / before, (after / before)[0], rtol=1e-9)
    raw = next(iter(card.values()))
    assert raw == pytest.approx(float(before.square().mean().sqrt()) / rmse, rel=1e-9)


METHODS = {
    "mean_variance": {"head": "scalar", "uncertainty": ["mean_variance"]},
    "evidential": {"uncertainty": ["evidential"], "dtype": "float32"},
}
MODELS = {
    **METHODS,
    "committee": {"head": "committee", "num_members": 3, "uncertainty": []},
    "svd_committee": {"head": "svd_committee", "num_members": 2, "uncertainty": []},
}


LEARNED = {"mean_variance": lambda m: m.log_std.out, "evidential": lambda m: m.log_sizes.out}


@pytest.fixture(scope="module", params=MODELS)
def finished(request, tmp_path_factory):
    """(name, configuration, checkpoint) of an uninterrupted run, calibrated."""
    return request.param, *run(tmp_path_factory.mktemp(request.param), request.param)


def run(folder, name):
    loss = {"member_frames": "bootstrap" if name == "committee" else "all"}
    config = configure(folder, model=MODELS[name], loss=loss)
    return config, train(config)


def test_run_trains_and_calibrates(finished, tmp_path):
    name, config, checkpoint = finished
    rows = numbers(config)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["valid_forces_rmse"] < rows[0]["valid_forces_rmse"]
    potential, elements, card = load_checkpoint(checkpoint)
    is_head = name.endswith("committee")
    method = potential.energy_head if is_head else potential.methods[name]
    learned = method.heads[1].delta if is_head else LEARNED[name](method)
    assert float(learned.weight.detach().abs().max()) > 0
    prefix = name.removeprefix("svd_")
    raw = [value for key, value in card["calibration"].items() if key.startswith(f"{prefix}_raw")]
    assert raw and all(0.01 < value < 100 for value in raw)
    np.testing.assert_allclose(method.factor.min(), 1 / max(raw), rtol=1e-5)
    assert set(potential.field_names()) == set(card["calibration"]["ranking"])
    path = export_potential(potential, elements, card, tmp_path / "hl.pt")
    assert prefix in model_file.describe(path)
    if is_head:  # the members have parted
        first, second = (head.anchor for head in method.parts()[:2])
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert a is b or not torch.equal(a, b)


def test_resumed_run_equals_the_uninterrupted_one(finished, tmp_path, monkeypatch):
    name, whole, _ = finished
    with monkeypatch.context() as patch:
        original = Notebook.on_train_epoch_end

        def interrupt(self, trainer, module):
            original(self, trainer, module)
            if trainer.current_epoch == 2:  # after the first epoch past the warm-up
                raise KeyboardInterrupt

        patch.setattr(Notebook, "on_train_epoch_end", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(tmp_path, name)
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    config = tmp_path / "run.yaml"
    train(config, resume=True)
    resumed, expected = last_state(config)["state_dict"], last_state(whole)["state_dict"]
    for key, value in expected.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("name", METHODS)
def test_in_the_warm_up_only_the_method_feels_its_loss(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    training = {"epochs": 2, "warmup_epochs": 2, "gradient_clip": 0.0}
    states = []
    for methods in ([name], []):
        model = {**METHODS[name], "uncertainty": methods}
        config = configure(tmp_path / f"{len(methods)}", model=model, training=training)
        train(config)
        states.append(last_state(config)["state_dict"])
    for key, value in states[1].items():
        assert torch.equal(states[0][key], value), key
    weights = [v for k, v in states[0].items() if k.startswith("potential.methods.") and "out" in k]
    assert float(weights[0].abs().max()) > 0


def test_likelihoods_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match=r"at most one .* got 'evidential, mean_variance'"):
        ModelConfig(head="scalar", uncertainty=("evidential", "mean_variance"))
    with pytest.raises(ValueError, match=r"model.head must be scalar with uncertainty mean_var"):
        ModelConfig(uncertainty=("mean_variance",))
