"""The histogram's mathematics and its traps: bias, truncation, support, entropy floor, widths."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lmp_hl import histogram

BINS = 128
EDGES = histogram.uniform_edges(BINS, 1.0)
CENTERS = histogram.bin_centers(EDGES)


def encode(targets, sigma, edges=EDGES):
    targets = torch.as_tensor(targets, dtype=edges.dtype)
    return histogram.hl_gauss(targets, edges, torch.full_like(targets, sigma))


def widths_of_ratio(edges, ratio):
    """Edges over the same support whose widths grow geometrically by `ratio` in all."""
    widths = np.geomspace(1.0, ratio, len(edges) - 1)
    steps = np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum()
    return edges[0] + (edges[-1] - edges[0]) * torch.from_numpy(steps)


@pytest.mark.parametrize("sigma", [0.5, 0.75, 2.0])
@pytest.mark.parametrize("ratio", [1.0, 20.0], ids=["uniform", "nonuniform"])
def test_target_probabilities_are_scipys_gaussian_masses(sigma, ratio):
    edges = widths_of_ratio(EDGES, ratio)
    targets = np.random.default_rng(0).uniform(-60, 60, 50)
    cdf = norm.cdf((edges.numpy()[None] - targets[:, None]) / sigma)
    expected = np.diff(cdf, axis=1) / (cdf[:, -1:] - cdf[:, :1])
    np.testing.assert_allclose(encode(targets, sigma, edges), expected, atol=1e-14)


@pytest.mark.parametrize(
    ("sigma", "smallest", "largest"),
    [(0.5, 1e-3, 3e-3), (0.75, 2e-6, 8e-6), (2.0, 0.0, 1e-13)],
)
def test_discretisation_bias_in_the_middle_of_the_support(sigma, smallest, largest):
    targets = torch.linspace(-3, 3, 601, dtype=torch.float64)
    bias = histogram.expectation(encode(targets, sigma), CENTERS) - targets
    assert smallest <= bias.abs().max() <= largest


@pytest.mark.parametrize(
    ("inside_in_sigma", "expected", "tolerance"),
    [(0, -0.69, 0.01), (2, -0.047, 0.003), (4, -1e-4, 5e-5)],
)
def test_truncation_bias_near_the_end_of_the_support(inside_in_sigma, expected, tolerance):
    target = float(EDGES[-1]) - 0.75 * inside_in_sigma
    bias = float(histogram.expectation(encode([target], 0.75), CENTERS)[0]) - target
    # for 4 sigma the discretisation bias of 5e-6 comes on top
    assert bias == pytest.approx(expected, abs=tolerance)
    mirrored = float(histogram.expectation(encode([-target], 0.75), CENTERS)[0]) + target
    assert mirrored == pytest.approx(-bias, abs=1e-12)


def test_targets_outside_the_support_are_counted_and_have_the_nearest_ends_distribution():
    end = float(EDGES[-1])
    targets = torch.tensor([-1e6, -end - 0.01, -end, 0.3, end, end + 5.0], dtype=torch.float64)
    assert histogram.outside_support(targets, EDGES).tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    probs = encode(targets, 0.75)
    assert torch.equal(probs[0], probs[2]) and torch.equal(probs[1], probs[2])
    assert torch.equal(probs[5], probs[4])
    # naive code divides nothing by nothing there, or gives such a target loss 0
    loss = histogram.cross_entropy(probs, torch.zeros_like(probs))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(BINS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.02, 0.75, 30.0])
def test_rows_sum_to_one_far_in_both_tails(dtype, sigma):
    edges = histogram.uniform_edges(BINS, 1.0, dtype)
    probs = encode(torch.linspace(-80, 80, 321, dtype=dtype), sigma, edges)
    assert probs.dtype == dtype and bool((probs >= 0).all())
    torch.testing.assert_close(probs.sum(1), torch.ones(321, dtype=dtype))


def test_float32_keeps_relative_digits_of_small_masses_on_both_sides():
    single = encode([0.2], 0.75, EDGES.float())[0].double()
    exact = encode([0.2], 0.75)[0]
    for k in (58, 60, 67, 69):  # 5.3 to 4.8 widths away: masses of 1e-7 and less
        assert float(single[k]) == pytest.approx(float(exact[k]), rel=1e-3)


def test_entropy_floor_of_a_perfect_prediction_and_ceiling():
    targets = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)[:-1]
    measured = float(histogram.entropy(encode(targets, 0.75)).mean())
    assert histogram.entropy_floor(0.75, 1.0) == pytest.approx(1.200, abs=1e-3)
    assert measured == pytest.approx(histogram.entropy_floor(0.75, 1.0), abs=1e-3)
    uniform = torch.full((1, BINS), 1.0 / BINS, dtype=torch.float64)
    assert float(histogram.entropy(uniform)) == pytest.approx(math.log(BINS))
    certain = torch.eye(BINS, dtype=torch.float64)[:1]
    assert float(histogram.entropy(certain)) == 0.0


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_entropy_of_logits_is_that_of_their_softmax_wherever_they_stand(offset):
    seeded = torch.Generator().manual_seed(0)
    for size in (0.0, 1.0, 30.0, 1000.0):
        logits = size * torch.randn(50, BINS, dtype=torch.float64, generator=seeded)
        expected = histogram.entropy(torch.softmax(logits, -1))
        found = histogram.entropy_of_logits(logits + offset)
        # an offset of 1e4 leaves 1e-12 of a logit
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-10)
        single = histogram.entropy_of_logits(logits.float())
        torch.testing.assert_close(single.double(), expected, rtol=0.0, atol=1e-6 * (1.0 + size))
    assert float(histogram.entropy_of_logits(torch.tensor([0.0, -1e30]))) == 0.0


def test_spread_far_below_one_bin_is_invisible_in_the_entropy():
    """Extra spread s gives 1/2 ln[2 pi e (0.6458 + s^2)]: choose the width against the error."""
    for spread in (0.05, 0.5, 2.0):
        mixed = encode([0.0], math.hypot(0.75, spread))
        expected = 0.5 * math.log(2 * math.pi * math.e * (0.75**2 + 1 / 12 + spread**2))
        assert float(histogram.entropy(mixed)[0]) == pytest.approx(expected, abs=5e-3)
    floor = histogram.entropy_floor(0.75, 1.0)
    assert float(histogram.entropy(encode([0.0], math.hypot(0.75, 0.05)))[0]) - floor < 5e-3


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_excess_variance_is_the_variance_added_to_a_perfect_prediction(spread):
    targets = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)[:-1]
    width, sigma = 0.04, 0.03
    edges = EDGES * width
    probs = encode(targets * width, math.hypot(sigma, spread * width), edges)
    excess = histogram.excess_variance(probs, histogram.bin_centers(edges), sigma, width)
    # single targets differ by where in its bin they fall; the mean over a bin does not
    assert float(excess.mean()) == pytest.approx((spread * width) ** 2, abs=1e-4 * width**2)


def test_raw_entropy_follows_the_bin_widths_and_differential_entropy_does_not():
    sigma = 6.0
    expected = 0.5 * math.log(2 * math.pi * math.e * sigma**2)
    stretched = widths_of_ratio(EDGES, 50.0)
    raw, differential = [], []
    for target in (-30.0, 30.0):
        probs = encode([target], sigma, stretched)
        raw.append(float(histogram.entropy(probs)[0]))
        differential.append(float(histogram.differential_entropy(probs, stretched)[0]))
    assert raw[0] - raw[1] > 0.9  # the same Gaussian, narrow bins against wide ones
    assert differential == pytest.approx([expected, expected], abs=0.03)
    probs = encode([0.0], sigma)
    assert float(histogram.differential_entropy(probs, EDGES)[0]) == pytest.approx(
        expected, abs=2e-3
    )


def test_expectation_and_variance_are_numpys():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(BINS), 4)
    mean = histogram.expectation(torch.from_numpy(probs), CENTERS)
    np.testing.assert_allclose(mean, np.average(np.tile(CENTERS, (4, 1)), 1, probs))
    for row, value in zip(probs, histogram.variance(torch.from_numpy(probs), CENTERS), strict=True):
        assert float(value) == pytest.approx(np.cov(CENTERS, aweights=row, ddof=0))


def test_cross_entropy_is_smallest_at_the_target_distribution():
    target = encode([0.3, -4.0], 0.75)
    best = histogram.cross_entropy(target, torch.log(target.clamp(min=1e-300)))
    torch.testing.assert_close(best, histogram.entropy(target))
    other = histogram.cross_entropy(target, torch.log(encode([0.9, -4.0], 1.0).clamp(min=1e-300)))
    assert bool((other > best).all())


def test_edges_are_uniform_centred_and_exact():
    edges = histogram.uniform_edges(5, 0.25)
    assert edges.tolist() == [-0.625, -0.375, -0.125, 0.125, 0.375, 0.625]
    assert histogram.bin_centers(edges).tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("num_bins", "bin_width", "named"),
    [
        (1, 0.1, "num_bins"),
        (8, 0.0, "bin_width"),
        (8, -1.0, "bin_width"),
        (8, math.nan, "bin_width"),
        (8, math.inf, "bin_width"),
    ],
)
def test_bad_bins_are_refused_by_name(num_bins, bin_width, named):
    with pytest.raises(ValueError, match=f"got.*set model.{named}"):
        histogram.uniform_edges(num_bins, bin_width)


def test_scripted_functions_equal_eager_ones():
    targets = torch.linspace(-70, 70, 29)
    edges = EDGES.float()
    sigma = torch.full_like(targets, 0.75)
    scripted = torch.jit.script(histogram.hl_gauss)
    probs = histogram.hl_gauss(targets, edges, sigma)
    assert torch.equal(scripted(targets, edges, sigma), probs)
    logits = torch.randn(probs.shape, generator=torch.Generator().manual_seed(0))
    for function, arguments in (
        (histogram.outside_support, (targets, edges)),
        (histogram.cross_entropy, (probs, logits)),
        (histogram.expectation, (probs, CENTERS.float())),
        (histogram.variance, (probs, CENTERS.float())),
        (histogram.excess_variance, (probs, CENTERS.float(), 0.75, 1.0)),
        (histogram.entropy, (probs,)),
        (histogram.differential_entropy, (probs, edges)),
        (histogram.entropy_floor, (0.75, 1.0)),
    ):
        result = torch.jit.script(function)(*arguments)
        torch.testing.assert_close(result, function(*arguments), rtol=0, atol=0)
