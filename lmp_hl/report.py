"""What predictions and their uncertainties are worth, as one dict of numbers with intervals.

The sign of a control is chosen on the very data it is scored on, which favours the control; a field
of the model keeps its sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from lmp_hl import metrics
from lmp_hl.metrics import RankCorrelation, RiskCoverage
from lmp_hl.predictions import CONTROLS, Array, Predictions

FORCE_BOUND: Final = "force_bound"
EXTRAPOLATING: Final = "extrapolating"
LEVELS: Final = (0.5, 0.6827, 0.9, 0.95)
# an error is large above what only one atom in ten of the seen frames has
LARGE_ERROR: Final = 0.9

# key -> what a reader should know, one sentence
MEANINGS: Final = {
    "size_ratio": "RMS(predicted) / RMS(error); 1 is right, above is cautious, below too sure",
    "reliability_slope": (
        "error against predicted size, both logarithms; 1 is right, 0 says nothing about size"
    ),
    "miscalibration_area": "between stated and observed coverage of intervals; 0 is right, ½ worst",
    "ence": "mean of |predicted - true| / predicted over twelve classes of predicted size",
    "gaussian_nll_nats": "surprise at a force component, eV/Å; lower is better",
    "energy_score_meV_per_Angstrom": "size and ranking of vectors in one score; lower is better",
    "sharpness_meV_per_Angstrom": "RMS(predicted): among calibrated ones the smaller is better",
    "growth": "(predicted held-out/seen) / (true held-out/seen); below 1 it does not grow enough",
    "pooled": "rank correlation with the force error over all atoms, mostly chemistry",
    "within_element": "the same among atoms of one element",
    "within_config_type": "the same among atoms of one element in one kind of structure",
    "within_site": "the same for one atom of the molecule over all frames",
    "per_frame": "rank correlation of the frame's mean with its RMS force error",
    "large_error": "AUROC of atoms with a larger error than 90 % of the seen atoms; ½ is chance",
    "risk_coverage": "error avoided by leaving out distrusted atoms; 1 is best, 0 is chance",
    "auroc_mean": "AUROC of held-out against seen frames by the frame's mean; ½ is chance",
    "auroc_max": "the same by the frame's largest value",
}


@dataclass(frozen=True)
class _Resampling:
    num_resamples: int
    seed: int

    def intervals(self, statistic: Any, *num_frames: int) -> list[dict[str, float]]:
        value, draws = metrics.bootstrap(statistic, num_frames, self.num_resamples, self.seed)
        return [
            metrics.percentile_interval(float(v), draws[:, k]).as_dict()
            for k, v in enumerate(value)
        ]

    def interval(self, statistic: Any, *num_frames: int) -> dict[str, float]:
        return self.intervals(statistic, *num_frames)[0]


# errors and calibration -------------------------------------------------------------------------
def _accuracy(p: Predictions, resampling: _Resampling) -> dict[str, Any]:
    """RMSE of energy, forces and stress."""
    energy_error = 1e3 * (p.energy - p.energy_true) / p.num_atoms
    force_error = 1e3 * p.error
    report: dict[str, Any] = {
        "num_frames": p.num_frames,
        "num_atoms": int(p.num_atoms.sum()),
        "energy_rmse_meV_per_atom": resampling.interval(
            lambda w: metrics.rmse(energy_error, w), p.num_frames
        ),
        "energy_mae_meV_per_atom": metrics.mae(energy_error),
        "forces_rmse_meV_per_Angstrom": resampling.interval(
            lambda w: metrics.rmse(force_error, w[p.frame]), p.num_frames
        ),
        "forces_mae_meV_per_Angstrom": metrics.mae(1e3 * (p.forces - p.forces_true)),
    }
    stress_error = 1e3 * (p.stress - p.stress_true)
    known = np.isfinite(stress_error).all(axis=(1, 2))
    if known.any():
        per_frame = np.sqrt((stress_error**2).mean(axis=(1, 2)))
        report["stress_rmse_meV_per_Angstrom3"] = resampling.interval(
            lambda w: metrics.rmse(per_frame[known], w[known]), p.num_frames
        )
    return report


def _calibration(p: Predictions, std: Array, resampling: _Resampling) -> dict[str, Any]:
    """Whether `std` (num_atoms in all,) has the size of a force component's error, eV/Å."""
    error, vectors = p.error, p.forces - p.forces_true
    signed, thrice, frame = vectors.ravel(), np.repeat(std, 3), np.repeat(p.frame, 3)
    names = (
        "size_ratio", "reliability_slope", "ence", "miscalibration_area", "gaussian_nll_nats",
        "energy_score_meV_per_Angstrom", "sharpness_meV_per_Angstrom",
    )  # fmt: skip

    def statistics(w: Array) -> list[float]:
        atoms, components = w[p.frame], w[frame]
        curve = metrics.reliability_curve(std, error, weights=atoms)
        return [
            metrics.size_ratio(std, error, atoms),
            curve.slope,
            curve.ence,
            metrics.miscalibration_area(thrice, signed, components),
            metrics.gaussian_nll(thrice, signed, components),
            1e3 * metrics.energy_score(std, vectors, atoms),
            1e3 * metrics.rmse(std, atoms),
        ]

    curve = metrics.reliability_curve(std, error)
    return {
        **dict(zip(names, resampling.intervals(statistics, p.num_frames), strict=True)),
        "coverage": {str(level): metrics.coverage(thrice, signed, level) for level in LEVELS},
        "reliability": {
            "predicted_eV_per_Angstrom": curve.predicted.tolist(),
            "observed_eV_per_Angstrom": curve.observed.tolist(),
            "count": curve.count.tolist(),
        },
    }


def _promises(p: Predictions, resampling: _Resampling) -> dict[str, Any]:
    """How often force_bound and extrapolating keep what they promise for an atom of a frame."""
    kept = {}
    if FORCE_BOUND in p.fields:
        kept["errors_within_force_bound"] = p.error <= p.fields[FORCE_BOUND]
    if EXTRAPOLATING in p.fields:
        kept["atoms_not_extrapolating"] = p.fields[EXTRAPOLATING] == 0
    # as promised: every frame counts the same, however many atoms it has
    shares = {n: p.per_frame(values.astype(np.float64), "mean") for n, values in kept.items()}
    return {
        name: resampling.interval(lambda w, x=share: float(w @ x / w.sum()), p.num_frames)
        for name, share in shares.items()
    }


def _energy_calibration(p: Predictions, name: str, resampling: _Resampling) -> dict[str, Any]:
    """Of the sizes that a field gives the errors of the frames' energies: ratio, rank of |ΔE|."""
    std, error = p.energy_std[name], p.energy - p.energy_true
    found = {
        "size_ratio": resampling.interval(lambda w: metrics.size_ratio(std, error, w), p.num_frames)
    }
    if p.num_frames > 1:
        found["spearman"] = resampling.interval(
            lambda w: metrics.spearman(std, np.abs(error), w), p.num_frames
        )
    return found


def _growth(
    data: Predictions, seen: Predictions, names: Sequence[str], resampling: _Resampling
) -> dict[str, Any]:
    """By how much a size grows from seen to held-out frames, over the growth of the error."""

    def ratio(w: Array, w_seen: Array, name: str) -> float:
        far = metrics.size_ratio(data.signals[name], data.error, w[data.frame])
        near = metrics.size_ratio(seen.signals[name], seen.error, w_seen[seen.frame])
        return far / near

    return {
        name: resampling.interval(
            lambda w, w_seen, name=name: ratio(w, w_seen, name), data.num_frames, seen.num_frames
        )
        for name in names
    }


def _parts(p: Predictions, labels: NDArray[Any], names: Mapping[Any, str]) -> dict[str, Any]:
    """Force RMSE and size ratio of the atoms with each label."""
    error = p.error
    parts = {}
    for label, name in names.items():
        chosen = labels == label
        parts[name] = {
            "num_atoms": int(chosen.sum()),
            "forces_rmse_meV_per_Angstrom": 1e3 * metrics.rmse(error[chosen]),
            "size_ratio": {
                n: metrics.size_ratio(p.fields[n][chosen], error[chosen]) for n in p.sizes
            },
        }
    return parts


# rankings ---------------------------------------------------------------------------------------
def with_constants(p: Predictions, reference: Predictions) -> Predictions:
    """Predictions with the controls that are constant per element and, where known, per site.

    Args:
        p: to extend.
        reference: whose force errors, RMS, are the constants; an element or site it lacks gets the
            RMS of all its atoms.
    """

    def constants(mine: NDArray[Any], theirs: NDArray[Any]) -> Array:
        labels, index = np.unique(mine, return_inverse=True)
        rest = metrics.rmse(reference.error)
        values = [
            metrics.rmse(reference.error[theirs == label]) if (theirs == label).any() else rest
            for label in labels
        ]
        return np.maximum(np.array(values), 1e-12)[index]

    added = {"element_error": constants(p.numbers, reference.numbers)}
    site, known = p.groups().get("within_site"), reference.groups().get("within_site")
    num_atoms = p.num_atoms[0]
    same = np.array_equal(p.numbers[:num_atoms], reference.numbers[: reference.num_atoms[0]])
    if site is not None and known is not None and same:
        added["site_error"] = constants(site, known)
    return replace(p, controls={**p.controls, **added})


def _scores(
    names: Sequence[str],
    controls: Iterable[str],
    statistic: Callable[..., Any],
    num_frames: Sequence[int],
    nothing: float,
    resampling: _Resampling,
) -> dict[str, Any]:
    """Intervals of each signal's score and of its lead over the best control of the same draw.

    A control below `nothing` (0 for a correlation, ½ for an AUROC) is turned round, once, on the
    full data.
    """
    value, draws = metrics.bootstrap(
        statistic, num_frames, resampling.num_resamples, resampling.seed
    )
    is_control = np.isin(names, list(controls))
    turned = is_control & (value < nothing)
    value, draws = (np.where(turned, 2 * nothing - x, x) for x in (value, draws))
    scores: dict[str, Any] = {}
    for k, name in enumerate(names):
        interval = metrics.percentile_interval(float(value[k]), draws[:, k])
        scores[name] = interval.as_dict()
        if is_control[k]:
            scores[name]["sign"] = -1 if turned[k] else 1
        else:
            lead = value[k] - value[is_control].max()
            leads = draws[:, k] - draws[:, is_control].max(axis=1)
            scores[name]["over_best_control"] = metrics.percentile_interval(
                float(lead), leads
            ).as_dict()
    return scores


def _ranking(p: Predictions, large: float, resampling: _Resampling) -> dict[str, Any]:
    """Scores of every signal for "which atoms" and "which frames", by kind; see MEANINGS.

    Args:
        p: the frames.
        large: eV/Å, from where a force error counts as large.
        resampling: of the frames.
    """
    names, controls, error, frame = list(p.signals), list(p.controls), p.error, p.frame
    signals = list(p.signals.values())
    ranking = {}
    for kind, groups in p.groups().items():
        correlation = RankCorrelation(signals, error, groups)
        ranking[kind] = _scores(
            names, controls, lambda w, c=correlation: c(w[frame]), [p.num_frames], 0.0, resampling
        )
    if p.num_frames > 1:
        per_frame = np.sqrt(p.per_frame(error**2, "mean"))
        frames = RankCorrelation([p.per_frame(s, "mean") for s in signals], per_frame)
        ranking["per_frame"] = _scores(names, controls, frames, [p.num_frames], 0.0, resampling)
    hit = error > large
    if hit.any() and not hit.all():

        def areas(w: Array) -> list[float]:
            low, high = w[frame[~hit]], w[frame[hit]]
            return [metrics.auroc(s[~hit], s[hit], low, high) for s in signals]

        ranking["large_error"] = _scores(names, controls, areas, [p.num_frames], 0.5, resampling)
    signs = [ranking["pooled"][n].get("sign", 1) for n in names]
    kept = RiskCoverage([sign * s for sign, s in zip(signs, signals, strict=True)], error)
    ranking["risk_coverage"] = _scores(
        names, controls, lambda w: kept(w[frame]), [p.num_frames], 0.0, resampling
    )
    return ranking


def _separation(p: Predictions, seen: Predictions, resampling: _Resampling) -> dict[str, Any]:
    names = list(p.signals)
    separation = {}
    for how in ("mean", "max"):
        low = [seen.per_frame(seen.signals[n], how) for n in names]
        high = [p.per_frame(p.signals[n], how) for n in names]

        def areas(w_low: Array, w_high: Array, low: Any = low, high: Any = high) -> list[float]:
            return [metrics.auroc(a, b, w_low, w_high) for a, b in zip(low, high, strict=True)]

        separation[how] = _scores(
            names, list(p.controls), areas, [seen.num_frames, p.num_frames], 0.5, resampling
        )
    return separation


def _separation_by_error(
    p: Predictions, seen: Predictions, resampling: _Resampling
) -> dict[str, Any]:
    """AUROC of the true force error: what an error estimate that is never wrong would reach."""
    found = {}
    for how in ("mean", "max"):
        low, high = seen.per_frame(seen.error, how), p.per_frame(p.error, how)

        def area(w_low: Array, w_high: Array, low: Array = low, high: Array = high) -> float:
            return metrics.auroc(low, high, w_low, w_high)

        found[how] = resampling.interval(area, seen.num_frames, p.num_frames)
    return found


def _best(scores: Mapping[str, Any], fields: Iterable[str]) -> str | None:
    """The field with the largest score; None without fields or ranks."""
    known = [f for f in fields if math.isfinite(scores[f]["value"])]
    return max(known, key=lambda f: scores[f]["value"], default=None)


def report(
    data: Predictions, seen: Predictions | None = None, num_resamples: int = 400, seed: int = 0
) -> dict[str, Any]:
    """All numbers as one dict that JSON can hold; the unit stands in the key.

    Args:
        data: the frames in question; with `seen` the frames held out of training.
        seen: frames like those the model was trained on. Constant controls and what counts as a
            large error come from these, else from `data`.
        num_resamples: bootstrap draws of whole frames; every interval holds 95 %.
        seed: of the draws.

    Returns:
        "sets": name -> errors; "calibration" of every size and constant control in eV/Å;
        "promises" kept; "energy_calibration" of frames;
        "growth" (with `seen`): the same -> MEANINGS; "ranking": name -> kind of MEANINGS -> signal
        -> score; "separation" (with `seen`): frame mean or max -> signal -> AUROC of held-out
        against seen, and "separation_by_error", the same of the true force error; "best_field":
        kind -> field; "controls": what they are.
    """
    resampling = _Resampling(num_resamples, seed)
    reference = data if seen is None else seen
    large = float(np.quantile(reference.error, LARGE_ERROR))
    data = with_constants(data, reference)
    if seen is not None:
        seen = with_constants(seen, reference)
    constants = [n for n in ("element_error", "site_error") if n in data.controls]
    sizes = [*data.sizes, *constants]
    sets = {"data": data} if seen is None else {"held out": data, "seen": seen}
    out: dict[str, Any] = {"sets": {}, "ranking": {}}
    for name, p in sets.items():
        elements = {z: chemical_symbols[z] for z in np.unique(p.numbers)}
        kinds = {k: str(k) for k in np.unique(p.config_type)}
        out["sets"][name] = {
            **_accuracy(p, resampling),
            "calibration": {
                n: _calibration(p, p.signals[n], resampling) for n in sizes if n in p.signals
            },
            "promises": _promises(p, resampling),
            "energy_calibration": {n: _energy_calibration(p, n, resampling) for n in p.energy_std},
            "by_element": _parts(p, p.numbers, elements),
            "by_config_type": _parts(p, p.kinds, kinds),
        }
        out["ranking"][name] = _ranking(p, large, resampling)
    out["large_error_eV_per_Angstrom"] = large
    if seen is not None:
        out["growth"] = _growth(data, seen, sizes, resampling)
        out["separation"] = _separation(data, seen, resampling)
        out["separation_by_error"] = _separation_by_error(data, seen, resampling)
    first = out["ranking"][next(iter(sets))]
    out["best_field"] = {kind: _best(scores, data.fields) for kind, scores in first.items()}
    for how, scores in out.get("separation", {}).items():
        out["best_field"][f"auroc_{how}"] = _best(scores, data.fields)
    out["controls"] = {n: CONTROLS[n] for n in data.controls}
    out["bootstrap"] = {"num_resamples": num_resamples, "seed": seed, "level": 0.95}
    return out
