"""How far off a prediction is, how well an uncertainty ranks errors and whether its size is right.

Everything here is numpy in and numpy out. Errors of atoms in one frame are correlated, so intervals
come from resampling whole frames (`bootstrap`), and every statistic takes `weights`: how often each
sample counts, which in a bootstrap replicate is how often its frame was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf
from scipy.stats import norm, theilslopes

Array = NDArray[np.float64]


def _samples(name: str, values: ArrayLike, like: Array | None = None) -> Array:
    """Flatten to float64; refuse what is not finite or does not match `like`."""
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(array))} values are not finite")
    if like is not None and array.shape != like.shape:
        raise ValueError(f"{name}: {array.size} values where {like.size} are wanted")
    return array


def _weights(weights: ArrayLike | None, like: Array) -> Array:
    return np.ones_like(like) if weights is None else _samples("weights", weights, like)


# errors -----------------------------------------------------------------------------------------
def rmse(errors: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Root mean square sqrt(Σ w e² / Σ w), unit of `errors` (any shape); nan without samples."""
    e = _samples("errors", errors)
    w = _weights(weights, e)
    return float(np.sqrt(w @ e**2 / w.sum())) if w.sum() > 0 else float("nan")


def mae(errors: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean absolute error Σ w |e| / Σ w, unit of `errors` (any shape); nan without samples."""
    e = _samples("errors", errors)
    w = _weights(weights, e)
    return float(w @ np.abs(e) / w.sum()) if w.sum() > 0 else float("nan")


# ranking ----------------------------------------------------------------------------------------
class RankCorrelation:
    """Spearman's rank correlation of signals with one error, pooled or within groups, reweighted.

    Values are sorted once; each call then costs O(num_signals num_samples). Within each group g

        rho_g = cov_w(R_s, R_e) / sqrt(var_w(R_s) var_w(R_e)),   R the weighted mid-rank inside g,

    and the result is Σ W_g rho_g / Σ W_g with W_g the weight of the group. With integer weights
    this equals Spearman's rho (average ranks for ties) of the sample with every value repeated that
    often.

    A group whose signal is constant counts with rho_g = 0, because such a signal ranks nothing. A
    group whose error is constant (a single sample, say) cannot be ranked by anything and is left
    out.
    """

    def __init__(
        self, signals: Sequence[ArrayLike], error: ArrayLike, groups: ArrayLike | None = None
    ) -> None:
        """Sort the samples.

        Args:
            signals: num_signals times (num_samples,), any unit; larger should mean a larger error.
            error: (num_samples,) any unit.
            groups: (num_samples,) labels; None puts all samples in one group.
        """
        e = _samples("error", error)
        labels = np.zeros(e.size, dtype=np.int64) if groups is None else np.asarray(groups)
        if labels.shape != e.shape:
            raise ValueError(f"groups: shape {labels.shape} where {e.shape} is wanted")
        self._group = np.unique(labels, return_inverse=True)[1]
        self._num_groups = int(self._group.max()) + 1 if e.size else 0
        self._error = self._order(e)
        self._signals = [self._order(_samples("signal", s, e)) for s in signals]

    def _order(self, values: Array) -> NDArray[np.int64]:
        """Number the distinct (group, value) pairs in lexicographic order."""
        order = np.lexsort((values, self._group))
        g, v = self._group[order], values[order]
        new = np.ones(len(v), dtype=bool)
        new[1:] = (g[1:] != g[:-1]) | (v[1:] != v[:-1])
        codes = np.empty(len(v), dtype=np.int64)
        codes[order] = np.cumsum(new) - 1
        return codes

    def _sum(self, values: Array) -> Array:
        return np.bincount(self._group, values, self._num_groups).astype(np.float64)

    def _ranks(self, codes: NDArray[np.int64], w: Array, total: Array) -> Array:
        """Mid-ranks with the mean of each group taken away."""
        count = np.bincount(codes, w)
        # ranks run on through the groups; the offset this gives a group goes with its mean
        rank = (np.cumsum(count) - count / 2)[codes]
        return rank - (self._sum(w * rank) / total)[self._group]

    def __call__(self, weights: ArrayLike | None = None) -> Array:
        """One set of weights (num_samples,) to rho (num_signals,); nan where no group has ranks."""
        like = np.ones(len(self._group))
        w = _weights(weights, like)
        weight = self._sum(w)
        total = np.where(weight > 0, weight, 1.0)
        error = self._ranks(self._error, w, total)
        variance = self._sum(w * error * error)
        # ranks are multiples of 1/2: a variance below this is rounding
        ranked = variance > 1e-9 * total
        if not ranked.any():
            return np.full(len(self._signals), np.nan)
        rho = np.zeros((len(self._signals), self._num_groups))
        for row, codes in zip(rho, self._signals, strict=True):
            signal = self._ranks(codes, w, total)
            own = self._sum(w * signal * signal)
            used = ranked & (own > 1e-9 * total)
            row[used] = self._sum(w * signal * error)[used] / np.sqrt(own * variance)[used]
        return np.asarray(rho[:, ranked] @ weight[ranked] / weight[ranked].sum())


def spearman(signal: ArrayLike, error: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Spearman's rank correlation of an uncertainty with the error it should rank, pooled.

    Dimensionless in [-1, 1]; 0 for a constant signal, nan for a constant error. See
    `RankCorrelation`.
    """
    return float(RankCorrelation([signal], error)(weights)[0])


def spearman_within(
    signal: ArrayLike, error: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None
) -> float:
    """Spearman's rank correlation inside each group (element, site, ...), averaged by group size.

    A signal that only knows which group an atom belongs to scores 0. See `RankCorrelation`.
    """
    return float(RankCorrelation([signal], error, groups)(weights)[0])


def auroc(
    seen: ArrayLike,
    held_out: ArrayLike,
    seen_weights: ArrayLike | None = None,
    held_out_weights: ArrayLike | None = None,
) -> float:
    """Area under the ROC curve: P(held_out > seen) + ½ P(equal) for one frame drawn from each set.

    Args:
        seen: (num_seen,) one value per frame, any unit.
        held_out: (num_held_out,) the same, of frames that should score higher.
        seen_weights: (num_seen,) how often each frame counts.
        held_out_weights: (num_held_out,).

    Returns:
        Dimensionless in [0, 1]; 0.5 tells nothing; nan where the weights leave a set empty.
    """
    low, high = _samples("seen", seen), _samples("held_out", held_out)
    if not low.size or not high.size:
        raise ValueError(f"auroc needs frames in both sets, got {low.size} and {high.size}")
    codes = np.unique(np.concatenate([low, high]), return_inverse=True)[1]
    num = int(codes.max()) + 1
    below = np.bincount(codes[: low.size], _weights(seen_weights, low), num)
    here = np.bincount(codes[low.size :], _weights(held_out_weights, high), num)
    pairs = below.sum() * here.sum()
    return float(here @ (np.cumsum(below) - below / 2) / pairs) if pairs > 0 else float("nan")


class RiskCoverage:
    """How much error is avoided by leaving out the samples a signal distrusts, reweighted.

    Keep the fraction c of samples with the smallest signal; the risk R(c) is their mean error, and
    A = ∫ R(c) dc the area under the risk-coverage curve (Geifman et al., arXiv 1805.08206). What is
    returned compares it with leaving out at random, where R is the mean error for every c, and with
    knowing the errors themselves:

        gain = (mean - A_signal) / (mean - A_error),

    the prediction rejection ratio (Malinin et al., arXiv 2002.07650). Samples with equal signals
    are left out in random order, in expectation.
    """

    def __init__(self, signals: Sequence[ArrayLike], error: ArrayLike) -> None:
        """Sort the samples.

        Args:
            signals: num_signals times (num_samples,), any unit; larger should mean a larger error.
            error: (num_samples,) any unit, not negative.
        """
        self._error = _samples("error", error)
        columns = [self._error, *(_samples("signal", s, self._error) for s in signals)]
        self._codes = [np.unique(column, return_inverse=True)[1] for column in columns]

    def __call__(self, weights: ArrayLike | None = None) -> Array:
        """One set of weights (num_samples,) to the gains (num_signals,); 1 is best, 0 is chance.

        nan where all errors are equal.
        """
        w = _weights(weights, self._error)
        mean = w @ self._error / w.sum()
        best, *areas = (self._area(codes, w) for codes in self._codes)
        if not mean - best > 1e-12 * mean:
            return np.full(len(areas), np.nan)
        return np.asarray((mean - np.array(areas)) / (mean - best))

    def _area(self, codes: NDArray[np.int64], w: Array) -> float:
        count = np.bincount(codes, w)
        total = np.bincount(codes, w * self._error)
        count, total = count[count > 0], total[count > 0]
        # ∫ R over one value of the signal: the sum of errors is linear in the kept number n there,
        # R(n) = (T + t n') / (N + n') with t the mean error at this value
        before = np.cumsum(count) - count
        sums = np.cumsum(total) - total
        slope = total / count
        excess = sums - slope * before  # R = slope + excess / n
        with np.errstate(divide="ignore"):
            ratio = np.log(np.where(before > 0, (before + count) / before, 1.0))
        return float((slope * count + excess * ratio).sum() / count.sum())


# calibration ------------------------------------------------------------------------------------
def _sizes(std: ArrayLike, errors: ArrayLike) -> tuple[Array, Array]:
    e = _samples("errors", errors)
    s = _samples("std", std, e)
    if (s <= 0).any():
        raise ValueError(f"std: {np.count_nonzero(s <= 0)} values are not positive")
    return s, e


def size_ratio(std: ArrayLike, errors: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Predicted over true size of the error, sqrt(Σ w std² / Σ w e²); 1 is right, above 1 cautious.

    Args:
        std: (num_samples,) predicted standard deviation of each error, unit of `errors`.
        errors: (num_samples,) signed errors, or root mean squares over components.
        weights: (num_samples,).

    Returns:
        Dimensionless; inf when every error is zero.
    """
    s, e = _sizes(std, errors)
    w = _weights(weights, e)
    true = w @ e**2
    return float(np.sqrt(w @ s**2 / true)) if true > 0 else float("inf")


def gaussian_nll(std: ArrayLike, errors: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean negative log density of the errors under N(0, std²), ½ ln(2π std²) + e²/2std², in nats.

    The value depends on the unit of `errors` (a density has the inverse unit): compare only at one
    unit.
    """
    s, e = _sizes(std, errors)
    w = _weights(weights, e)
    return float(w @ -norm.logpdf(e, scale=s) / w.sum())


def coverage(
    std: ArrayLike, errors: ArrayLike, level: float = 0.6827, weights: ArrayLike | None = None
) -> float:
    """Fraction of errors with |e| < z std, z = Φ⁻¹((1 + level)/2); equals `level` when calibrated.

    Args:
        std: (num_samples,) predicted standard deviation, unit of `errors`.
        errors: (num_samples,) signed errors.
        level: nominal central probability of the Gaussian, in (0, 1).
        weights: (num_samples,).
    """
    if not 0 < level < 1:
        raise ValueError(f"level: wanted a probability in (0, 1), got {level}")
    s, e = _sizes(std, errors)
    w = _weights(weights, e)
    return float(w @ (np.abs(e) < norm.ppf((1 + level) / 2) * s) / w.sum())


def energy_score(std: ArrayLike, errors: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Energy score of N(0, std² I) for errors in three dimensions, unit of the errors; 0 is best.

    A proper score, E|X - e| - ½ E|X - X'| (Gneiting & Raftery 2007), in closed form with a = |e|/s,

        s [ sqrt(2/π) exp(-a²/2) + (a + 1/a) erf(a/√2) - 2/sqrt(π) ].

    Args:
        std: (num_samples,) standard deviation of every component.
        errors: (num_samples, 3) signed.
        weights: (num_samples,).
    """
    vectors = np.asarray(errors, dtype=np.float64)
    if vectors.ndim != 2 or vectors.shape[1] != 3:
        raise ValueError(f"errors: shape {vectors.shape} where (num_samples, 3) is wanted")
    s, length = _sizes(std, np.linalg.norm(vectors, axis=1))
    w = _weights(weights, length)
    a = np.maximum(length / s, 1e-6)  # (a + 1/a) erf(a/√2) -> sqrt(2/π) for small a
    mean = np.sqrt(2 / np.pi) * np.exp(-a * a / 2) + (a + 1 / a) * erf(a / np.sqrt(2))
    return float(w @ (s * (mean - 2 / np.sqrt(np.pi))) / w.sum())


def miscalibration_area(
    std: ArrayLike, errors: ArrayLike, weights: ArrayLike | None = None
) -> float:
    """Area between observed and nominal coverage of central Gaussian intervals, ∫|F(p) - p| dp.

    F(p) is the fraction of errors inside the central interval of probability p; 0 is calibrated,
    ½ the worst. uncertainty-toolbox integrates the same on a grid of p; here the steps of F are
    exact and samples may have weights.
    """
    s, e = _sizes(std, errors)
    w = _weights(weights, e)
    inside = erf(np.abs(e) / s / np.sqrt(2))  # the smallest p whose interval holds the error
    order = np.argsort(inside)
    fraction = np.concatenate([[0.0], np.cumsum(w[order]) / w.sum()])
    edges = np.concatenate([[0.0], inside[order], [1.0]])

    def primitive(p: Array) -> Array:
        return np.asarray((p - fraction) * np.abs(p - fraction) / 2)

    return float((primitive(edges[1:]) - primitive(edges[:-1])).sum())


@dataclass(frozen=True)
class Reliability:
    """Predicted against observed size of the error in bins of equal weight; unit of the errors."""

    predicted: Array  # (num_bins,) sqrt(mean std²)
    observed: Array  # (num_bins,) sqrt(mean e²)
    count: NDArray[np.int64]  # (num_bins,) samples in the bin

    @property
    def slope(self) -> float:
        """Slope of log observed over log predicted, the median over pairs of bins; 1 is right.

        Below 1 the predicted sizes differ more than the true ones. The median (Theil & Sen) and not
        least squares, because atoms whose force vanishes by symmetry have no error: a bin of those
        would decide. nan where all predictions are the same.
        """
        used = self.observed > 0
        x, y = np.log(self.predicted[used]), np.log(self.observed[used])
        if len(x) < 2 or x.max() - x.min() < 1e-6:
            return float("nan")
        return float(theilslopes(y, x).slope)

    @property
    def ence(self) -> float:
        """Expected normalised calibration error, mean of |predicted - observed| / predicted.

        Levi et al. (arXiv 1905.11659). Its value for a calibrated prediction is not 0: it grows
        with the square root of the number of bins (Pernot, arXiv 2305.11905).
        """
        return float((np.abs(self.predicted - self.observed) / self.predicted).mean())


def reliability_curve(
    std: ArrayLike, errors: ArrayLike, num_bins: int = 12, weights: ArrayLike | None = None
) -> Reliability:
    """Sort by predicted std, cut into bins of equal weight and compare root mean squares in each.

    Args:
        std: (num_samples,) predicted standard deviation, unit of `errors`.
        errors: (num_samples,) signed errors, or root mean squares over components.
        num_bins: how many bins; fewer are made when there are fewer samples.
        weights: (num_samples,).

    Returns:
        `Reliability`; a calibrated std gives observed = predicted in every bin.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins: wanted at least 1, got {num_bins}")
    s, e = _sizes(std, errors)
    w = _weights(weights, e)
    order = np.argsort(s, kind="stable")
    s, e, w = s[order], e[order], w[order]
    middle = (np.cumsum(w) - w / 2) / max(w.sum(), 1e-300)
    bins = np.minimum((middle * num_bins).astype(np.int64), num_bins - 1)
    weight = np.bincount(bins, w, num_bins)
    used = weight > 0
    return Reliability(
        predicted=np.sqrt(np.bincount(bins, w * s * s, num_bins)[used] / weight[used]),
        observed=np.sqrt(np.bincount(bins, w * e * e, num_bins)[used] / weight[used]),
        count=np.bincount(bins, w > 0, num_bins)[used].astype(np.int64),
    )


# intervals --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Interval:
    """A statistic with its bootstrap interval, all three in the unit of the statistic."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """{"value", "low", "high"}, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def percentile_interval(value: float, replicates: Array, level: float = 0.95) -> Interval:
    """Percentile interval: the central `level` of the finite replicates (num_resamples,)."""
    finite = replicates[np.isfinite(replicates)]
    if not finite.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def bootstrap(
    statistic: Callable[..., Any],
    num_frames: Sequence[int],
    num_resamples: int = 400,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Draw frames with replacement and evaluate a statistic on each draw.

    Frames, not atoms, are drawn: the atoms of one frame are correlated. Frames that follow each
    other in a trajectory are correlated too, which this does not see: intervals of such data are
    too narrow.

    Args:
        statistic: called with one array of draw counts (num_frames[k],) per set of frames; returns
            a float or a fixed number of them. The values of one draw belong together, so
            differences between them are paired.
        num_frames: number of frames in each set; each set is drawn by itself.
        num_resamples: number of draws.
        seed: of the draws; the same seed and sizes give the same draws.

    Returns:
        The statistic on all frames once (num_statistics,) and on the draws (num_resamples,
        num_statistics).
    """
    if any(n < 1 for n in num_frames):
        raise ValueError(f"bootstrap needs at least one frame in each set, got {list(num_frames)}")
    rng = np.random.default_rng(seed)
    value = np.atleast_1d(np.asarray(statistic(*(np.ones(n) for n in num_frames)), np.float64))
    draws = np.empty((num_resamples, value.size))
    for k in range(num_resamples):
        counts = [rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64) for n in num_frames]
        draws[k] = statistic(*counts)
    return value, draws


def bootstrap_interval(
    statistic: Callable[..., float],
    num_frames: Sequence[int],
    num_resamples: int = 400,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The percentile interval of one statistic; arguments as in `bootstrap`.

    With a single frame in every set there is nothing to resample and the interval has no width.
    """
    value, draws = bootstrap(statistic, num_frames, num_resamples, seed)
    return percentile_interval(float(value[0]), draws[:, 0], level)
