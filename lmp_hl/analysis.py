"""What a trajectory says about how sure the model was: per frame, over time and by region.

Regions are read from up to 20 frames, evenly spaced over the second half of the trajectory. Fields
keep the units of the trajectory; lengths are in Å (units metal and real).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from lmp_hl import keys
from lmp_hl.h5md import Frame, Trajectory, open_trajectory

Array = NDArray[np.float64]

QUANTILES: Final = {"q05": 0.05, "median": 0.5, "q95": 0.95, "q99": 0.99}
NUM_MOST_UNCERTAIN: Final = 5
NUM_BINS: Final = 80
NUM_REGION_FRAMES: Final = 20
RDF_RANGE: Final = 7.0  # Å
PROFILE_BIN: Final = 2.0  # Å
MIN_ATOMS: Final = 3  # fewer say nothing about a region
UNCERTAIN_SHARE: Final = 0.05
MAX_PAIR_ATOMS: Final = 200_000  # over all region frames: bounds time and memory of the pair search


def uncertainty_fields(trajectory: Trajectory) -> list[str]:
    """The per-atom uncertainty columns, entropy first.

    Raises:
        ValueError: there are none.
    """
    known = [n for n in keys.FIELD_UNITS if n not in (keys.ENERGY, keys.EXTRAPOLATING)]
    found = [n for n in known if n in trajectory.fields]
    if not found:
        wanted = ", ".join(known)
        raise ValueError(
            f"{trajectory.path}: no uncertainty field (wanted one of {wanted}; found "
            f"{', '.join(trajectory.columns)}); add c_u of 'compute u all hlgauss/atom entropy' to "
            "the columns of fix hlgauss/h5md"
        )
    return found


def validation_ranking(trajectory: Trajectory) -> dict[str, float]:
    """Spearman's rho of each field with the force error on the validation frames, best first.

    Empty where there is no card.
    """
    ranking = model_card(trajectory).get("calibration", {}).get("ranking", {})
    known = {n: float(v) for n, v in ranking.items() if isinstance(v, int | float)}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def model_card(trajectory: Trajectory) -> dict[str, Any]:
    """The model card that LAMMPS copied into the file (last run); empty where there is none."""
    for run in reversed(trajectory.runs):
        if "model_card" in run:
            card: dict[str, Any] = json.loads(run["model_card"])
            return card
    return {}


def extrapolating_share(frame: Frame, promise: Mapping[str, float]) -> float:
    """Share of the atoms beyond the distance that validation frames show; nan if it is not known.

    Args:
        frame: of a trajectory, with the flag `extrapolating` or with `distance`.
        promise: "conformal" of the model card, or nothing.
    """
    if keys.EXTRAPOLATING in frame.arrays:
        return float(finite(frame, keys.EXTRAPOLATING).mean())
    if keys.DISTANCE in frame.arrays and promise:
        beyond = finite(frame, keys.DISTANCE) > promise["extrapolating_beyond_distance"]
        return float(beyond.mean())
    return math.nan


# per frame --------------------------------------------------------------------------------------
def default_threshold(values: Array) -> float:
    """Median + 5 robust standard deviations (1.4826 median absolute deviations), unit of `values`.

    In a frame whose larger part is well known this lies above nearly all of that part.
    """
    median = float(np.median(values))
    return median + 5 * 1.4826 * float(np.median(np.abs(values - median)))


def histogram_edges(low: float, high: float) -> Array:
    """(81,) edges from low to high, of one ratio where values are positive and span much."""
    from lmp_hl.plots.style import LOG_RATIO

    if low > 0 and high > LOG_RATIO * low:
        edges = np.geomspace(low, high, NUM_BINS + 1)
        edges[[0, -1]] = low, high  # rounding must not drop the extreme atoms
        return edges
    return np.linspace(low, high if high > low else low + 1e-9 + 1e-6 * abs(low), NUM_BINS + 1)


def frame_row(frame: Frame, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """One line of the table: step, time and for each field what its atoms' values are.

    Args:
        frame: of a trajectory.
        thresholds: field -> value, in the field's unit.

    Returns:
        step, time, num_atoms, then FIELD_mean, _max, _q05, _median, _q95, _q99, _above (fraction of
        the atoms above the threshold) and _ids (IDs of the most uncertain atoms, worst first).
    """
    row: dict[str, Any] = {"step": frame.step, "time": frame.time, "num_atoms": frame.num_atoms}
    ids = frame.arrays.get("id", np.arange(1, frame.num_atoms + 1))
    for name, threshold in thresholds.items():
        values = finite(frame, name)
        row[f"{name}_mean"] = float(values.mean())
        row[f"{name}_max"] = float(values.max())
        levels = np.quantile(values, list(QUANTILES.values()))
        row |= {f"{name}_{q}": float(v) for q, v in zip(QUANTILES, levels, strict=True)}
        row[f"{name}_above"] = float((values > threshold).mean())
        worst = np.argsort(-values, kind="stable")[:NUM_MOST_UNCERTAIN]
        row[f"{name}_ids"] = ids[worst].tolist()
    return row


def finite(frame: Frame, name: str) -> Array:
    """A field of a frame as float64 (num_atoms,).

    Raises:
        ValueError: no atoms, or values that are not finite.
    """
    values = np.asarray(frame[name], dtype=np.float64)
    if values.size == 0:
        raise ValueError(f"step {frame.step}: the frame has no atoms")
    if not np.isfinite(values).all():
        bad = np.count_nonzero(~np.isfinite(values))
        raise ValueError(f"step {frame.step}: {bad} values of {name} are not finite")
    return values


@dataclass(frozen=True)
class Crossing:
    """The first frame in which an atom is above a threshold, and its most uncertain atom."""

    step: int
    time: float
    id: int
    element: str  # "" where the file has no species
    position: list[float]  # Å
    value: float


def crossing(frame: Frame, name: str) -> Crossing:
    """The atom of a frame with the largest value of a field."""
    values = finite(frame, name)
    i = int(values.argmax())
    symbol = chemical_symbols[int(frame["species"][i])] if "species" in frame.arrays else ""
    number = int(frame["id"][i]) if "id" in frame.arrays else i + 1
    place = [float(x) for x in frame["position"][i]]
    return Crossing(frame.step, frame.time, number, symbol, place, float(values[i]))


# regions ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Grouped:
    """Fields of the atoms in each group, nan where a group has fewer than three."""

    groups: Array  # (num_groups,)
    count: NDArray[np.int64]  # (num_groups,) atoms, over all frames
    fields: dict[str, dict[str, Array]]  # field -> "mean", "low" (5 %), "high" (95 %)


def group_fields(index: NDArray[np.int64], groups: Array, fields: Mapping[str, Array]) -> Grouped:
    """Mean and 5 and 95 % quantiles of each field in each group.

    Args:
        index: (num_atoms,) group of each atom, 0 to num_groups - 1.
        groups: (num_groups,) what the groups are called.
        fields: name -> (num_atoms,).
    """
    count = np.bincount(index, minlength=len(groups))
    order = np.argsort(index, kind="stable")
    parts = np.split(order, np.cumsum(count)[:-1])
    curves: dict[str, dict[str, Array]] = {}
    for name, values in fields.items():
        rows = np.full((3, len(groups)), np.nan)
        for k, part in enumerate(parts):
            if len(part) >= MIN_ATOMS:
                v = values[part]
                rows[:, k] = v.mean(), *np.quantile(v, [0.05, 0.95])
        curves[name] = dict(zip(("mean", "low", "high"), rows, strict=True))
    return Grouped(groups, count, curves)


def along_axis(frame: Frame, axis: int) -> tuple[Array, float]:
    """Heights of the atoms over the cell's face across one cell vector, and that face's area.

    Args:
        frame: of a trajectory.
        axis: 0, 1 or 2.

    Returns:
        (num_atoms,) Å, from the box's origin, wrapped where the cell is periodic; area in Å².
    """
    others = frame.cell[[k for k in range(3) if k != axis]]
    normal = np.cross(*others)
    area = float(np.linalg.norm(normal))
    height = abs(float(np.linalg.det(frame.cell))) / area
    share = np.linalg.solve(frame.cell.T, (frame["position"] - frame.origin).T)[axis]
    if frame.periodic[axis]:
        share = share - np.floor(share)
    return share * height + float(frame.origin[axis]), area


def profile(frames: list[Frame], fields: list[str], axis: int) -> tuple[Grouped, Array]:
    """Fields in slices about 2 Å thick along one axis.

    Args:
        frames: at least one.
        fields: names.
        axis: 0, 1 or 2.

    Returns:
        the fields by the middle of the slice (Å), and the number density (num_slices,) in 1/Å³.
    """
    found = [along_axis(frame, axis) for frame in frames]
    heights = np.concatenate([h for h, _ in found])
    low = min(heights.min(), *(float(f.origin[axis]) for f in frames))
    high = max(heights.max(), *(float(f.origin[axis] + f.cell[axis, axis]) for f in frames))
    num = max(math.ceil((high - low) / PROFILE_BIN), 1)
    edges = np.linspace(low, high, num + 1)
    index = np.clip(np.searchsorted(edges, heights, side="right") - 1, 0, num - 1)
    values = {n: np.concatenate([finite(f, n) for f in frames]) for n in fields}
    grouped = group_fields(index, (edges[1:] + edges[:-1]) / 2, values)
    area = float(np.mean([a for _, a in found]))
    return grouped, grouped.count / (len(frames) * area * (edges[1] - edges[0]))


@dataclass(frozen=True)
class Neighborhoods:
    """What the pairs of atoms in some frames say."""

    distance: Array  # (num_bins,) Å, middle of the bins
    rdf: dict[str, Array]  # name -> (num_bins,)
    coordination: Grouped


def neighborhoods(
    frames: list[Frame], fields: list[str], uncertain_by: str, reach: float = RDF_RANGE
) -> Neighborhoods:
    """Radial distribution around all and around the most uncertain atoms, fields by coordination.

    g(r) = n(r) / (4 pi r² dr N rho) with rho the mean density of the box (in directions without
    periodicity, of the extent of the atoms): vacuum in the box scales g up. One pair search serves
    both results, respects mixed boundaries and triclinic cells, and sees all images in small cells.

    Args:
        frames: at least one.
        fields: names.
        uncertain_by: the field whose largest 5 % in each frame are "most uncertain".
        reach: of g(r), Å.
    """
    from lmp_hl.evaluate import coordination
    from lmp_hl.graph import edge_vectors, neighbor_list, periodic_cell

    edges = np.linspace(0, reach, round(reach / 0.05) + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    names = ("all atoms", f"around the most uncertain {100 * UNCERTAIN_SHARE:g} %")
    rdf = {name: np.zeros(len(shells)) for name in names}
    counts = []
    for frame in frames:
        positions = np.asarray(frame["position"], dtype=np.float64)
        box = periodic_cell(frame.cell, frame.periodic)
        pairs, shifts = neighbor_list(positions, box, frame.periodic, reach)
        distances = np.linalg.norm(edge_vectors(positions, box, pairs, shifts), axis=1)
        numbers = np.asarray(frame["species"], dtype=np.int64)
        counts.append(coordination(numbers, pairs, distances)[1].astype(np.int64))
        extent = np.maximum(np.ptp(positions, axis=0), 1.0)
        volume = abs(np.linalg.det(np.where(frame.periodic[:, None], box, np.diag(extent))))
        values = finite(frame, uncertain_by)
        worst = values >= np.quantile(values, 1 - UNCERTAIN_SHARE)
        for name, chosen in zip(names, (np.ones_like(worst), worst), strict=True):
            histogram = np.histogram(distances[chosen[pairs[0]]], edges)[0]
            ideal = chosen.sum() * len(positions) / volume * shells
            rdf[name] += histogram / ideal / len(frames)
    count = np.concatenate(counts)
    present = np.unique(count)
    values_of = {n: np.concatenate([finite(f, n) for f in frames]) for n in fields}
    grouped = group_fields(np.searchsorted(present, count), present.astype(np.float64), values_of)
    return Neighborhoods((edges[1:] + edges[:-1]) / 2, rdf, grouped)


# the whole --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Analysis:
    """All results of one trajectory; `as_dict` is what analysis.json holds."""

    path: Path
    fields: list[str]
    units: dict[str, str]  # of the fields and of "time"
    ranking: dict[str, float]
    thresholds: dict[str, float]
    rows: list[dict[str, Any]]
    edges: dict[str, Array]  # field -> (num_bins + 1,)
    counts: dict[str, NDArray[np.int64]]  # field -> (num_frames, num_bins)
    crossings: dict[str, Crossing]  # field -> first above its threshold, if any ever was
    coverage: float | None  # promised by the model card
    usual: list[str]  # fields whose threshold is the card's
    usual_coverage: float | None  # share of the frames like validation frames wholly below those
    cutoff: float | None  # of the model, Å
    last: Frame
    axis: str
    region_steps: list[int]
    profile: Grouped
    density: Array
    neighborhoods: Neighborhoods | None  # None where the file has no species

    @property
    def best(self) -> str:
        """The field that ranked errors best on the validation frames, else the first."""
        return next((n for n in self.ranking if n in self.fields), self.fields[0])

    @property
    def remark(self) -> str:
        """Which field ranks errors best, for people."""
        known = [f"{n} {v:.2f}" for n, v in self.ranking.items() if n in self.fields]
        if not known:
            return "The trajectory's model card ranks no field: which one to trust is not known."
        return f"Rank correlation with the force error on validation frames: {', '.join(known)}"

    def column(self, name: str) -> Array:
        """(num_frames,) of one column of the table."""
        return np.array([row[name] for row in self.rows], dtype=np.float64)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; nan where a region has too few atoms."""

        def plain(grouped: Grouped, name: str) -> dict[str, Any]:
            return {
                name: grouped.groups.tolist(),
                "num_atoms": grouped.count.tolist(),
                **{n: {k: v.tolist() for k, v in c.items()} for n, c in grouped.fields.items()},
            }

        out: dict[str, Any] = {
            "trajectory": str(self.path),
            "num_frames": len(self.rows),
            "units": self.units,
            "validation_ranking": self.ranking,
            "best_field": self.best if self.ranking else None,
            "thresholds": self.thresholds,
            "first_crossing": {n: asdict(c) for n, c in self.crossings.items()},
            "coverage": self.coverage,
            "frames": self.rows,
            "region_steps": self.region_steps,
            f"profile_{self.axis}": {
                **plain(self.profile, "position_Angstrom"),
                "density_per_Angstrom3": self.density.tolist(),
            },
        }
        if self.neighborhoods is not None:
            out["rdf"] = {
                "distance_Angstrom": self.neighborhoods.distance.tolist(),
                **{n: g.tolist() for n, g in self.neighborhoods.rdf.items()},
            }
            out["by_coordination"] = plain(self.neighborhoods.coordination, "neighbors")
        return out


def analyze(
    path: Path | str,
    axis: str = "z",
    thresholds: Mapping[str, float] | None = None,
    progress: bool = False,
) -> Analysis:
    """Read a trajectory and compute everything.

    Args:
        path: an H5MD file of fix hlgauss/h5md.
        axis: "x", "y" or "z", of the profile.
        thresholds: field -> value in its unit; for the others what the model card says of the
            largest value in a frame like the validation frames, or else `default_threshold`.
        progress: show a progress bar on stderr.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no trajectory, is empty, or holds no uncertainty.
    """
    with open_trajectory(path) as trajectory:
        fields = uncertainty_fields(trajectory)
        if trajectory.num_frames == 0:
            raise ValueError(f"{path}: holds no complete frame yet")
        if "position" not in trajectory.columns:
            raise ValueError(f"{path}: holds no positions; add x to the fix that writes it")
        given = dict(thresholds or {})
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise ValueError(
                f"{path}: threshold for {', '.join(unknown)}, but it holds {', '.join(fields)}"
            )
        num_frames = trajectory.num_frames
        first = trajectory.frame(0)
        card = model_card(trajectory)
        calibration = card.get("calibration", {})
        usual = {n: float(v) for n, v in calibration.get("largest", {}).items() if n in fields}
        known = {**usual, **given}
        limits = {
            n: known[n] if n in known else default_threshold(finite(first, n)) for n in fields
        }

        def steps(what: str) -> Any:
            if not progress:
                return range(num_frames)
            from rich.console import Console
            from rich.progress import track

            return track(range(num_frames), what, console=Console(stderr=True), transient=True)

        promise = card.get("conformal", {})
        rows, crossings = [], {}
        lowest = dict.fromkeys(fields, math.inf)
        for k in steps("reading frames"):
            frame = trajectory.frame(k)
            share = extrapolating_share(frame, promise)
            rows.append(frame_row(frame, limits) | {"extrapolating": share})
            for n in fields:
                if n not in crossings and rows[-1][f"{n}_max"] > limits[n]:
                    crossings[n] = crossing(frame, n)
                lowest[n] = min(lowest[n], float(finite(frame, n).min()))
        edges, counts = {}, {}
        for n in fields:
            edges[n] = histogram_edges(lowest[n], max(row[f"{n}_max"] for row in rows))
            counts[n] = np.zeros((num_frames, NUM_BINS), dtype=np.int64)
        for k in steps("distributions"):
            for n in fields:
                values = trajectory.values(n, k)
                counts[n][k] = np.histogram(values[np.isfinite(values)], edges[n])[0]

        most = max(1, min(NUM_REGION_FRAMES, MAX_PAIR_ATOMS // max(trajectory.num_atoms, 1)))
        chosen = np.unique(np.linspace(num_frames - 1, num_frames // 2, most).round().astype(int))
        frames = [trajectory.frame(int(k)) for k in chosen]
        ranking = validation_ranking(trajectory)
        units = {n: trajectory.units[n] for n in (*fields, "time")}
        has_species = "species" in trajectory.columns
    slices, density = profile(frames, fields, "xyz".index(axis))
    best = next((n for n in ranking if n in fields), fields[0])
    return Analysis(
        path=Path(path), fields=fields, units=units, ranking=ranking, thresholds=limits, rows=rows,
        edges=edges, counts=counts, crossings=crossings, coverage=promise.get("coverage"),
        usual=[n for n in fields if n in usual and n not in given],
        usual_coverage=calibration.get("largest_coverage"),
        cutoff=card.get("config", {}).get("model", {}).get("cutoff"), last=frames[-1], axis=axis,
        region_steps=[f.step for f in frames], profile=slices, density=density,
        neighborhoods=neighborhoods(frames, fields, best) if has_species else None,
    )  # fmt: skip
