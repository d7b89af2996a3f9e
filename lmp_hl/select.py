"""Which configurations of a trajectory to label: the most uncertain ones, none of them twice.

Frames that follow each other are nearly the same, and so are the most uncertain atoms of one frame.
Candidates are the environments of atoms whose uncertainty is above a threshold; of these the most
uncertain comes first and then, again and again, the one whose fingerprint is farthest from those
chosen (farthest-point selection).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ase
import ase.io
import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray

from lmp_hl import keys
from lmp_hl.graph import edge_vectors, graph_inputs, neighbor_list, periodic_cell
from lmp_hl.h5md import Trajectory, open_trajectory

Array = NDArray[np.float64]

MAX_CANDIDATES: Final = 2000  # the most uncertain; more are never looked at
PER_FRAME: Final = 10  # environments of one frame that may be candidates
REACH: Final = 5.0  # Å, of a fingerprint without a model
NUM_RADIAL: Final = 10
VACUUM: Final = 10.0  # Å, around a cluster


@dataclass(frozen=True)
class Choice:
    """An atom of a trajectory that is worth a label."""

    frame: int
    step: int
    time: float  # in the unit of the trajectory
    atom: int  # row in the frame
    id: int
    element: str
    field: str
    value: float  # in the unit of the field

    def __str__(self) -> str:
        """For a terminal."""
        return f"step {self.step:,}, atom {self.id} ({self.element}): {self.field} {self.value:.3g}"


def select(
    path: Path | str,
    field: str,
    threshold: float,
    number: int,
    whole_frames: bool = True,
    model: Any = None,
) -> list[Choice]:
    """The most uncertain and most different environments above a threshold.

    Args:
        path: trajectory of fix hlgauss/h5md with positions and species.
        field: column by which atoms are uncertain.
        threshold: in its unit.
        number: how many to choose at most.
        whole_frames: each from a frame of its own (its most uncertain atom stands for it);
            otherwise up to ten from one frame.
        model: model_file.Model whose features are the fingerprint; None: see _moments.

    Returns:
        The most uncertain first, then in the order of choice; empty if no atom is above.

    Raises:
        ValueError: no species in the file, or a number that is not positive.
    """
    if number < 1:
        raise ValueError(f"cannot choose {number} configurations; wanted at least 1")
    with open_trajectory(path) as trajectory:
        if "species" not in trajectory.columns:
            raise ValueError(f"{path}: holds no species; add type to the fix that writes it")
        candidates = _candidates(trajectory, field, threshold, 1 if whole_frames else PER_FRAME)
        if not candidates:
            return []
        numbers = [np.unique(trajectory.values("species", k)) for k in range(trajectory.num_frames)]
        of_frame = (
            _moments(np.unique(np.concatenate(numbers))) if model is None else _features(model)
        )
        in_order, prints = [], []
        for k in dict.fromkeys(choice.frame for choice in candidates):
            here = [choice for choice in candidates if choice.frame == k]
            in_order += here
            prints.append(of_frame(trajectory.to_ase(k), [choice.atom for choice in here]))
    first = max(range(len(in_order)), key=lambda i: in_order[i].value)
    return [in_order[i] for i in farthest_points(np.concatenate(prints), number, first)]


def _candidates(
    trajectory: Trajectory, field: str, threshold: float, per_frame: int
) -> list[Choice]:
    found = []
    for k in range(trajectory.num_frames):
        frame = trajectory.frame(k)
        values = np.asarray(frame[field], dtype=np.float64)
        above = np.flatnonzero(values > threshold)
        ids = frame.arrays.get("id", np.arange(1, frame.num_atoms + 1))
        for i in above[np.argsort(-values[above], kind="stable")][:per_frame]:
            element = chemical_symbols[int(frame["species"][i])]
            about = (k, frame.step, frame.time, int(i), int(ids[i]), element)
            found.append(Choice(*about, field, float(values[i])))
    return sorted(found, key=lambda choice: -choice.value)[:MAX_CANDIDATES]


def _elements(trajectory: Trajectory) -> NDArray[np.int64]:
    """Atomic numbers that occur in any frame; an atom that is missing in one has -1 there."""
    found = [np.unique(trajectory.values("species", k)) for k in range(trajectory.num_frames)]
    numbers = np.unique(np.concatenate(found))
    return numbers[numbers > 0]


def farthest_points(points: Array, number: int, first: int) -> list[int]:
    """Start at one point, then always take the one farthest from those taken.

    Args:
        points: (num_points, num_features); each feature is divided by its standard deviation.
        number: how many at most; identical points are taken once.
        first: where to start.

    Returns:
        Their rows, in the order of choice.
    """
    spread = points.std(0)
    scaled = points[:, spread > 0] / spread[spread > 0]
    chosen = [first]
    distance = np.linalg.norm(scaled - scaled[first], axis=1)
    while len(chosen) < number and distance.max() > 0:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
    return chosen


# fingerprints -----------------------------------------------------------------------------------
def _moments(
    elements: NDArray[np.int64],
) -> Callable[[ase.Atoms, Sequence[int]], Array]:
    """Fingerprints from sums over the neighbours of each element, sum_j f_n(r_ij) T_l(r_ij).

    f_n are ten Gaussians of the distance with a smooth end at 5 Å, T_0 = 1; without f_n also the
    norms for T_l the products of l = 1, 2, 3 unit vectors.
    """
    middles = np.linspace(1.0, REACH, NUM_RADIAL)
    width = middles[1] - middles[0]

    def of_frame(atoms: ase.Atoms, chosen: Sequence[int]) -> Array:
        box = periodic_cell(atoms.cell[:], atoms.pbc)
        pairs, shifts = neighbor_list(atoms.positions, box, atoms.pbc, REACH)
        rows = []
        for i in chosen:
            near = slice(*np.searchsorted(pairs[0], [i, i + 1]))
            vectors = edge_vectors(atoms.positions, box, pairs[:, near], shifts[near])
            r = np.linalg.norm(vectors, axis=1)
            end = 0.5 + 0.5 * np.cos(np.pi * r / REACH)
            radial = end[:, None] * np.exp(-0.5 * ((r[:, None] - middles) / width) ** 2)
            parts = [(elements == atoms.numbers[i]).astype(np.float64)]
            for z in elements:
                of_z = atoms.numbers[pairs[1, near]] == z
                f, u = end[of_z], vectors[of_z] / r[of_z, None]
                tensors = (
                    np.einsum("e,ea->a", f, u),
                    np.einsum("e,ea,eb->ab", f, u, u),
                    np.einsum("e,ea,eb,ec->abc", f, u, u, u),
                )
                parts += [radial[of_z].sum(0), np.array([np.linalg.norm(t) for t in tensors])]
            rows.append(np.concatenate(parts))
        return np.array(rows)

    return of_frame


def _features(model: Any) -> Callable[[ase.Atoms, Sequence[int]], Array]:
    """Fingerprints from the invariant features of a model."""
    from lmp_hl.nn.backbone import Features
    from lmp_hl.nn.heads import invariants

    def of_frame(atoms: ase.Atoms, chosen: Sequence[int]) -> Array:
        inputs = graph_inputs(atoms, model.elements, model.cutoff, model.num_layers, model.dtype)
        with torch.no_grad():
            features, _ = getattr(model.module.stages.ensemble.members, "0").atoms(inputs)
            rows = invariants(Features(*features))[torch.tensor(chosen)]
        return rows.double().numpy()

    return of_frame


# output -----------------------------------------------------------------------------------------
def write(
    path: Path | str, choices: Sequence[Choice], out: Path | str, radius: float | None = None,
    cutoff: float | None = None,
) -> list[ase.Atoms]:  # fmt: skip
    """Write what was chosen as extended XYZ, ready for a DFT code; no energies, no forces.

    Whole frames, or clusters: all atoms within `radius` of the chosen one, without periodicity, in
    a box with 10 Å of vacuum. A cluster has a free surface that the run did not have, so only the
    atoms marked in the array `core`, whose own neighbourhood within `cutoff` is complete, have
    forces worth learning.

    Args:
        path: the trajectory.
        choices: from select.
        out: file to write.
        radius: Å; None writes whole frames.
        cutoff: of the model, Å; None: half the radius.

    Returns:
        What was written.

    Raises:
        ValueError: a radius that leaves no core, or a periodic cell too small for such a sphere.
    """
    if radius is not None and cutoff is not None and radius <= cutoff:
        raise ValueError(
            f"an environment of {radius:g} Å has no atom whose neighbourhood within the model's "
            f"cutoff, {cutoff:g} Å, is complete; take more than that, {2 * cutoff:g} Å say"
        )
    written = []
    with open_trajectory(path) as trajectory:
        for choice in choices:
            atoms = trajectory.to_ase(choice.frame)
            atoms.calc = None
            kept = {"numbers", "positions", "id", *trajectory.fields} - {keys.ENERGY}
            for name in set(atoms.arrays) - kept:
                del atoms.arrays[name]
            atom = choice.atom
            if radius is not None:
                atoms, atom = _cluster(atoms, atom, radius, cutoff or radius / 2), 0
            atoms.info = {
                "step": choice.step, "time": choice.time, "uncertain_atom": atom,
                "uncertain_by": choice.field, "uncertainty": choice.value,
            }  # fmt: skip
            written.append(atoms)
    if written:
        ase.io.write(out, written, format="extxyz")
    return written


def _cluster(atoms: ase.Atoms, center: int, radius: float, cutoff: float) -> ase.Atoms:
    heights = 1 / np.linalg.norm(np.linalg.pinv(atoms.cell[:]), axis=0)
    if (heights[atoms.pbc] < 2 * radius).any():
        raise ValueError(
            f"a sphere of {radius:g} Å does not fit into the periodic cell, {heights.min():.1f} Å "
            "across: label whole frames (leave --environment away)"
        )
    box = periodic_cell(atoms.cell[:], atoms.pbc)
    pairs, shifts = neighbor_list(atoms.positions, box, atoms.pbc, radius)
    near = pairs[0] == center
    inside = np.concatenate([[center], pairs[1][near]])
    around = edge_vectors(atoms.positions, box, pairs[:, near], shifts[near])
    vectors = np.concatenate([np.zeros((1, 3)), around])
    cluster = atoms[inside]
    size = 2 * (radius + VACUUM)
    cluster.set_cell(np.eye(3) * size)
    cluster.set_celldisp(np.zeros(3))
    cluster.pbc = False
    cluster.positions = vectors + size / 2
    cluster.arrays["core"] = np.linalg.norm(vectors, axis=1) <= radius - cutoff
    return cluster
