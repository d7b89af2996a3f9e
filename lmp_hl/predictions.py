"""A model's predictions on labelled frames, and the signals that may rank their errors.

The force error of an atom is sqrt(|ΔF|²/3), the root mean square over its three components, eV/Å.
A control is a number anybody has without an uncertainty (`CONTROLS`); an uncertainty that does not
beat it is not worth its price.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from ase.data import covalent_radii
from numpy.typing import NDArray

from lmp_hl import keys
from lmp_hl.graph import Structure, graph_inputs
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
    "num_atoms": "number of atoms in the frame",
    "element_error": (
        "a constant per element, eV/Å: RMS force error of its atoms in the seen frames (without "
        "those, in the same frames)"
    ),
    "site_error": "a constant per atom of the molecule, found likewise, eV/Å",
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
    # field -> (num_frames,) eV, the size that it gives the error of a frame's energy
    energy_std: dict[str, Array] = field(default_factory=dict)

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
        """Fields that claim the size of a force component's error."""
        unit = "eV/Angstrom"
        return [n for n in self.fields if n.endswith("std") and self.field_units[n] == unit]

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
        high = np.maximum.reduceat(values, starts)
        if how == "max":
            return np.asarray(high)
        mean = np.add.reduceat(values, starts) / self.num_atoms
        # the mean of equal values is that value: rounding may not rank frames
        return np.clip(mean, np.minimum.reduceat(values, starts), high)


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
    energy_std = {n: np.sqrt((fields[n] ** 2).sum()) for n in names if n in keys.ADDITIVE}
    of_frame = {n: keys.OF_FRAME + n for n in names}
    energy_std |= {n: float(outputs[key]) for n, key in of_frame.items() if key in outputs}
    if keys.MEMBERS in outputs:
        energy_std[keys.ENSEMBLE_ENERGY_STD] = outputs[keys.MEMBERS].sum(axis=0).std(ddof=1)
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
        "energy_std": energy_std,
        "stress": stress,
        "stress_true": stress_true,
        "forces": forces,
        "fields": fields,
        "controls": {
            "force_norm": np.linalg.norm(forces, axis=1),
            "atom_energy": energy,
            "neighbor_distance": nearest,
            "coordination": coordination(numbers, edge_index, distances)[0],
            "num_atoms": np.full(len(numbers), float(len(numbers))),
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
        energy_std={n: np.array([d["energy_std"][n] for d in done]) for n in done[0]["energy_std"]},
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
