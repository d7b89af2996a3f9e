"""Figures of a trajectory: fields over time, along the box and by neighbourhood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .style import (
    BLUE,
    CYCLE,
    DENSITY,
    GREEN,
    INK,
    LOG_RATIO,
    MUTED,
    ORANGE,
    PINK,
    RED,
    SKY,
    Array,
    new_figure,
    save,
    styled,
)


@styled
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
        figure = new_figure(5.6, 3.6)
        ax = figure.subplots()
        ax.stairs(counts[0], edges, fill=True, color=SKY, alpha=0.8)
        ax.set(xscale=scale, yscale="log", xlabel=label, ylabel="atoms")
        for k, (name, values) in enumerate(quantiles.items()):
            ax.axvline(values[0], color=CYCLE[1 + k], label=f"{name} {values[0]:.3g}")
        ax.legend(loc="upper right")
    else:
        figure = new_figure(7.4, 4.0)
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
    return save(figure, path)


@styled
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
    figure = new_figure(6.8, 0.5 + 2.1 * len(series))
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
    return save(figure, path)


@styled
def rdf(distance: Array, curves: Mapping[str, Array], path: Path | str) -> Path:
    """Radial distribution functions g(r); distance (num_bins,) in Å, curves (num_bins,) by name."""
    figure = new_figure(6.4, 3.6)
    ax = figure.subplots()
    for (name, values), color in zip(curves.items(), (BLUE, RED, GREEN, PINK), strict=False):
        ax.plot(distance, values, color=color, label=name)
    ax.axhline(1, color=MUTED, lw=0.8, zorder=1)
    ax.set(xlabel="distance (Å)", ylabel="g(r)", xlim=(0, distance[-1]), ylim=(0, None))
    ax.set_title("Radial distribution")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=len(curves), borderaxespad=0.2)
    return save(figure, path)


@styled
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
    figure = new_figure(6.8, 1.6 + 2.0 * len(profiles))
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
    return save(figure, path)


@styled
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
    figure = new_figure(1.2 + 2.7 * len(groups), 3.6)
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
    return save(figure, path)
