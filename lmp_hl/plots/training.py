"""Figures of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .style import BLUE, MUTED, Array, new_figure, save, styled


@styled
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
    figure = new_figure(3.5 * ncols + 0.3, 2.7 * nrows + 0.2)
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
    return save(figure, path)
