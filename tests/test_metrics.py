"""Metrics against closed forms and against scipy."""

import numpy as np
import pytest
import uncertainty_toolbox
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from lmp_hl import metrics


def test_rmse_and_mae_of_known_errors():
    assert metrics.rmse([3.0, -4.0]) == pytest.approx(np.sqrt(12.5))
    assert metrics.mae([3.0, -4.0]) == pytest.approx(3.5)
    assert metrics.rmse([3.0, -4.0], weights=[1, 3]) == pytest.approx(metrics.rmse([3, 4, 4, 4]))


def test_errors_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="errors: 1 values are not finite"):
        metrics.rmse([1.0, np.nan])


def test_spearman_is_one_for_a_monotone_signal_and_minus_one_reversed():
    error = np.array([0.1, 0.5, 2.0, 9.0])
    assert metrics.spearman(np.log(error), error) == pytest.approx(1.0)
    assert metrics.spearman(-error, error) == pytest.approx(-1.0)


def test_spearman_of_a_constant_signal_is_zero_and_of_a_constant_error_is_nan():
    assert metrics.spearman(np.ones(5), np.arange(5)) == 0.0
    assert np.isnan(metrics.spearman(np.arange(5), np.ones(5)))


def test_spearman_equals_scipy_with_ties_and_with_repeated_samples():
    rng = np.random.default_rng(0)
    signal, error = rng.integers(0, 9, 200), rng.integers(0, 30, 200)
    assert metrics.spearman(signal, error) == pytest.approx(spearmanr(signal, error).statistic)
    times = rng.integers(0, 4, 200)
    repeated = spearmanr(np.repeat(signal, times), np.repeat(error, times)).statistic
    assert metrics.spearman(signal, error, times) == pytest.approx(repeated)


def test_spearman_within_groups_is_the_weighted_mean_of_the_groups():
    rng = np.random.default_rng(1)
    group = np.repeat(["H", "C", "O"], [50, 20, 7])
    error = rng.random(77)
    signal = error + rng.random(77)
    by_group = [spearmanr(signal[group == g], error[group == g]).statistic for g in "HCO"]
    expected = np.average(by_group, weights=[50, 20, 7])
    order = rng.permutation(77)
    found = metrics.spearman_within(signal[order], error[order], group[order])
    assert found == pytest.approx(expected)


def test_a_signal_that_only_knows_the_group_ranks_pooled_but_not_within():
    rng = np.random.default_rng(2)
    group = np.repeat([0, 1], 100)
    error = rng.random(200) + 10 * group
    assert metrics.spearman(group, error) > 0.8
    assert metrics.spearman_within(group, error, group) == 0.0


def test_single_atoms_of_a_group_do_not_count():
    error = np.array([1.0, 2.0, 3.0, 7.0])
    assert metrics.spearman_within(error, error, ["a", "a", "a", "b"]) == pytest.approx(1.0)
    assert np.isnan(metrics.spearman_within([1.0], [2.0], ["a"]))


def test_auroc_of_separated_mixed_and_swapped_sets():
    assert metrics.auroc([1, 2, 3], [4, 5]) == 1.0
    assert metrics.auroc([4, 5], [1, 2, 3]) == 0.0
    assert metrics.auroc([1, 1], [1, 1]) == 0.5
    assert metrics.auroc([0, 2], [1, 3]) == pytest.approx(0.75)
    assert metrics.auroc([0, 2], [1, 3], [0, 1], [1, 1]) == pytest.approx(0.5)


def test_auroc_equals_scikit_learn_with_ties_and_weights():
    rng = np.random.default_rng(6)
    low, high = rng.integers(0, 20, 60), rng.integers(5, 25, 40)
    weights = rng.integers(0, 3, 100)
    label = np.repeat([0, 1], [60, 40])
    theirs = roc_auc_score(label, np.concatenate([low, high]), sample_weight=weights)
    assert metrics.auroc(low, high, weights[:60], weights[60:]) == pytest.approx(theirs)


def test_calibration_of_known_gaussians():
    rng = np.random.default_rng(3)
    num = 40_000
    std = np.exp(rng.normal(-2, 0.4, num))
    errors = rng.normal(0, std)
    # the mean of e² has relative error sqrt(E[e⁴]/E[e²]² - 1)/sqrt(num), the ratio half; 5 times it
    ratio_tolerance = 5 * 0.5 * np.sqrt((3 * np.exp(4 * 0.4**2) - 1) / num)
    assert metrics.size_ratio(std, errors) == pytest.approx(1, abs=ratio_tolerance)
    assert metrics.size_ratio(2 * std, errors) == pytest.approx(2, abs=2 * ratio_tolerance)
    for level in (0.5, 0.6827, 0.95):
        binomial = 5 * np.sqrt(level * (1 - level) / num)
        assert metrics.coverage(std, errors, level) == pytest.approx(level, abs=binomial)
    # entropy of the Gaussians; e²/2std² has standard deviation 1/sqrt(2), ln std has 0.4
    entropy = 0.5 * np.log(2 * np.pi * np.e) - 2
    nll_tolerance = 5 * np.hypot(0.4, np.sqrt(0.5)) / np.sqrt(num)
    assert metrics.gaussian_nll(std, errors) == pytest.approx(entropy, abs=nll_tolerance)
    assert metrics.gaussian_nll(2 * std, errors) > metrics.gaussian_nll(std, errors)


def test_reliability_curve_is_the_diagonal_for_known_gaussians():
    rng = np.random.default_rng(4)
    std = np.exp(rng.normal(-2, 0.4, 40_000))
    curve = metrics.reliability_curve(std, rng.normal(0, std), num_bins=8)
    assert curve.count.tolist() == [5000] * 8
    assert np.all(np.diff(curve.predicted) > 0)
    # 5000 errors of nearly one size: relative error of their rms 1/sqrt(2*5000) = 1 %, five times
    # that; the outermost bins span more sizes, which at most doubles it
    np.testing.assert_allclose(curve.observed, curve.predicted, rtol=0.1)


def test_reliability_slope_and_ence_of_known_gaussians():
    rng = np.random.default_rng(8)
    std = np.exp(rng.normal(-2, 0.6, 40_000))
    errors = rng.normal(0, std)
    calibrated = metrics.reliability_curve(std, errors)
    # observed sizes scatter by 1/sqrt(2*3333) = 1.2 % in 12 bins whose log sizes have a spread of
    # 0.55: 0.012 / (0.55 sqrt(12)) = 0.006 of the slope; five times that
    assert calibrated.slope == pytest.approx(1, abs=0.03)
    assert calibrated.ence < 0.03  # sqrt(2/pi) of 1.2 %, three times
    # predictions that differ twice as much (in the logarithm) as the errors do, and half as large
    spread = metrics.reliability_curve(std**2, errors)
    assert spread.slope == pytest.approx(0.5, abs=0.03)
    assert metrics.reliability_curve(std / 2, errors).ence == pytest.approx(1, abs=0.05)
    assert np.isnan(metrics.reliability_curve(np.ones(9), np.ones(9)).slope)
    assert np.isnan(metrics.reliability_curve([1.0, 2.0], [0.0, 1.0]).slope)
    # one atom in twelve without any error, all of them thought to be small
    still = np.concatenate([errors, np.zeros(3600)])
    curve = metrics.reliability_curve(np.concatenate([std, np.full(3600, 1e-3)]), still)
    assert curve.slope == pytest.approx(1, abs=0.03)


def test_a_weighted_reliability_curve_is_that_of_repeated_samples():
    rng = np.random.default_rng(9)
    std, errors = np.sort(rng.random(20)) + 0.1, rng.normal(size=20)
    times = np.tile([1, 3], 10)  # the five bins end between samples
    curve = metrics.reliability_curve(std, errors, 5, times)
    repeated = metrics.reliability_curve(np.repeat(std, times), np.repeat(errors, times), 5)
    np.testing.assert_allclose(curve.predicted, repeated.predicted)
    np.testing.assert_allclose(curve.observed, repeated.observed)
    assert curve.count.tolist() == [4] * 5


def test_miscalibration_area_equals_uncertainty_toolbox():
    rng = np.random.default_rng(10)
    std = np.exp(rng.normal(-2, 0.4, 3000))
    errors = rng.normal(0, std)
    for factor in (0.5, 1.0, 3.0):
        theirs = uncertainty_toolbox.miscalibration_area(
            errors, factor * std, np.zeros(3000), num_bins=2000, vectorized=True
        )
        # theirs interpolates the steps of F between 2000 points
        assert metrics.miscalibration_area(factor * std, errors) == pytest.approx(theirs, abs=1e-3)
    # every error inside every interval: F = 1, the area under 1 - p
    assert metrics.miscalibration_area(np.ones(5), np.zeros(5)) == pytest.approx(0.5)
    times = rng.integers(0, 3, 3000)
    repeated = metrics.miscalibration_area(np.repeat(std, times), np.repeat(errors, times))
    assert metrics.miscalibration_area(std, errors, times) == pytest.approx(repeated)


def test_gaussian_nll_and_sharpness_equal_uncertainty_toolbox():
    rng = np.random.default_rng(11)
    std, errors = rng.random(500) + 0.1, rng.normal(size=500)
    theirs = uncertainty_toolbox.nll_gaussian(errors, std, np.zeros(500))
    assert metrics.gaussian_nll(std, errors) == pytest.approx(theirs)
    assert metrics.rmse(std) == pytest.approx(uncertainty_toolbox.sharpness(std))


def test_energy_score_equals_its_definition_by_sampling():
    rng = np.random.default_rng(12)
    x, other = rng.normal(size=(2, 400_000, 3))
    pair = np.linalg.norm(x - other, axis=1).mean() / 2
    for length in (0.0, 1e-3, 0.7, 3.0, 20.0):
        error = length * np.array([0.6, 0.0, 0.8])
        sampled = 2 * (np.linalg.norm(x - error / 2, axis=1).mean() - pair)
        # standard errors of the two means below 1.1/sqrt(4e5) and half of it, times 2, five times
        assert metrics.energy_score([2.0], [error]) == pytest.approx(sampled, abs=0.02)
    both = metrics.energy_score([1.0, 2.0], [[0, 0, 1], [0, 3, 0]], [3, 1])
    one, two = (metrics.energy_score([s], [e]) for s, e in ((1, [0, 0, 1]), (2, [0, 3, 0])))
    assert both == pytest.approx((3 * one + two) / 4)
    # proper: the true size scores best
    std = np.exp(rng.normal(-2, 0.4, 20_000))
    errors = rng.normal(size=(20_000, 3)) * std[:, None]
    scores = [metrics.energy_score(f * std, errors) for f in (0.7, 1.0, 1.4)]
    assert min(scores) == scores[1]
    with pytest.raises(ValueError, match=r"shape \(4,\) where \(num_samples, 3\)"):
        metrics.energy_score([1.0], np.ones(4))


def test_risk_coverage_gain_of_perfect_useless_and_known_signals():
    rng = np.random.default_rng(13)
    error = rng.random(4000)
    gain = metrics.RiskCoverage([error**3, np.ones(4000), rng.random(4000), -error], error)()
    assert gain[0] == pytest.approx(1)
    assert gain[1] == pytest.approx(0, abs=1e-12)
    assert gain[2] == pytest.approx(0, abs=0.1)
    # uniform errors: R(c) = c/2 with the best order, 1 - c/2 with the worst, ½ with any
    assert gain[3] == pytest.approx(-1, abs=0.02)
    two = metrics.RiskCoverage([[0, 0, 1, 1]], [1.0, 1.0, 3.0, 3.0])
    assert two() == pytest.approx(1)
    assert np.isnan(metrics.RiskCoverage([[1, 2]], [1.0, 1.0])()[0])


def test_risk_coverage_area_is_the_integral_of_the_mean_error_kept():
    rng = np.random.default_rng(14)
    error, signal = rng.random(300), rng.random(300)
    times = rng.integers(0, 3, 300)
    repeated = [np.repeat(v, times * 200) for v in (error, signal)]

    def area(e, s):
        kept = np.cumsum(e[np.argsort(s, kind="stable")])
        return (kept / np.arange(1, len(e) + 1)).mean()

    mean, best = repeated[0].mean(), area(repeated[0], repeated[0])
    expected = (mean - area(*repeated)) / (mean - best)
    # a sum over 60 000 steps for an integral
    assert metrics.RiskCoverage([signal], error)(times)[0] == pytest.approx(expected, abs=1e-3)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="std: 1 values are not positive"):
        metrics.size_ratio([0.0, 1.0], [1.0, 1.0])


def test_bootstrap_is_seeded_and_paired():
    def both(count):
        return [count @ np.arange(5), count @ np.arange(5) + 1]

    value, draws = metrics.bootstrap(both, [5], 50, seed=7)
    again = metrics.bootstrap(both, [5], 50, seed=7)[1]
    assert value.tolist() == [10, 11]
    np.testing.assert_array_equal(draws, again)
    np.testing.assert_array_equal(draws[:, 1] - draws[:, 0], 1)
    assert draws[:, 0].std() > 0


def test_bootstrap_interval_of_frames_covers_the_truth_where_atoms_would_not():
    """Twenty atoms of a frame share one value: an interval over atoms believes them all."""
    rng = np.random.default_rng(5)
    num_trials, num_frames, num_atoms = 200, 40, 20
    frame = np.repeat(np.arange(num_frames), num_atoms)
    hits = {"frames": 0, "atoms": 0}
    for trial in range(num_trials):
        x = np.repeat(rng.normal(0, 1, num_frames), num_atoms)
        over = {
            "frames": metrics.bootstrap_interval(
                lambda c, x=x: np.average(x, weights=c[frame]), [num_frames], 200, seed=trial
            ),
            "atoms": metrics.bootstrap_interval(
                lambda c, x=x: np.average(x, weights=c), [x.size], 200, seed=trial
            ),
        }
        for name, interval in over.items():
            hits[name] += interval.low <= 0 <= interval.high
    # nominal 95 %; percentile intervals of 40 frames are about 2 % narrow and the share of 200
    # trials scatters by 1.5 %: four of those below
    assert 0.87 <= hits["frames"] / num_trials <= 1.0
    assert hits["atoms"] / num_trials < 0.6
