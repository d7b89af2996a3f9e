"""What the JSON of a row of benchmarks/uncertainty.py says, over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from uncertainty_rows import ABLATIONS, METHODS

Result = Mapping[str, Any]

WITHIN: Final = ("within_site", "within_config_type", "within_element")  # the finest there is
KINDS: Final = (
    "pooled", "within_element", "within_config_type", "within_site", "per_frame", "large_error",
    "risk_coverage", "auroc_mean", "auroc_max",
)  # fmt: skip


def sets_of(result: Result) -> dict[str, str]:
    """ID and OOD to the report's names for them."""
    names = result["report"]["sets"]
    return {"ID": "seen", "OOD": "held out"} if "held out" in names else {"ID": "data"}


def intervals_of(results: Sequence[Result], which: str, *path: str) -> list[Mapping[str, float]]:
    """The intervals at a path of each seed's report["sets"][ID or OOD]; [] where there is none."""
    found = []
    for result in results:
        place: Any = result["report"]["sets"].get(sets_of(result).get(which, ""), {})
        for key in path:
            place = place.get(key, {})
        if place:
            found.append(place)
    return found


def ranking(results: Sequence[Result], which: str, kind: str, signal: str) -> list[Any]:
    """Scores of a signal, each seed's."""
    found = []
    for result in results:
        report = result["report"]
        if kind.startswith("auroc"):
            scores = report.get("separation", {}).get(kind.removeprefix("auroc_"), {})
        else:
            scores = report["ranking"].get(sets_of(result).get(which, ""), {}).get(kind, {})
        if signal in scores:
            found.append(scores[signal])
    return found


def mean(intervals: Sequence[Mapping[str, float]], key: str = "value") -> float:
    """Over seeds, of the values or of one end of their intervals; nan without any."""
    values = [float("nan") if s[key] is None else s[key] for s in intervals]
    return float(np.mean(values)) if values else float("nan")


def cell_of(intervals: Sequence[Mapping[str, float]], form: str, interval: bool = True) -> str:
    """Mean over seeds ± half the bootstrap interval, mean over seeds."""
    value = mean(intervals)
    if not math.isfinite(value):
        return "-"
    if not interval:
        return format(value, form)
    return f"{value:{form}} ± {(mean(intervals, 'high') - mean(intervals, 'low')) / 2:{form}}"


def by_method(results: Sequence[Result], ablations: bool) -> dict[str, list[Result]]:
    """Scored seeds of the methods, or of the ablations, in their order."""
    groups: dict[str, list[Result]] = {}
    for name in METHODS:
        chosen = [r for r in results if r["method"] == name and "failed" not in r]
        if chosen and (name in ABLATIONS) == ablations:
            groups[name] = chosen
    return groups


def constants_of(result: Result) -> list[str]:
    """Controls with a size."""
    calibration = next(iter(result["report"]["sets"].values()))["calibration"]
    return [name for name in calibration if name in result["report"]["controls"]]


def sizes_of(result: Result) -> list[str]:
    """Fields with a size."""
    calibration = next(iter(result["report"]["sets"].values()))["calibration"]
    return [name for name in calibration if name not in result["report"]["controls"]]


def kinds_of(result: Result) -> list[str]:
    """Those of KINDS that the report has."""
    report = result["report"]
    ranked = next(iter(report["ranking"].values()))
    return [k for k in KINDS if k in ranked or ("separation" in report and k.startswith("auroc"))]
