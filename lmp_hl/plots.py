"""Every figure in one style: functions take arrays and a path, write a PNG and return the path.

Nothing is read here. Units are Å, eV, ps and nat unless a label says otherwise. Colours are Okabe
and Ito's, colour maps grow darker monotonically, so figures survive colour blindness and a
black-and-white printer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from lmp_hl.metrics import Interval, mae, reliability_curve, rmse

Array = NDArray[np.float64]

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ed"
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
)
CYCLE = [BLUE, RED, GREEN, PINK, SKY, ORANGE, INK, MUTED, "#7b3294", "#8c510a", YELLOW, "#01665e"]
SET_COLORS = {"seen": BLUE, "held out": RED, "data": BLUE}
# pale where the model is sure, dark and saturated where it is not
UNCERTAINTY = LinearSegmentedColormap.from_list(
    "uncertainty", ["#dfe7ee", "#f3d68a", "#ee9b3c", "#c8452f", "#6d1035"]
)
WARM = LinearSegmentedColormap.from_list("warm", ["#fbe6d4", "#f0a04b", "#b8430c", "#3d1405"])
DENSITY = LinearSegmentedColormap.from_list("density", ["#dcebf5", "#56B4E9", "#0b4f86", "#081d3a"])

STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 180,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3.5,
    "ytick.major.size": 3.5,
    "xtick.minor.size": 2,
    "ytick.minor.size": 2,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 4),
}

# positive quantities that span more than this ratio get a logarithmic axis
LOG_RATIO = 15.0
ERROR_BINS = 12  # of equal count, along a predicted error
MOST_IN_A_ROW = 4  # panels of rankings
ATOM_RADIUS = 1.1  # Å, as drawn

FIELD_LABELS = {
    "entropy": "entropy",
    "excess_entropy": "excess entropy",
    "force_entropy": "force entropy",
    "force_std": "predicted force error",
    "distance": "feature distance",
    "energy": "energy",
}
# units as model files, H5MD files and LAMMPS spell them
UNIT_LABELS = {
    "1": "",
    "Angstrom": "Å",
    "eV/Angstrom": "eV/Å",
    "eV Angstrom-1": "eV/Å",
    "kcal mol-1": "kcal/mol",
    "kcal mol-1 Angstrom-1": "kcal/mol/Å",
}


def field_label(name: str, unit: str = "") -> str:
    """`"entropy (nat)"`: a field's name in words with its unit."""
    words = FIELD_LABELS.get(name, name.replace("_", " "))
    unit = UNIT_LABELS.get(unit, unit)
    return f"{words} ({unit})" if unit else words


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    figure.savefig(path)
    return path


def _styled(function: Any) -> Any:
    """Run a plot function inside the module's style without touching the caller's settings."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return wrapper


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


# training ---------------------------------------------------------------------------------------
@_styled
def learning_curves(
    columns: Mapping[str, Array], path: Path | str, labels: Mapping[str, str] | None = None
) -> Path:
    """Training and validation curves, one panel per quantity, logarithmic where all are positive.

    Args:
        columns: "epoch" (num_rows,) and "train_X", "valid_X" columns (num_rows,); nan where not
            logged.
        path: PNG to write.
        labels: axis label with unit for each X; X itself where missing.
    """
    epoch = np.asarray(columns["epoch"], float)
    names: list[str] = []
    for column in columns:
        prefix, _, name = column.partition("_")
        if prefix in ("train", "valid") and name not in names:
            names.append(name)
    names = [
        n
        for n in names
        if any(
            np.isfinite(columns[f"{p}_{n}"]).any()
            for p in ("train", "valid")
            if f"{p}_{n}" in columns
        )
    ]
    if not names:
        raise ValueError(f"no train_* or valid_* column with numbers in {sorted(columns)}")
    ncols = min(3, len(names))
    nrows = -(-len(names) // ncols)
    figure = _figure(3.5 * ncols + 0.3, 2.7 * nrows + 0.2)
    axes = figure.subplots(nrows, ncols, squeeze=False, sharex=True).ravel()
    for ax, name in zip(axes, names, strict=False):
        positive = True
        for prefix, color, word in (("train", MUTED, "training"), ("valid", BLUE, "validation")):
            values = np.asarray(columns.get(f"{prefix}_{name}", []), float)
            if not np.isfinite(values).any():
                continue
            known = np.isfinite(values)
            x, y = epoch[known], values[known]
            positive &= bool((y > 0).all())
            few = "o" if len(x) < 3 else None
            ax.plot(x, y, color=color, label=word, marker=few, lw=1.2 if prefix == "train" else 1.8)
            if prefix == "valid":
                ax.annotate(
                    f"{y[-1]:.3g}",
                    (x[-1], y[-1]),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    color=color,
                    fontsize=8.5,
                    annotation_clip=False,
                )
        if positive:
            ax.set_yscale("log")
            low, high = ax.get_ylim()
            subs = (1, 2, 5) if high / low < 1e3 else (1,)
            ax.yaxis.set_major_locator(LogLocator(subs=subs))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title((labels or {}).get(name, name.replace("_", " ")))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax in axes[max(len(names) - ncols, 0) : len(names)]:
        ax.set_xlabel("epoch")
        ax.xaxis.set_tick_params(labelbottom=True)
    axes[0].legend(loc="upper right")
    return _save(figure, path)


# evaluation -------------------------------------------------------------------------------------
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


@_styled
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
    figure = _figure(4.0 * (1 + len(forces)), 3.9)
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
    return _save(figure, path)


def _plain_decades(axis: Axis) -> None:
    """Label 1, 2, 5, 10 ... of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


@_styled
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
    figure = _figure(5.0 * panels, 5.0)
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
    return _save(figure, path)


@_styled
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
    figure = _figure(1.9 + 2.45 * ncols, 0.5 + (0.4 + 0.3 * len(names)) * nrows)
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
    return _save(figure, path)


# trajectories -----------------------------------------------------------------------------------
@_styled
def distribution_over_time(
    time: Array,
    edges: Array,
    counts: Array,
    quantiles: Mapping[str, Array],
    path: Path | str,
    label: str = "entropy (nat)",
    remark: str = "",
    time_label: str = "time (ps)",
) -> Path:
    """How the atoms' values of one field are distributed, frame by frame.

    Args:
        time: (num_frames,) increasing.
        edges: (num_bins + 1,) bin edges of the field; the axis is logarithmic when they are (all
            positive, one ratio).
        counts: (num_frames, num_bins) atoms in each bin.
        quantiles: curves (num_frames,) to draw on top, by name ("median", "largest").
        path: PNG to write.
        label: axis label of the field.
        remark: said below the title: which field ranks errors best.
        time_label: axis label of the time.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    scale = "log" if edges[0] > 0 and np.ptp(np.diff(np.log(edges))) < 1e-6 else "linear"
    if len(time) < 2:
        figure = _figure(5.6, 3.6)
        ax = figure.subplots()
        ax.stairs(counts[0], edges, fill=True, color=SKY, alpha=0.8)
        ax.set(xscale=scale, yscale="log", xlabel=label, ylabel="atoms")
        for k, (name, values) in enumerate(quantiles.items()):
            ax.axvline(values[0], color=CYCLE[1 + k], label=f"{name} {values[0]:.3g}")
        ax.legend(loc="upper right")
    else:
        figure = _figure(7.4, 4.0)
        ax, side = figure.subplots(1, 2, sharey=True, width_ratios=[4.4, 1])
        middle = (time[1:] + time[:-1]) / 2
        borders = np.concatenate([[2 * time[0] - middle[0]], middle, [2 * time[-1] - middle[-1]]])
        image = np.ma.masked_less_equal(share.T, 0)
        mesh = ax.pcolormesh(
            borders, edges, image, cmap=DENSITY, norm=LogNorm(vmin=image.min(), vmax=image.max()),
            rasterized=True,
        )  # fmt: skip
        styles = [("white", "-"), (ORANGE, "-"), (RED, "-"), (PINK, "-")]
        for (name, values), (color, line) in zip(quantiles.items(), styles, strict=False):
            ax.plot(time, values, color=INK, lw=2.6, alpha=0.6)
            ax.plot(time, values, color=color, ls=line, lw=1.5, label=name)
        ax.set(
            xlabel=time_label,
            ylabel=label,
            xlim=(borders[0], borders[-1]),
            yscale=scale,
            ylim=(edges[0], edges[-1] + 2 * (edges[-1] - edges[-2])),
        )
        legend = ax.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(quantiles), labelcolor=INK
        )
        for handle in legend.get_lines():
            handle.set_path_effects([withStroke(linewidth=2.8, foreground=MUTED)])
        ax.grid(visible=False)
        bar = figure.colorbar(mesh, ax=side, pad=0.04, label="share of the atoms", aspect=30)
        bar.outline.set_visible(False)
        for row, color, name in ((0, MUTED, "first"), (-1, RED, "last")):
            side.stairs(
                share[row], edges, orientation="horizontal", color=color, lw=1.4, label=name
            )
        side.set(xscale="log", xlabel="share in frame")
        side.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handlelength=0.8,
            handletextpad=0.4, columnspacing=0.8,
        )  # fmt: skip
    words = label.split(" (")[0]
    title = f"Per-atom {words} {'over time' if len(time) > 1 else 'in the only frame'}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    if remark:
        figure.supxlabel(remark, fontsize=8.5, color=MUTED)
    return _save(figure, path)


@_styled
def time_series(
    time: Array,
    series: Mapping[str, Mapping[str, Array]],
    labels: Mapping[str, str],
    thresholds: Mapping[str, float],
    path: Path | str,
    time_label: str = "time (ps)",
    title: str = "Uncertainty over time",
    threshold_label: str = "threshold",
) -> Path:
    """Curves of each field against time, such as mean and largest value, one panel per field.

    Args:
        time: (num_frames,).
        series: for each field its curves (num_frames,) by name.
        labels: axis label of each field.
        thresholds: value drawn as a line, by field.
        path: PNG to write.
        time_label: axis label of the time.
        title: of the figure.
        threshold_label: what the thresholds are.
    """
    figure = _figure(6.8, 0.5 + 2.1 * len(series))
    axes = figure.subplots(len(series), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (field, curves) in zip(axes, series.items(), strict=True):
        for (name, values), color in zip(curves.items(), (BLUE, ORANGE, RED, GREEN), strict=False):
            ax.plot(time, values, color=color, label=name, marker="o" if len(time) < 3 else None)
        if field in thresholds:
            line = thresholds[field]
            ax.axhline(line, color=MUTED, lw=1, ls=(0, (4, 3)), label=threshold_label)
        ax.set_ylabel(labels[field])
        lowest = min(float(np.min(v)) for v in curves.values())
        if lowest > 0 and max(float(np.max(v)) for v in curves.values()) > LOG_RATIO * lowest:
            ax.set_yscale("log")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=4, borderaxespad=0.2)
    axes[-1].set_xlabel(time_label)
    figure.align_ylabels(list(axes))
    return _save(figure, path)


@_styled
def rdf(distance: Array, curves: Mapping[str, Array], path: Path | str) -> Path:
    """Radial distribution functions g(r); distance (num_bins,) in Å, curves (num_bins,) by name."""
    figure = _figure(6.4, 3.6)
    ax = figure.subplots()
    for (name, values), color in zip(curves.items(), (BLUE, RED, GREEN, PINK), strict=False):
        ax.plot(distance, values, color=color, label=name)
    ax.axhline(1, color=MUTED, lw=0.8, zorder=1)
    ax.set(xlabel="distance (Å)", ylabel="g(r)", xlim=(0, distance[-1]), ylim=(0, None))
    ax.set_title("Radial distribution")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=len(curves), borderaxespad=0.2)
    return _save(figure, path)


@_styled
def profile(
    centers: Array,
    profiles: Mapping[str, Mapping[str, Array]],
    density: Array,
    labels: Mapping[str, str],
    path: Path | str,
    axis: str = "z",
    title: str = "",
) -> Path:
    """Fields along one axis of the box, above the number density.

    Args:
        centers: (num_bins,) Å.
        profiles: for each field the curves "mean", "low", "high" (num_bins,), nan in empty bins.
        density: (num_bins,) atoms/Å³.
        labels: axis label of each field.
        path: PNG to write.
        axis: name of the axis.
        title: which frames were averaged.
    """
    figure = _figure(6.8, 1.6 + 2.0 * len(profiles))
    axes = figure.subplots(
        len(profiles) + 1,
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[1.0] * len(profiles) + [0.55],
    )[:, 0]
    for ax, (field, curves), color in zip(
        axes[:-1], profiles.items(), [BLUE, RED, GREEN, PINK] * 4, strict=False
    ):
        ax.fill_between(
            centers, curves["low"], curves["high"], color=color, alpha=0.18, lw=0, label="5 to 95 %"
        )
        ax.plot(centers, curves["mean"], color=color, label="mean", marker="o", ms=2.5)
        ax.set_ylabel(labels[field])
        ax.legend(loc="upper center", ncols=2)
        ax.margins(y=0.18)
    axes[-1].fill_between(centers, 0, density, color=MUTED, alpha=0.35, lw=0, step="mid")
    axes[-1].set(ylabel="atoms/Å³", xlabel=f"{axis} (Å)", ylim=(0, None))
    axes[0].set_title(f"Uncertainty along {axis}" + (f", {title}" if title else ""))
    figure.align_ylabels(list(axes))
    return _save(figure, path)


@_styled
def by_coordination(
    coordination: NDArray[np.int64],
    groups: Mapping[str, Mapping[str, Array]],
    count: NDArray[np.int64],
    labels: Mapping[str, str],
    path: Path | str,
    radius: str = "",
) -> Path:
    """Fields by the number of neighbours.

    Args:
        coordination: (num_groups,) numbers of neighbours that occur.
        groups: for each field "mean", "low", "high" (num_groups,).
        count: (num_groups,) atoms in each group.
        labels: axis label of each field.
        path: PNG to write.
        radius: how a neighbour was counted.
    """
    figure = _figure(1.2 + 2.7 * len(groups), 3.6)
    axes = figure.subplots(1, len(groups), squeeze=False, sharex=True)[0]
    for ax, (field, curves) in zip(axes, groups.items(), strict=True):
        ax.vlines(coordination, curves["low"], curves["high"], color=SKY, lw=5, alpha=0.6, zorder=2)
        size = 14 + 90 * np.sqrt(count / count.max())
        ax.scatter(coordination, curves["mean"], s=size, color=BLUE, ec="white", zorder=3)
        ax.set(title=labels[field], xlabel="neighbours")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(x=0.12)
    remark = "mean ● (area: how many atoms) and 5 to 95 %"
    figure.supxlabel(f"{remark}; {radius}" if radius else remark, fontsize=8.5, color=MUTED)
    return _save(figure, path)


# atoms ------------------------------------------------------------------------------------------
def _view(azimuth: float, elevation: float) -> Array:
    """Rotation whose rows are screen right, screen up and towards the viewer.

    Degrees: azimuth of the viewer from x towards y, elevation above the xy plane.
    """
    a, e = np.radians(azimuth), np.radians(elevation)
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    toward = np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])
    return np.stack([right, np.cross(toward, right), toward])


def _box_edges(cell: Array, origin: Array) -> Array:
    """(12, 2, 3) edges of the parallelepiped."""
    corners = np.array(list(product((0.0, 1.0), repeat=3)))
    pairs = [
        (a, b) for i, a in enumerate(corners) for b in corners[i + 1 :] if np.abs(a - b).sum() == 1
    ]
    return np.array(pairs) @ cell + origin


def _spheres(
    ax: Axes, xy: Array, radius: Array, rgb: Array, haze: Array, order: NDArray[np.int64]
) -> None:
    """Draw shaded discs in order; each atom is a rim, a body and two highlights, in that order."""
    fog = haze[:, None]
    body = rgb * (1 - fog) + fog
    layers = [  # radius, shift towards the light, colour
        (1.00, 0.00, body * 0.55 + 0.10 * fog),
        (0.92, 0.03, body),
        (0.60, 0.20, body + (1 - body) * 0.25),
        (0.26, 0.38, body + (1 - body) * 0.60),
    ]
    light = np.array([-0.7, 0.7])
    size = np.stack([f * radius for f, _, _ in layers], axis=1)[order].ravel() * 2
    offset = np.stack([xy + s * radius[:, None] * light for _, s, _ in layers], axis=1)[order]
    color = np.stack([c for _, _, c in layers], axis=1)[order].reshape(-1, 3)
    ax.add_collection(
        EllipseCollection(
            size, size, np.zeros_like(size), units="xy", offsets=offset.reshape(-1, 2),
            offset_transform=ax.transData, facecolors=np.clip(color, 0, 1), linewidths=0,
            rasterized=True,
        )
    )  # fmt: skip


@_styled
def atoms_3d(
    positions: Array,
    values: Array,
    path: Path | str,
    cell: Array | None = None,
    origin: Array | None = None,
    label: str = "entropy (nat)",
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Path:
    """Atoms in 3D, orthographic, coloured and sized by one field, beside a projection along y.

    Values up to the median are pale and drawn small, the colour map ends at the 99.5 % quantile
    (arrows on the colour bar say that there is more), so that a minority of uncertain atoms stands
    out.

    Args:
        positions: (num_atoms, 3) Å.
        values: (num_atoms,) the field.
        path: PNG to write.
        cell: (3, 3) rows are the box vectors, Å; None draws no box.
        origin: (3,) corner of the box, Å; zero by default.
        label: colour bar label.
        title: figure title.
        limits: ends of the colour map; by default the median and the 99.5 % quantile.
    """
    low, high = limits or (float(np.median(values)), float(np.quantile(values, 0.995)))
    if high <= low:
        high = low + (abs(low) * 1e-6 or 1e-6)
    norm = Normalize(low, high, clip=True)
    level = np.asarray(norm(values))
    rgb = UNCERTAINTY(level)[:, :3]
    sizes = ATOM_RADIUS * (0.72 + 0.40 * level)
    corner = np.zeros(3) if origin is None else np.asarray(origin, float)
    edges = np.empty((0, 2, 3)) if cell is None else _box_edges(np.asarray(cell, float), corner)
    views = [_view(-62.0, 18.0), np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])]
    spans = []
    for view in views:
        points = np.concatenate([positions, edges.reshape(-1, 3)]) @ view[:2].T
        spans.append((points.min(0) - 1.6 * ATOM_RADIUS, points.max(0) + 1.6 * ATOM_RADIUS))
    height = 5.0
    widths = [height * float(s[1][0] - s[0][0]) / float(s[1][1] - s[0][1]) for s in spans]
    scale = min(1.0, 11.0 / sum(widths))
    figure = _figure(max(sum(widths) * scale + 2.2, 6.0), height * scale + 0.9)
    axes = figure.subplots(1, 2, width_ratios=[max(w, 0.6) for w in widths])
    for k, (ax, view, span) in enumerate(zip(axes, views, spans, strict=True)):
        xy, depth = positions @ view[:2].T, positions @ view[2]
        ax.set(xlim=(span[0][0], span[1][0]), ylim=(span[0][1], span[1][1]), aspect="equal")
        ax.grid(visible=False)
        projected = edges @ view.T
        if len(edges):
            back = projected[..., 2].mean(1) < np.median(projected[..., 2])
            for part, z in ((back, 1), (~back, 5)):
                ax.add_collection(
                    LineCollection(
                        list(projected[part][..., :2]), colors=MUTED, lw=0.9, zorder=z,
                        alpha=0.9 if z == 1 else 0.55,
                    )
                )  # fmt: skip
        # nearer atoms cover farther ones in 3D, uncertain atoms the certain ones in the projection
        far = 1 - (depth - depth.min()) / (np.ptp(depth) or 1.0)
        haze = 0.45 * far * (1 - 0.7 * level) if k == 0 else np.zeros_like(far)
        _spheres(ax, xy, sizes, rgb, haze, np.argsort(depth if k == 0 else level, kind="stable"))
    axes[0].set_axis_off()
    axes[1].set(xlabel="x (Å)", ylabel="z (Å)", title="seen along y, uncertain atoms on top")
    axes[1].spines[["top", "right"]].set_visible(False)
    below, above = bool((values < low).any()), bool((values > high).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[(below, above)]
    bar = figure.colorbar(
        ScalarMappable(norm, UNCERTAINTY), ax=axes, label=label, shrink=0.75, pad=0.02,
        extend=extend, aspect=28,
    )  # fmt: skip
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    return _save(figure, path)
