"""What the histograms of a frame are trained towards: kernels, shares, pooled forms, the sum."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import make_potential
from test_training import configure, labelled_batch, last_state, numbers, quick_calibration

from lmp_hl import histogram, keys
from lmp_hl.nn.heads import TARGETS, HistogramEnergy
from lmp_hl.training import energy_targets, losses
from lmp_hl.training import frames as fr
from lmp_hl.training import train as train_module
from lmp_hl.training.config import load_config
from lmp_hl.training.prediction import Prediction
from lmp_hl.training.train import train

EDGES = histogram.uniform_edges(32, 1.0)
CENTERS = histogram.bin_centers(EDGES)
POSITIONS = torch.linspace(-3.0, 3.0, 601, dtype=torch.float64)


# kernels -----------------------------------------------------------------------------------------
def head_of(target, sigma=0.75):
    torch.set_default_dtype(torch.float64)
    try:
        return HistogramEnergy(8, 1, 32, sigma, target)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("target", "sigma"), [("hlgauss", 0.25), ("hlgauss", 0.75), ("two_hot", 1), ("one_hot", 1)]
)
def test_kernels_have_the_variance_and_entropy_that_the_head_says(target, sigma):
    head = head_of(target, sigma)
    targets = torch.arange(-1.0, 1.0, 1 / 128, dtype=torch.float64) + 1 / 256
    probs = head.target_probs(targets, torch.full_like(targets, head.sigma_in_bins))
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-12)
    square = (probs * (CENTERS - targets[:, None]) ** 2).sum(1).mean()
    assert float(square) == pytest.approx(head.kernel_variance(), abs=1e-4)
    assert float(histogram.entropy(probs).mean()) == pytest.approx(head.entropy_floor(), abs=1e-3)


def test_two_hot_keeps_the_mean_and_one_hot_is_the_narrow_limit_of_hl_gauss():
    two = histogram.two_hot(POSITIONS, EDGES)
    np.testing.assert_allclose(histogram.expectation(two, CENTERS), POSITIONS, atol=1e-12)
    assert ((two > 0).sum(1) <= 2).all()
    inside = POSITIONS + 1e-3  # not on an edge, where the kernel is halved
    narrow = histogram.hl_gauss(inside, EDGES, torch.full_like(inside, 1e-5))
    np.testing.assert_allclose(histogram.one_hot(inside, EDGES), narrow, atol=1e-12)
    for kernel in (histogram.two_hot, histogram.one_hot):  # what is outside sits at the end
        ends = kernel(torch.tensor([-99.0, 99.0], dtype=torch.float64), EDGES)
        assert ends[0, 0] == ends[1, -1] == 1


def test_floor_by_quadrature_agrees_with_the_closed_form_where_that_holds():
    for sigma in (0.7, 1.0, 2.0):
        exact = histogram.mean_entropy_of_kernel(sigma)
        assert exact == pytest.approx(histogram.entropy_floor(sigma, 1.0), abs=1e-3)
    assert histogram.mean_entropy_of_kernel(1e-3) == pytest.approx(0, abs=0.01)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match=r"model.target must be one of hlgauss.*got 'three_hot'"):
        head_of("three_hot")


# losses ------------------------------------------------------------------------------------------
def alike(target="hlgauss"):
    """A potential whose atoms all have the same histogram around their anchors."""
    potential = copy.deepcopy(make_potential())
    old = potential.energy_head
    head = potential.energy_head = head_of(target)
    head.anchor.load_state_dict(old.anchor.state_dict())
    head.scale.copy_(old.scale)
    head.set_bin_width(0.02)
    return potential.requires_grad_(False)


def anchor_gradient(potential, batch, loss):
    """Loss and its gradient in every atom's anchor."""
    head, anchors = potential.energy_head, []

    def keep(_module, _arguments, output):
        anchors.append(output.detach().requires_grad_(True))
        return anchors[-1]

    handle = head.anchor.register_forward_hook(keep)
    atoms = head(potential.backbone(batch).scalars, batch[keys.SPECIES])
    handle.remove()
    energy = torch.zeros(2, dtype=torch.float64).index_add(0, batch[fr.BATCH], atoms.energy)
    value = loss(Prediction(energy, torch.zeros(0), torch.zeros(0), atoms))
    return float(value.detach()), torch.autograd.grad(value, anchors[0])[0]


@pytest.mark.parametrize("error", [0.01, -0.05, 3.0], ids=["near", "bins away", "outside"])
@pytest.mark.parametrize("name", energy_targets.NAMES)
def test_every_form_pulls_anchors_of_equal_histograms_as_a_squared_error(
    structure_factory, name, error
):
    potential = alike()
    batch = labelled_batch(potential, structure_factory, error)
    head = potential.energy_head
    result = []

    def loss(prediction):
        result.append(energy_targets.energy_loss(name, head, prediction, batch))
        return result[0].loss

    value, gradient = anchor_gradient(potential, batch, loss)
    _, expected = anchor_gradient(potential, batch, lambda p: losses.energy_squared(p, batch))
    # the target's discretisation bias is 5e-6 bins, of 20 meV, of targets up to 3 bins away
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert math.isfinite(value) and math.isfinite(float(result[0].spread))
    assert float(result[0].outside) == (1.0 if error == 3.0 and name != "sum" else 0.0)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_pull_the_anchor_to_their_own_mean(structure_factory, target):
    potential = alike(target)
    batch = labelled_batch(potential, structure_factory, 0.017)
    head = potential.energy_head
    _, gradient = anchor_gradient(
        potential, batch, lambda p: losses.energy_histogram(head, p, batch).loss
    )
    # 0.017 eV per atom is 0.85 bins; one bin's centre is at 0.5
    mean = 0.5 * 0.02 if target == "one_hot" else 0.017
    # 2 dE / N of the mean of two frames, times the scale of the readout
    pull = np.full(11, -float(head.scale) * mean)
    np.testing.assert_allclose(gradient.flatten(), pull, rtol=1e-4)


def test_latent_shares_are_the_conditional_of_independent_gaussians(structure_factory, monkeypatch):
    """Given the sum of x_i ~ N(E_i, v_i): mean E_i + v_i dE / V and variance of the textbook."""
    potential = make_potential()  # random tau and delta, so variances differ
    batch = labelled_batch(potential, structure_factory, 0.05)
    head, seen = potential.energy_head, {}
    original = HistogramEnergy.target_probs

    def record(self, targets, sigma):
        seen.update(targets=targets, sigma=sigma)
        return original(self, targets, sigma)

    monkeypatch.setattr(HistogramEnergy, "target_probs", record)
    atoms = head(potential.backbone(batch).scalars, batch[keys.SPECIES])
    energy = torch.zeros(2, dtype=torch.float64).index_add(0, batch[fr.BATCH], atoms.energy)
    prediction = Prediction(energy, torch.zeros(0), torch.zeros(0), atoms)
    losses.energy_histogram(head, prediction, batch, latent=True)
    probs = torch.softmax(atoms.logits, 1)
    v = histogram.excess_variance(probs, head.offsets, 0.75, 1.0).clamp(min=losses.LATENT_FLOOR)
    for k in range(2):
        rows = (batch[fr.BATCH] == k).numpy()
        prior = np.diag(v[rows].numpy())
        ones = np.ones(rows.sum())
        gain = prior @ ones / (ones @ prior @ ones)
        mean = gain * float(batch[fr.TARGET_ENERGY][k] - energy[k]) / 0.02  # in bins
        offset = ((atoms.energy - atoms.anchor)[rows] / 0.02).numpy()
        np.testing.assert_allclose(seen["targets"][rows], offset + mean, rtol=1e-9)
        variance = np.diag(prior - np.outer(gain, ones @ prior)) + 0.75**2
        np.testing.assert_allclose(seen["sigma"][rows] ** 2, variance, rtol=1e-9)
    assert float(v.max() / v.min()) > 1.1


def test_sum_is_the_convolution_of_the_atoms_histograms(structure_factory):
    """Against the exact distribution: its cross-entropy with the same Gaussian target."""
    potential = make_potential()
    batch = labelled_batch(potential, structure_factory, 0.03)
    head = potential.energy_head
    atoms = head(potential.backbone(batch).scalars, batch[keys.SPECIES])
    energy = torch.zeros(2, dtype=torch.float64).index_add(0, batch[fr.BATCH], atoms.energy)
    prediction = Prediction(energy, torch.zeros(0), torch.zeros(0), atoms)
    probs = torch.softmax(atoms.logits, 1).numpy()
    expected = 0.0
    for k in range(2):
        rows = (batch[fr.BATCH] == k).numpy()
        n = rows.sum()
        exact = np.ones(1)
        for p in probs[rows]:
            exact = np.convolve(exact, p)
        grid = (np.arange(len(exact)) - 15.5 * n) * 0.02  # eV, from the sum of the anchors
        assert exact @ grid == pytest.approx(float((atoms.energy - atoms.anchor)[rows].sum()))
        variance = exact @ grid**2 - (exact @ grid) ** 2
        target = float(batch[fr.TARGET_ENERGY][k] - atoms.anchor[rows].sum())
        least = n * head.kernel_variance() * 0.02**2
        kernel = np.exp(-((grid - target) ** 2) / (2 * least))
        kernel /= kernel.sum()
        entropy = -(kernel * np.log(exact / 0.02)).sum()
        floor = 0.5 * np.log(2 * np.pi * np.e * least)
        expected += 2 * variance / n * (entropy - floor) / 2
    value = energy_targets.of_the_sum(head, prediction, batch).loss
    # four and seven skewed histograms are not yet quite Gaussian
    assert float(value) == pytest.approx(expected, rel=0.05)


def test_sum_widens_for_no_error_beyond_its_bound(structure_factory):
    """Or else the first errors after the warm-up, many times the spread, tear the network apart."""
    potential = alike()
    head = potential.energy_head

    def widening(error):
        batch = labelled_batch(potential, structure_factory, error)
        atoms = head(potential.backbone(batch).scalars, batch[keys.SPECIES])
        logits = atoms.logits.detach().requires_grad_()
        residual = head.bin_width * (torch.softmax(logits, 1) @ head.offsets)
        each = (atoms.anchor.detach() + residual).double()
        energy = torch.zeros(2, dtype=torch.float64).index_add(0, batch[fr.BATCH], each)
        prediction = Prediction(
            energy, torch.zeros(0), torch.zeros(0), atoms._replace(logits=logits)
        )
        loss = energy_targets.of_the_sum(head, prediction, batch).loss
        gradient = torch.autograd.grad(loss, logits)[0]
        return gradient + gradient.flip(1)  # of a symmetric histogram: the mean's share drops out

    near, far = widening(0.002), widening(3.0)
    torch.testing.assert_close(far, widening(6.0), rtol=1e-6, atol=1e-9)
    assert far.norm() > 2 * near.norm()


# runs --------------------------------------------------------------------------------------------
CONTROLS = {
    "latent": ({}, {"energy_target": "latent"}),
    "pooled_probs": ({}, {"energy_target": "pooled_probs"}),
    "pooled_logits": ({}, {"energy_target": "pooled_logits"}),
    "sum": ({}, {"energy_target": "sum"}),
    "no cross-entropy": ({}, {"cross_entropy": 0.0}),
    "one_hot": ({"target": "one_hot", "dtype": "float32"}, {}),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_train_by_configuration(tmp_path, monkeypatch, name):
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    model, loss = CONTROLS[name]
    config = configure(tmp_path, model=model, loss={"stress": 0.0, **loss})
    train(config)
    rows = numbers(config)
    assert rows[-1]["valid_forces_rmse"] < rows[0]["valid_forces_rmse"]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    state = last_state(config)["state_dict"]
    # what is fitted afterwards is still empty
    trained = [value for key, value in state.items() if ".methods." not in key]
    assert all(torch.isfinite(value).all() for value in trained)
    shape = state["potential.energy_head.delta.weight"].abs().max()
    assert float(shape) > 0


def test_without_cross_entropy_the_loss_is_that_of_squared_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    loss = {"stress": 0.0, "energy": 3.0, "forces": 10.0, "cross_entropy": 0.0}
    training = {"batch_size": 8, "ema_decay": 0}
    config = configure(tmp_path, loss=loss, training=training)
    train(config)
    for row in numbers(config):  # all frames have four atoms
        squares = 3 * 4 * (1e-3 * row["valid_energy_rmse"]) ** 2
        squares += 10 * (1e-3 * row["valid_forces_rmse"]) ** 2
        assert row["valid_loss"] == pytest.approx(squares, rel=1e-5)


def test_latent_shares_of_a_kernel_without_a_width_are_refused(tmp_path):
    config = configure(tmp_path, model={"target": "two_hot"}, loss={"energy_target": "latent"})
    with pytest.raises(ValueError, match=r"model.target must be hlgauss with .*: latent"):
        load_config(config)
