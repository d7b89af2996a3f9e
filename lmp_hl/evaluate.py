"""A model file against labelled frames: errors, and what its uncertainties are worth.

The force error of an atom is sqrt(|ΔF|²/3), the root mean square over its three components, eV/Å.
A control is a number anybody has without an uncertainty (`CONTROLS`); an uncertainty that does not
beat it is not worth its price. The sign of a control is chosen on the very data it is scored on,
which favours the control; a field of the model keeps its sign.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import NDArray

from lmp_hl import keys, metrics
from lmp_hl.graph import Structure, graph_inputs
from lmp_hl.metrics import Interval, RankCorrelation
from lmp_hl.potential import edge_forces

Array = NDArray[np.float64]

CONTROLS: Final = {
    "force_norm": "predicted |F| of the atom, eV/Å",
    "atom_energy": "predicted energy of the atom, eV",
    "neighbor_distance": "distance to the nearest neighbour, Å (the cutoff where there is none)",
    "coordination": (
        "smooth count of neighbours, sum of 1/(1 + exp((r/r0 - 1)/0.05)), r0 = 1.3 times the sum "
        "of covalent radii"
    ),
}
COORDINATION_REACH: Final = 1.3
COORDINATION_SOFTNESS: Final = 0.05


class Frame(Structure, Protocol):
    """What is asked of a labelled frame; lmp_hl.training.frames reads and checks such frames."""

    @property
    def energy(self) -> float:
        """Total energy, eV."""

    @property
    def forces(self) -> Any:
        """(num_atoms, 3) eV/Å."""

    @property
    def stress(self) -> Any:
        """(3, 3) eV/Å³, positive in tension, or None."""

    @property
    def config_type(self) -> str:
        """A word for the kind of structure, "" without one."""

    @property
    def source(self) -> str:
        """Where the frame comes from, for messages."""


class Model(Protocol):
    """What is asked of a model; lmp_hl.model_file.load returns one."""

    elements: list[str]
    cutoff: float
    num_layers: int
    dtype: str
    fields: list[str]
    field_units: list[str]

    def evaluate(
        self, inputs: dict[str, torch.Tensor], with_fields: bool
    ) -> dict[str, torch.Tensor]:
        """Energies, edge gradients and, when asked, every field (keys.py)."""


@dataclass(frozen=True)
class Predictions:
    """One set of frames: labels, predictions and the signals that may rank errors."""

    num_atoms: NDArray[np.int64]  # (num_frames,)
    config_type: NDArray[np.str_]  # (num_frames,)
    energy_true: Array  # (num_frames,) eV
    energy: Array  # (num_frames,) eV
    stress_true: Array  # (num_frames, 3, 3) eV/Å³, nan where the frame has none
    stress: Array  # (num_frames, 3, 3) eV/Å³, nan likewise
    frame: NDArray[np.int64]  # (num_atoms in all,)
    numbers: NDArray[np.int64]  # (num_atoms in all,)
    forces_true: Array  # (num_atoms in all, 3) eV/Å
    forces: Array  # (num_atoms in all, 3) eV/Å
    fields: dict[str, Array]  # name -> (num_atoms in all,), the model's, energy left out
    field_units: dict[str, str]
    controls: dict[str, Array]  # name -> (num_atoms in all,)

    @property
    def num_frames(self) -> int:
        """Frames in the set."""
        return len(self.num_atoms)

    @property
    def error(self) -> Array:
        """(num_atoms in all,) sqrt(|ΔF|²/3), eV/Å."""
        return np.sqrt(((self.forces - self.forces_true) ** 2).mean(axis=1))

    @property
    def signals(self) -> dict[str, Array]:
        """Fields, then controls."""
        return {**self.fields, **self.controls}

    @property
    def sizes(self) -> list[str]:
        """Fields that claim the size of a force error: those in eV/Å that are no bound."""
        known = [n for n in self.fields if self.field_units[n] == "eV/Angstrom"]
        return [n for n in known if n != keys.FORCE_BOUND]

    @property
    def kinds(self) -> NDArray[np.str_]:
        """(num_atoms in all,) config_type of each atom's frame."""
        return self.config_type[self.frame]

    def groups(self) -> dict[str, NDArray[Any] | None]:
        """Groups to rank in: pooled, within element, config_type (and element), site where known.

        Sites exist when all frames list the same elements in the same order (one molecule, say) and
        there is more than one frame.
        """
        found: dict[str, NDArray[Any] | None] = {"pooled": None, "within_element": self.numbers}
        if len(np.unique(self.config_type)) > 1:
            _, kind = np.unique(self.kinds, return_inverse=True)
            found["within_config_type"] = 1000 * kind + self.numbers
        same = self.num_frames > 1 and bool((self.num_atoms == self.num_atoms[0]).all())
        if same:
            table = self.numbers.reshape(self.num_frames, -1)
            if bool((table == table[0]).all()) and len(np.unique(table[0])) > 1:
                found["within_site"] = np.tile(np.arange(table.shape[1]), self.num_frames)
        return found

    def per_frame(self, values: Array, how: str) -> Array:
        """Mean or largest value of each frame's atoms, (num_frames,)."""
        starts = np.concatenate([[0], np.cumsum(self.num_atoms)[:-1]])
        if how == "max":
            return np.asarray(np.maximum.reduceat(values, starts))
        return np.asarray(np.add.reduceat(values, starts) / self.num_atoms)


# prediction -------------------------------------------------------------------------------------
def coordination(
    numbers: NDArray[np.int64], edge_index: NDArray[np.int64], distances: Array
) -> tuple[Array, Array]:
    """Counts of the neighbours within 1.3 times the sum of the covalent radii.

    Args:
        numbers: (num_atoms,) atomic numbers.
        edge_index: (2, num_edges).
        distances: (num_edges,) Å; neighbours beyond the list's cutoff are not seen.

    Returns:
        the smooth count of `CONTROLS` and the integer count, (num_atoms,) each.
    """
    reach = COORDINATION_REACH * (covalent_radii[numbers[edge_index]].sum(axis=0))
    smooth = 1 / (1 + np.exp(np.minimum((distances / reach - 1) / COORDINATION_SOFTNESS, 60)))
    count = (distances < reach).astype(np.float64)
    return (
        np.bincount(edge_index[0], smooth, len(numbers)).astype(np.float64),
        np.bincount(edge_index[0], count, len(numbers)).astype(np.float64),
    )


def _predict_frame(model: Model, frame: Frame) -> dict[str, Any]:
    numbers = np.asarray(frame.numbers, dtype=np.int64)
    inputs = graph_inputs(frame, model.elements, model.cutoff, model.num_layers, model.dtype)
    outputs = {k: v.detach().cpu().numpy() for k, v in model.evaluate(inputs, True).items()}
    edge_index = inputs[keys.EDGE_INDEX].numpy()
    vectors = inputs[keys.EDGE_VECTORS].numpy().astype(np.float64)
    gradients = outputs[keys.EDGE_GRADIENTS].astype(np.float64)
    forces = edge_forces(inputs[keys.EDGE_INDEX], torch.from_numpy(gradients), len(numbers)).numpy()
    outer = vectors.T @ gradients
    energy = outputs[keys.ENERGY].astype(np.float64)
    names = [name for name in model.fields if name != keys.ENERGY]
    fields = {name: outputs[name].astype(np.float64) for name in names}
    for name, values in {"energy": energy, "forces": forces, **fields}.items():
        if not np.isfinite(values).all():
            where = f"{frame.source}: the model's {name} is not finite"
            raise ValueError(f"{where}; look at the structure, or leave the frame out")
    distances = np.linalg.norm(vectors, axis=1)
    nearest = np.full(len(numbers), float(model.cutoff))
    np.minimum.at(nearest, edge_index[0], distances)
    stress = stress_true = np.full((3, 3), np.nan)
    if frame.stress is not None:
        stress_true = np.asarray(frame.stress, dtype=np.float64)
        stress = (
            (outer + outer.T) / 2 / abs(np.linalg.det(np.asarray(frame.cell, dtype=np.float64)))
        )
    return {
        "numbers": numbers,
        "energy": energy.sum(),
        "stress": stress,
        "stress_true": stress_true,
        "forces": forces,
        "fields": fields,
        "controls": {
            "force_norm": np.linalg.norm(forces, axis=1),
            "atom_energy": energy,
            "neighbor_distance": nearest,
            "coordination": coordination(numbers, edge_index, distances)[0],
        },
    }


def predict(
    model: Model, frames: Sequence[Frame], name: str = "frames", progress: bool = False
) -> Predictions:
    """Evaluate every frame by itself.

    Args:
        model: a loaded model file.
        frames: labelled frames.
        name: stands in messages and on the progress bar.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: no frames, or the model returned something that is not finite.
    """
    if not frames:
        raise ValueError(f"{name}: no frames to evaluate")
    steps: Iterable[Frame] = frames
    if progress:
        from rich.console import Console
        from rich.progress import track

        steps = track(frames, f"evaluating {Path(name).name}", console=Console(stderr=True))
    done = [_predict_frame(model, frame) for frame in steps]
    num_atoms = np.array([len(d["numbers"]) for d in done])
    units = dict(zip(model.fields, model.field_units, strict=True))

    def join(part: str) -> dict[str, Array]:
        return {n: np.concatenate([d[part][n] for d in done]) for n in done[0][part]}

    return Predictions(
        num_atoms=num_atoms,
        config_type=np.array([f.config_type or "(none)" for f in frames]),
        energy_true=np.array([float(f.energy) for f in frames]),
        energy=np.array([d["energy"] for d in done]),
        stress_true=np.stack([d["stress_true"] for d in done]),
        stress=np.stack([d["stress"] for d in done]),
        frame=np.repeat(np.arange(len(frames)), num_atoms),
        numbers=np.concatenate([d["numbers"] for d in done]),
        forces_true=np.concatenate([np.asarray(f.forces, np.float64) for f in frames]),
        forces=np.concatenate([d["forces"] for d in done]),
        fields=join("fields"),
        field_units={n: u for n, u in units.items() if n != keys.ENERGY},
        controls=join("controls"),
    )


# the numbers ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Resampling:
    num_resamples: int
    seed: int

    def interval(self, statistic: Any, *num_frames: int) -> dict[str, float]:
        return metrics.bootstrap_interval(
            statistic, num_frames, self.num_resamples, self.seed
        ).as_dict()


def _accuracy(p: Predictions, resampling: _Resampling) -> dict[str, Any]:
    """RMSE of energy, forces and stress, and the size of every field that claims one."""
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
    report["calibration"] = {name: _calibration(p, name, resampling) for name in p.sizes}
    # as promised: every frame counts the same, however many atoms it has
    kept = {}
    if keys.FORCE_BOUND in p.fields:
        kept["errors_within_force_bound"] = p.error <= p.fields[keys.FORCE_BOUND]
    if keys.EXTRAPOLATING in p.fields:
        kept["atoms_not_extrapolating"] = p.fields[keys.EXTRAPOLATING] == 0
    report["promises"] = {}
    for name, values in kept.items():
        shares = p.per_frame(values.astype(np.float64), "mean")
        report["promises"][name] = resampling.interval(
            lambda w, x=shares: float(w @ x / w.sum()), p.num_frames
        )
    return report


def _calibration(p: Predictions, name: str, resampling: _Resampling) -> dict[str, Any]:
    std, error = p.fields[name], p.error
    signed = (p.forces - p.forces_true).ravel()
    curve = metrics.reliability_curve(std, error)
    return {
        "size_ratio": resampling.interval(
            lambda w: metrics.size_ratio(std, error, w[p.frame]), p.num_frames
        ),
        "gaussian_nll_nats": metrics.gaussian_nll(np.repeat(std, 3), signed),
        "coverage": {
            str(level): metrics.coverage(np.repeat(std, 3), signed, level)
            for level in (0.5, 0.6827, 0.9, 0.95)
        },
        "reliability": {
            "predicted_eV_per_Angstrom": curve.predicted.tolist(),
            "observed_eV_per_Angstrom": curve.observed.tolist(),
            "count": curve.count.tolist(),
        },
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


def _scores(
    names: Sequence[str],
    controls: Sequence[str],
    statistic: Any,
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
    turned = np.array([n in controls and v < nothing for n, v in zip(names, value, strict=True)])
    value, draws = (np.where(turned, 2 * nothing - x, x) for x in (value, draws))
    is_control = np.array([n in controls for n in names])
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


def _best(scores: Mapping[str, Any], fields: Iterable[str]) -> str | None:
    """The field with the largest score; None without fields or ranks."""
    known = [f for f in fields if math.isfinite(scores[f]["value"])]
    return max(known, key=lambda f: scores[f]["value"], default=None)


def _ranking(p: Predictions, resampling: _Resampling) -> dict[str, Any]:
    signals = p.signals
    ranking = {}
    for kind, groups in p.groups().items():
        correlation = RankCorrelation(list(signals.values()), p.error, groups)
        ranking[kind] = _scores(
            list(signals), list(p.controls),
            lambda w, c=correlation: c(w[p.frame]), [p.num_frames], 0.0, resampling,
        )  # fmt: skip
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


def report(
    data: Predictions, seen: Predictions | None = None, num_resamples: int = 400, seed: int = 0
) -> dict[str, Any]:
    """All numbers as one dict that JSON can hold; the unit stands in the key.

    Args:
        data: the frames in question; with `seen` the frames held out of training.
        seen: frames like those the model was trained on.
        num_resamples: bootstrap draws of whole frames; every interval holds 95 %.
        seed: of the draws.

    Returns:
        "sets": name -> errors and calibration; "ranking": name -> grouping -> signal -> Spearman's
        rho with the force error; "separation" (with `seen`): frame mean or max -> signal -> AUROC
        of held-out against seen, and "separation_by_error", the same of the true force error;
        "best_field": grouping -> field; "controls": what they are.
    """
    resampling = _Resampling(num_resamples, seed)
    sets = {"data": data} if seen is None else {"held out": data, "seen": seen}
    out: dict[str, Any] = {"sets": {}, "ranking": {}}
    for name, p in sets.items():
        elements = {z: chemical_symbols[z] for z in np.unique(p.numbers)}
        kinds = {k: str(k) for k in np.unique(p.config_type)}
        out["sets"][name] = {
            **_accuracy(p, resampling),
            "by_element": _parts(p, p.numbers, elements),
            "by_config_type": _parts(p, p.kinds, kinds),
        }
        out["ranking"][name] = _ranking(p, resampling)
    if seen is not None:
        out["separation"] = _separation(data, seen, resampling)
        out["separation_by_error"] = _separation_by_error(data, seen, resampling)
    first = out["ranking"][next(iter(sets))]
    out["best_field"] = {kind: _best(scores, data.fields) for kind, scores in first.items()}
    for how, scores in out.get("separation", {}).items():
        out["best_field"][f"auroc_{how}"] = _best(scores, data.fields)
    out["controls"] = dict(CONTROLS)
    out["bootstrap"] = {"num_resamples": num_resamples, "seed": seed, "level": 0.95}
    return out


# output -----------------------------------------------------------------------------------------
def write_json(path: Path | str, numbers: Mapping[str, Any]) -> None:
    """The report as JSON; numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple | np.ndarray):
            return [plain(v) for v in value]
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        return value.item() if isinstance(value, np.generic) else value

    _write(path, json.dumps(plain(numbers), indent=1) + "\n")


def write_csv(path: Path | str, sets: Mapping[str, Predictions]) -> None:
    """One line per atom: labels, predictions, force error, fields and controls (eV, Å, nat)."""
    first = next(iter(sets.values()))
    head = ["set", "frame", "atom", "element", "config_type"]
    head += [f"f{x}{end}" for end in ("_true", "") for x in "xyz"]
    head += ["force_error", *first.signals]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(head)
    for name, p in sets.items():
        start = np.concatenate([[0], np.cumsum(p.num_atoms)])
        numbers = np.column_stack([p.forces_true, p.forces, p.error, *p.signals.values()])
        kinds = p.kinds
        for k, row in enumerate(numbers):
            frame = int(p.frame[k])
            symbol = chemical_symbols[p.numbers[k]]
            writer.writerow(
                [name, frame, k - start[frame], symbol, kinds[k], *(f"{v:.9g}" for v in row)]
            )
    _write(path, text.getvalue())


def _write(path: Path | str, text: str) -> None:
    """Write a file as a whole: when that fails, an older one is still there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {path}: {error.strerror}; make room or choose another place"
        ) from error


def write_figures(
    folder: Path | str, sets: Mapping[str, Predictions], numbers: Mapping[str, Any]
) -> list[Path]:
    """Parity, uncertainty against error for each field, and rankings; returns the files written."""
    from lmp_hl import plots

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # seen first, so that held-out points lie on top
    ordered = dict(sorted(sets.items(), key=lambda item: item[0] != "seen"))
    first = next(iter(sets.values()))
    paths = [
        plots.parity(
            {n: (p.energy_true / p.num_atoms, p.energy / p.num_atoms) for n, p in ordered.items()},
            {n: (p.forces_true, p.forces) for n, p in ordered.items()},
            folder / "parity.png",
        )
    ]
    for name in (n for n in first.fields if n != keys.EXTRAPOLATING):  # a flag is no axis
        paths.append(
            plots.uncertainty_error(
                {n: (p.fields[name], p.error) for n, p in ordered.items()},
                folder / f"error_{name}.png",
                plots.field_label(name, first.field_units[name]),
                calibrated=name in first.sizes,
                kinds={n: p.kinds for n, p in ordered.items()},
            )
        )
    panels = {}
    for title, scores, nothing in _columns(numbers):
        panels[title] = (
            {n: Interval(s["value"], s["low"], s["high"]) for n, s in scores.items()},
            nothing,
        )
    paths.append(plots.rankings(panels, list(first.fields), folder / "rankings.png"))
    return paths


def _columns(numbers: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], float]]:
    """Title, scores and worth of nothing of each ranking of the data and of the separation."""
    ranking = next(iter(numbers["ranking"].values()))
    columns = [(kind.replace("_", " "), scores, 0.0) for kind, scores in ranking.items()]
    for how, scores in numbers.get("separation", {}).items():
        columns.append((f"AUROC, frame {how}", scores, 0.5))
    return columns


def print_report(numbers: Mapping[str, Any], console: Any = None) -> None:
    """The numbers as aligned tables on a rich console (stdout by default)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)  # a log file has no right margin
    columns = _columns(numbers)
    wide = console.width >= 32 + 22 * len(columns)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        made.add_column(columns[0])
        for column in columns[1:]:
            made.add_column(column, justify="right", no_wrap=True)
        return made

    def cell(s: Mapping[str, float], form: str = ".3g") -> str:
        value, low, high = (format(s[k], form) for k in ("value", "low", "high"))
        if wide:
            return f"{value} [{low}, {high}]"
        return f"{value} ±{format((s['high'] - s['low']) / 2, form)}"

    sizes = list(next(iter(numbers["sets"].values()))["calibration"])
    stress = any("stress_rmse_meV_per_Angstrom3" in s for s in numbers["sets"].values())
    errors = table(
        "Errors (RMSE) and size of the predicted error",
        "set", "frames", "atoms", "energy meV/atom", "forces meV/Å",
        *(["stress meV/Å³"] if stress else []),
        *(f"{n} predicted/true" for n in sizes),
    )  # fmt: skip
    for name, s in numbers["sets"].items():
        errors.add_row(
            name, f"{s['num_frames']:,}", f"{s['num_atoms']:,}",
            cell(s["energy_rmse_meV_per_atom"]), cell(s["forces_rmse_meV_per_Angstrom"]),
            *([cell(s["stress_rmse_meV_per_Angstrom3"]) if "stress_rmse_meV_per_Angstrom3" in s
               else "-"] if stress else []),
            *(cell(s["calibration"][n]["size_ratio"], ".2f") for n in sizes),
        )  # fmt: skip
        for part in ("by_element", "by_config_type"):
            if len(s[part]) > 1:
                for label, values in s[part].items():
                    errors.add_row(
                        f"  {label}", "", f"{values['num_atoms']:,}", "",
                        f"{values['forces_rmse_meV_per_Angstrom']:.3g}", *([""] if stress else []),
                        *(f"{values['size_ratio'][n]:.2f}" for n in sizes), style="dim",
                    )  # fmt: skip
    console.print(errors)
    for name, s in numbers["sets"].items():
        for kept, share in s["promises"].items():
            stated = numbers.get("coverage")
            promise = f" (promised for frames like the validation frames: {stated:.0%})"
            console.print(
                f"  {name}: {kept.replace('_', ' ')}: {cell(share, '.1%')}"
                + (promise if stated else "")
            )

    which = next(iter(numbers["ranking"]))
    title = "Spearman's rho with the force error" + ("" if which == "data" else f", {which} frames")
    if "separation" in numbers:
        title += "; AUROC of held-out against seen frames"
    ranks = table(title, "signal", *(c[0] for c in columns))
    best = dict(zip((c[0] for c in columns), numbers["best_field"].values(), strict=True))
    signals = list(columns[0][1])
    for name in signals:
        control = name in numbers["controls"]
        ranks.add_row(
            f"{name} (control)" if control else name,
            *(
                ("[bold green]▸ " if best[t] == name else "  ") + cell(scores[name], ".2f")
                for t, scores, _ in columns
            ),
            style="dim" if control else "",
            end_section=not control and signals[signals.index(name) + 1] in numbers["controls"],
        )
    console.print(ranks)
    for t, scores, _ in columns:
        if best[t] is not None:
            lead = scores[best[t]]["over_best_control"]
            console.print(f"  {t}: {best[t]} leads the best control by {cell(lead, '.2f')}")
    if "separation_by_error" in numbers:
        mean, largest = (cell(s, ".2f") for s in numbers["separation_by_error"].values())
        console.print(
            f"  the true force error itself separates with AUROC {mean} (mean), {largest} (max)"
        )
    console.print(
        "  95 % intervals by resampling frames; ▸ best field; a control takes its better sign.",
        style="dim",
    )


def read(path: Path | str, elements: Sequence[str], **label_keys: str) -> list[Any]:
    """Checked labelled frames of a file ASE reads.

    Args:
        path: the file.
        elements: chemical symbols the model knows.
        label_keys: energy_key, forces_key, stress_key where they differ from "energy", ...

    Raises:
        ValueError: as lmp_hl.training.frames.read_frames.
    """
    from lmp_hl.training.config import DataConfig
    from lmp_hl.training.frames import read_frames

    config = DataConfig(train=(Path(path),), **label_keys)  # type: ignore[arg-type]
    return list(read_frames(path, config, "evaluate", elements))


def run(
    model_path: Path | str,
    data_path: Path | str,
    seen_path: Path | str | None = None,
    json_path: Path | str | None = None,
    csv_path: Path | str | None = None,
    figures: Path | str | None = None,
    num_resamples: int = 400,
    progress: bool = True,
    **label_keys: str,
) -> dict[str, Any]:
    """Load, evaluate, print and write what was asked for; the verb `lmp-hl evaluate`."""
    from lmp_hl import model_file

    model = model_file.load(model_path)
    paths = {"data": data_path} if seen_path is None else {"held out": data_path, "seen": seen_path}
    frames = {name: read(path, model.elements, **label_keys) for name, path in paths.items()}
    sets = {n: predict(model, f, str(paths[n]), progress) for n, f in frames.items()}
    numbers = report(next(iter(sets.values())), sets.get("seen"), num_resamples)
    numbers = {
        "model": str(model_path),
        "files": {n: str(p) for n, p in paths.items()},
        "coverage": model.card.get("conformal", {}).get("coverage"),
        **numbers,
    }
    print_report(numbers)
    if json_path is not None:
        write_json(json_path, numbers)
    if csv_path is not None:
        write_csv(csv_path, sets)
    if figures is not None:
        write_figures(figures, sets, numbers)
    return numbers
