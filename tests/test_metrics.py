"""Metrics against closed forms and against scipy."""

import numpy as np
import pytest
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
