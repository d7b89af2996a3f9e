"""A picture of atoms coloured by one field."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from .style import MUTED, UNCERTAINTY, Array, new_figure, save, styled

ATOM_RADIUS = 1.1  # Å, as drawn


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


@styled
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
    figure = new_figure(max(sum(widths) * scale + 2.2, 6.0), height * scale + 0.9)
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
    return save(figure, path)
