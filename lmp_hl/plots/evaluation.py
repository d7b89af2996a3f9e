"""Figures of a model file against labelled frames: errors, and what uncertainties are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from lmp_hl.metrics import Interval, mae, reliability_curve, rmse

from .style import (
    BLUE,
    CYCLE,
    DENSITY,
    GREEN,
    GRID,
    INK,
    MUTED,
    RED,
    SET_COLORS,
    WARM,
    Array,
    field_label,
    new_figure,
    save,
    styled,
)

ERROR_BINS = 12  # of equal count, along a predicted error
MOST_IN_A_ROW = 4  # panels of rankings


def _note(ax: Axes, text: str, **kwargs: Any) -> None:
    """A quiet boxed remark in a corner of the axes."""
    where: dict[str, Any] = {"x": 0.04, "y": 0.96, "ha": "left", "va": "top"} | kwargs
    ax.text(
        s=text,
        transform=ax.transAxes,
        fontsize=8.5,
        linespacing=1.5,
        bbox={"boxstyle": "round,pad=0.4", "fc": "white", "ec": GRID, "alpha": 0.9},
        zorder=10,
        **where,
    )


def _thin(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` of `count` indices, drawn once and for all (scatter plots only)."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))


def _opacity(count: int) -> float:
    """Of scatter points: few are solid, thousands show their density."""
    return float(np.clip(900 / max(count, 1), 0.18, 0.75))


def _diagonal(ax: Axes, low: float, high: float) -> None:
    pad = 0.04 * (high - low) or 1.0
    ax.plot(
        [low - pad, high + pad],
        [low - pad, high + pad],
        color=INK,
        lw=0.8,
        ls=(0, (4, 3)),
        zorder=1,
    )
    ax.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad), aspect="equal")


@styled
def parity(
    energies: Mapping[str, tuple[Array, Array]],
    forces: Mapping[str, tuple[Array, Array]],
    path: Path | str,
) -> Path:
    """Predicted against true energies per atom and force components.

    Args:
        energies: for each set of frames ("seen", "held out", "data") true and predicted
            (num_frames,), eV/atom.
        forces: for each set true and predicted components (any shape), eV/Å.
        path: PNG to write.
    """
    figure = new_figure(4.0 * (1 + len(forces)), 3.9)
    first, *rest = figure.subplots(1, 1 + len(forces))
    both = np.concatenate([np.ravel(v) for pair in energies.values() for v in pair])
    _diagonal(first, both.min(), both.max())
    lines = []
    for name, (true, predicted) in energies.items():
        first.scatter(
            true, predicted, s=16, color=SET_COLORS.get(name, GREEN), alpha=0.7, lw=0.4, ec="white",
            label=name, zorder=3,
        )  # fmt: skip
        lines.append(f"{name}: RMSE {1e3 * rmse(predicted - true):.3g} meV/atom")
    _note(first, "\n".join(lines))
    if len(energies) > 1:
        first.legend(loc="lower right", handletextpad=0.1)
    first.set(
        title="Energy", xlabel="reference energy (eV/atom)", ylabel="predicted energy (eV/atom)"
    )
    for tick in (first.xaxis, first.yaxis):
        tick.set_major_locator(MaxNLocator(4))
    reach = max((np.abs(v).max() for pair in forces.values() for v in pair), default=1.0)
    for ax, (name, (true, predicted)) in zip(rest, forces.items(), strict=True):
        true, predicted = np.ravel(true), np.ravel(predicted)
        _diagonal(ax, -reach, reach)
        limits = (*ax.get_xlim(), *ax.get_ylim())
        bins = ax.hexbin(
            true, predicted, gridsize=70, extent=limits, norm=LogNorm(), mincnt=1,
            cmap=WARM if name == "held out" else DENSITY,
            linewidths=0.1, zorder=2,
        )  # fmt: skip
        bar = figure.colorbar(bins, ax=ax, shrink=0.8, pad=0.02, label="components per cell")
        bar.outline.set_visible(False)
        error = 1e3 * (predicted - true)
        _note(ax, f"RMSE {rmse(error):.3g} meV/Å\nMAE {mae(error):.3g} meV/Å")
        title = "Force components" + ("" if name == "data" else f", {name}")
        ax.set(title=title, xlabel="reference force (eV/Å)", ylabel="predicted force (eV/Å)")
    return save(figure, path)


def _plain_decades(axis: Axis) -> None:
    """Label 1, 2, 5, 10 ... of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


@styled
def uncertainty_error(
    sets: Mapping[str, tuple[Array, Array]],
    path: Path | str,
    label: str = "predicted force error (eV/Å)",
    meaning: str = "size",
    kinds: Mapping[str, NDArray[Any]] | None = None,
) -> Path:
    """A field against the atom's true force error, with the error's size in bins of equal count.

    Args:
        sets: for each set of frames ("seen", "held out", "data") the field (num_atoms,), in the
            unit of `label`, and the force error sqrt(|ΔF|²/3) (num_atoms,), eV/Å.
        path: PNG to write.
        label: axis label of the field.
        meaning: "size" of the error: logarithmic axis, ideal line and a band of a factor two;
            "bound" on it: logarithmic axis and the line that the error should stay below; "rank":
            larger is worse, on a linear axis.
        kinds: for each set the config_type of every atom (num_atoms,); adds a panel coloured by it.
    """
    known = sorted({str(k) for v in (kinds or {}).values() for k in np.unique(v)})
    panels = 1 + (len(known) > 1)
    figure = new_figure(5.0 * panels, 5.0)
    axes = figure.subplots(1, panels, squeeze=False, sharex=True, sharey=True)[0]
    errors = np.concatenate([e for _, e in sets.values()])
    field = np.concatenate([f for f, _ in sets.values()])
    floor = max(1e-3 * np.median(errors[errors > 0]), 1e-6) if (errors > 0).any() else 1e-6
    visible = np.maximum(errors, floor)
    in_force_units = meaning != "rank"
    if in_force_units:
        x_range = (np.quantile(field, 0.0005) / 1.5, field.max() * 1.5)
        line = np.array(x_range)
    else:
        pad = 0.03 * (np.ptp(field) or 1.0)
        x_range = (field.min() - pad, field.max() + pad)
    for ax in axes:
        if in_force_units:
            ax.set_xscale("log")
            _plain_decades(ax.xaxis)
            if meaning == "size":
                ax.fill_between(line, line / 2, line * 2, color=GRID, alpha=0.8, lw=0, zorder=0)
            ax.plot(line, line, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=4)
        ax.set(yscale="log", xlabel=label, xlim=x_range)
        ax.set_ylim(np.quantile(visible, 0.002) / 1.3, visible.max() * 1.5)
        _plain_decades(ax.yaxis)
        ax.grid(which="minor", lw=0.3)
    axes[0].set_ylabel("true force error $|\\Delta F|/\\sqrt{3}$ (eV/Å)")

    for name, (std, error) in sets.items():
        color = SET_COLORS.get(name, GREEN)
        keep = _thin(len(std), 6000)
        axes[0].scatter(
            std[keep], np.maximum(error, floor)[keep], s=5, color=color, lw=0, zorder=2,
            alpha=_opacity(len(keep)), rasterized=True,
        )  # fmt: skip
    for name, (std, error) in sets.items():
        color = SET_COLORS.get(name, GREEN)
        if in_force_units:
            curve = reliability_curve(std, error, ERROR_BINS)
            x, y = curve.predicted, curve.observed
        else:
            chunks = np.array_split(np.argsort(std, kind="stable"), min(ERROR_BINS, len(std)))
            x = np.array([std[k].mean() for k in chunks])
            y = np.array([rmse(error[k]) for k in chunks])
        axes[0].plot(
            x, y, color=color, marker="o", ms=5.5, mec="white", mew=0.9, zorder=6,
            label=f"{name}: RMS in {len(x)} equal bins",
        )  # fmt: skip
    if in_force_units:
        words = "ideal, band: factor 2" if meaning == "size" else "error = bound"
        axes[0].plot([], [], color=INK, lw=0.9, ls=(0, (4, 3)), label=words)
    below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.13)}  # hides no point
    axes[0].legend(**below, ncols=2)
    axes[0].set_title("Uncertainty against true error")
    if panels == 2:
        order = [(f, e, np.asarray((kinds or {})[n]).astype(str)) for n, (f, e) in sets.items()]
        x, y, kind = (np.concatenate(part) for part in zip(*order, strict=True))
        keep = np.random.default_rng(0).permutation(_thin(len(x), 9000))
        colors = {k: CYCLE[i % len(CYCLE)] for i, k in enumerate(known)}
        axes[1].scatter(
            x[keep], np.maximum(y, floor)[keep], s=5, lw=0, zorder=2, rasterized=True,
            c=[colors[k] for k in kind[keep]], alpha=_opacity(len(keep)),
        )  # fmt: skip
        for k in known:
            axes[1].scatter(
                [], [], s=22, color=colors[k], label=f"{k} ({np.count_nonzero(kind == k):,})"
            )
        axes[1].legend(**below, handletextpad=0.1, ncols=3)
        axes[1].set_title("By configuration type (atoms)")
    return save(figure, path)


@styled
def rankings(
    panels: Mapping[str, tuple[Mapping[str, Interval], float]],
    fields: Sequence[str],
    path: Path | str,
) -> Path:
    """How well fields and controls rank errors or recognise held-out frames, with intervals.

    Args:
        panels: for each panel title the score of every signal and the value that means "no
            information".
        fields: names that are fields of the model; the others are drawn as controls.
        path: PNG to write.
    """
    names = list(dict.fromkeys(n for scores, _ in panels.values() for n in scores))
    names = [n for n in names if n in fields] + [n for n in names if n not in fields]
    nrows = -(-len(panels) // MOST_IN_A_ROW)
    ncols = -(-len(panels) // nrows)
    figure = new_figure(1.9 + 2.45 * ncols, 0.5 + (0.4 + 0.3 * len(names)) * nrows)
    grid = figure.subplots(nrows, ncols, squeeze=False, sharey=True)
    axes = grid.ravel()
    rows = np.arange(len(names))[::-1]
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, (scores, nothing)) in zip(axes, panels.items(), strict=False):
        ax.axvline(nothing, color=MUTED, lw=0.8, zorder=1)
        best = max(
            (n for n in fields if n in scores and np.isfinite(scores[n].value)),
            key=lambda n: scores[n].value,
            default="",
        )
        for row, name in zip(rows, names, strict=True):
            if name not in scores:
                continue
            s = scores[name]
            color = (RED if name == best else BLUE) if name in fields else MUTED
            ax.plot([s.low, s.high], [row, row], color=color, lw=2.2, alpha=0.5, zorder=2)
            ax.plot(
                s.value,
                row,
                "o" if name in fields else "s",
                color=color,
                ms=5.5,
                mec="white",
                mew=0.7,
            )
        low = min([nothing, *(s.low for s in scores.values() if np.isfinite(s.low))])
        ax.set(title=title, xlim=(low - 0.05, 1.03), ylim=(-0.7, len(names) - 0.3))
        ax.grid(axis="y", visible=False)
    for first in grid[:, 0]:
        first.set_yticks(rows, [field_label(n) for n in names])
        for text, name in zip(first.get_yticklabels(), names, strict=True):
            text.set_color(INK if name in fields else MUTED)
    figure.supxlabel(
        "95 % intervals over frames   •   fields ●, best field in orange, trivial controls ■",
        fontsize=8.5,
        color=MUTED,
    )
    return save(figure, path)
