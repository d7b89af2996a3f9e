"""Figures of benchmarks/uncertainty.py, from the JSON of every row."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from uncertainty_scores import (
    WITHIN,
    Result,
    constants_of,
    kinds_of,
    mean,
    ranking,
    sets_of,
    sizes_of,
)

from lmp_hl.plots.style import BLUE, MUTED, RED, STYLE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS: Final = {"ID": BLUE, "OOD": RED}


def figures(groups: Mapping[str, Sequence[Result]], stem: Path) -> list[Path]:
    """Write stem_{reliability,ranking,growth}.png of the methods; the last where there is OOD."""
    with matplotlib.rc_context(STYLE):
        written = [
            _reliability(groups, Path(f"{stem}_reliability.png")),
            _ranking(groups, Path(f"{stem}_ranking.png")),
        ]
        if "growth" in next(iter(groups.values()))[0]["report"]:
            written.append(_growth(groups, Path(f"{stem}_growth.png")))
    return written


def _reliability(groups: Mapping[str, Sequence[Result]], path: Path) -> Path:
    """Predicted against observed size of the error near and far, one panel a method."""
    shown = {n: r[0] for n, r in groups.items() if sizes_of(r[0])}
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.2 * columns + 0.9, 2.2 * rows + 0.5), layout="constrained",
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    lowest, highest = [], []
    for ax, (name, result) in zip(axes.flat, shown.items(), strict=False):
        field = sizes_of(result)[0]
        for which, key in sets_of(result).items():
            curve = result["report"]["sets"][key]["calibration"][field]["reliability"]
            x, y = (
                1e3 * np.array(curve[f"{end}_eV_per_Angstrom"]) for end in ("predicted", "observed")
            )
            ax.plot(x, y, "o-", color=COLORS[which], ms=4, lw=1.2, label=which)
            lowest.append(min(x.min(), y.min()))
            highest.append(max(x.max(), y.max()))
        ax.set_title(name)
        ax.text(0.04, 0.94, field, transform=ax.transAxes, fontsize=7.5, color=MUTED, va="top")
    # a method whose training ran away may leave the frame; by symmetry some atoms have no error
    top = min(max(highest), 4 * float(np.median(highest)))
    ends = [max(min(lowest), top / 2e3) / 1.3, top * 1.3]
    for ax in axes.flat:
        ax.plot(ends, ends, color=MUTED, lw=0.8, zorder=0)
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for column in range(columns):  # panels above an empty place
        axes[(len(shown) - 1 - column) // columns, column].tick_params(labelbottom=True)
    axes.flat[0].legend(loc="lower right")
    figure.supxlabel("predicted error of a force component (meV/Å)", fontsize=9.5)
    figure.supylabel("observed (meV/Å)", fontsize=9.5)
    figure.savefig(path)
    plt.close(figure)
    return path


def _bars(ax: Any, labels: Sequence[str], intervals: Sequence[Any], colors: Sequence[str]) -> None:
    """Horizontal bars with intervals, the first on top."""
    rows = np.arange(len(labels))[::-1]
    for row, s, color in zip(rows, intervals, colors, strict=True):
        value = mean(s)
        ax.barh(row, value, color=color, height=0.7, alpha=0.85)
        ax.plot([mean(s, "low"), mean(s, "high")], [row, row], color="#1f2933", lw=1.2)
    ax.set_yticks(rows, labels)
    ax.set_ylim(-0.7, len(labels) - 0.3)
    ax.grid(axis="y", visible=False)


def _ranking(groups: Mapping[str, Sequence[Result]], path: Path) -> Path:
    """Spearman within the finest group of every method's best field, and of the controls."""
    first = next(iter(groups.values()))
    which, within = list(sets_of(first[0])), next(k for k in WITHIN if k in kinds_of(first[0]))
    entries: list[tuple[str, str, Sequence[Result], str]] = []
    shown: set[tuple[str, float]] = set()  # methods that share a network share fields
    for name, results in groups.items():
        controls = results[0]["report"]["controls"]
        scores = results[0]["report"]["ranking"][sets_of(results[0])[which[-1]]][within]
        hidden = {*controls, "excess_entropy", "force_entropy", "ensemble_raw_std"}
        if results is not first:
            hidden.add("distance")  # of the default uncertainty on another network
        for field, score in scores.items():
            value = (field, score["value"])
            if field not in hidden and value not in shown:
                entries.append((f"{name}: {field}", field, results, BLUE))
            shown.add(value)
    entries += [(f"control: {c}", c, first, MUTED) for c in first[0]["report"]["controls"]]
    figure, axes = plt.subplots(
        1, len(which), figsize=(2.6 + 3.0 * len(which), 0.9 + 0.23 * len(entries)),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for ax, s in zip(axes[0], which, strict=True):
        scores = [ranking(results, s, within, signal) for _, signal, results, _ in entries]
        _bars(ax, [e[0] for e in entries], scores, [e[3] for e in entries])
        best = max(mean(x) for x, e in zip(scores, entries, strict=True) if e[3] == MUTED)
        ax.axvline(best, color=RED, lw=0.9, ls="--")
        ax.set(title=s, xlabel=f"Spearman {within.replace('_', ' ')}")
    figure.savefig(path)
    plt.close(figure)
    return path


def _growth(groups: Mapping[str, Sequence[Result]], path: Path) -> Path:
    """Growth of every size from ID to OOD frames over the growth of the error."""
    first = next(iter(groups.values()))
    entries = [
        (f"{name}: {field}", [r["report"]["growth"][field] for r in results], BLUE)
        for name, results in groups.items()
        for field in sizes_of(results[0])
    ]
    entries += [
        (f"control: {c}", [r["report"]["growth"][c] for r in first], MUTED)
        for c in constants_of(first[0])
    ]
    figure, ax = plt.subplots(
        figsize=(6.2, 0.9 + 0.25 * len(entries)), layout="constrained"
    )  # fmt: skip
    _bars(ax, [e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries])
    ax.axvspan(0.7, 1.4, color="#e4e8ed", zorder=0)
    ax.axvline(1.0, color=MUTED, lw=0.8)
    ax.set(xlabel="(predicted OOD / ID) / (true OOD / ID)", xlim=(0, None))
    figure.savefig(path)
    plt.close(figure)
    return path
