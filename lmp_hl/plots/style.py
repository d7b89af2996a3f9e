"""The one style of all figures: colours, fonts, labels of fields, saving.

Colours are Okabe and Ito's, colour maps grow darker monotonically, so figures survive colour
blindness and a black-and-white printer.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path | str) -> Path:
    """Write a PNG; returns its path."""
    path = Path(path)
    figure.savefig(path)
    return path


def styled(function: Any) -> Any:
    """Run a plot function inside the module's style without touching the caller's settings."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return wrapper
