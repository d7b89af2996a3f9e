"""Labelled frames: read with ASE, checked at the door, and turned into batches of graphs.

Energies in eV, forces in eV/Å, stress in eV/Å³ with ASE's sign (positive in tension). A frame is
named in messages as "FILE: frame K", K counted from 0 as ASE counts (`FILE@K`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from ase.io import iread
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray
from torch import Tensor

from lmp_hl import keys
from lmp_hl.graph import (
    DTYPES,
    edge_vectors,
    graph_inputs,
    neighbor_list,
    periodic_cell,
    species_indices,
)

from .config import DataConfig

log = logging.getLogger(__name__)

# what a batch holds beside the inputs of lmp_hl/keys.py ----------------------------------------
BATCH: Final = "batch"  # (num_nodes,) int64, the graph of each atom
NUM_ATOMS: Final = "num_atoms"  # (num_graphs,) int64
TARGET_ENERGY: Final = "target_energy"  # (num_graphs,) float64, eV, minus REFERENCE_ENERGY
REFERENCE_ENERGY: Final = "reference_energy"  # (num_graphs,) float64, eV, sum over the atoms
TARGET_FORCES: Final = "target_forces"  # (num_nodes, 3) model dtype, eV/Å
TARGET_STRESS: Final = "target_stress"  # (num_graphs, 3, 3) model dtype, eV/Å³, NaN where absent
VOLUME: Final = "volume"  # (num_graphs,) model dtype, Å³; inf without a cell, so that stress is 0

MIN_DISTANCE: Final = 0.3  # Å; no labelled structure has atoms closer than that
# eV/atom; more than any cohesive energy, so isolated atoms among crystals pass
MIN_OUTLIER: Final = 10.0
OUTLIER_MADS: Final = 50.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One structure with its labels; lmp_hl.graph takes it as a structure."""

    numbers: NDArray[np.int64]
    """(num_atoms,) atomic numbers."""

    positions: NDArray[np.float64]
    """(num_atoms, 3) in Å."""

    cell: NDArray[np.float64]
    """(3, 3), rows are the cell vectors in Å."""

    pbc: NDArray[np.bool_]
    """(3,)"""

    energy: float
    """Total energy, eV."""

    forces: NDArray[np.float64]
    """(num_atoms, 3) in eV/Å."""

    stress: NDArray[np.float64] | None
    """(3, 3), symmetric, eV/Å³, positive in tension."""

    config_type: str
    """The frame's own `config_type`, "" without one."""

    source: str
    """"FILE: frame K"."""

    @property
    def num_atoms(self) -> int:
        """Number of atoms."""
        return len(self.numbers)

    @property
    def volume(self) -> float:
        """Volume of the cell in Å³, 0 without three cell vectors."""
        return float(abs(np.linalg.det(self.cell)))


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Everything a run reads: the frames of each split and what they say about the elements."""

    elements: tuple[str, ...]
    """Chemical symbols in the model's order."""

    reference_energies: dict[str, float]
    """Element -> eV, every one of `elements`."""

    train: list[Frame]
    valid: list[Frame]
    test: dict[str, list[Frame]]


def load_splits(config: DataConfig, seed: int) -> Splits:
    """Read and check all frames of a run.

    Args:
        config: the data section.
        seed: of the random split and of the choice of `max_frames`.

    Returns:
        Frames, elements (sorted by atomic number unless given) and reference energies.

    Raises:
        ValueError: whatever read_frames, split_frames, resolve_reference_energies and
            check_energy_outliers refuse; an element of the model that no training frame has.
    """
    train = read_frames(config.train, config, "train", config.elements)
    elements = config.elements or frame_elements(train)
    if config.valid is None:
        train, valid = split_frames(train, config.valid_fraction, seed)
    else:
        valid = read_frames(config.valid, config, "valid", elements)
    test = {
        name: read_frames(path, config, f"test {name}", elements)
        for name, path in config.test.items()
    }
    if config.max_frames is not None:
        train = _choose(train, config.max_frames, seed)
    unseen = sorted(set(elements) - set(frame_elements(train)))
    if unseen:
        raise ValueError(
            f"no training frame contains {', '.join(unseen)}, an element the model is to know; add "
            f"frames, or take it out of data.elements or the files (data.max_frames "
            f"{config.max_frames}, {len(train)} training frames)"
        )
    check_energy_outliers(
        [*train, *valid, *(f for frames in test.values() for f in frames)], elements
    )
    references = resolve_reference_energies(config, train, elements)
    return Splits(
        elements=elements, reference_energies=references, train=train, valid=valid, test=test
    )


def read_frames(
    paths: str | Path | Sequence[str | Path],
    config: DataConfig,
    split_name: str,
    elements: Sequence[str] | None = None,
) -> list[Frame]:
    """Read labelled frames from any file ASE reads, and refuse every one that cannot be right.

    Labels are looked for under the configured keys in `atoms.info` and `atoms.arrays`, then in the
    results of the attached calculator (where ASE puts `energy` and the like of extended XYZ).

    Args:
        paths: one file or several.
        config: the label keys.
        split_name: stands in messages, e.g. "train".
        elements: chemical symbols the model knows; None: any.

    Returns:
        The frames in the files' order, at least one.

    Raises:
        ValueError: file missing, empty or unreadable; energy or forces missing or not finite; a
            label of the wrong shape; an element not in `elements`; atoms closer than 0.3 Å (their
            own images included); a periodic cell without volume. File and frame are named.
    """
    files = [paths] if isinstance(paths, str | Path) else paths
    frames = []
    for path in files:
        for source, atoms in _read_atoms(Path(path), split_name):
            frames.append(_frame(atoms, source, config))
            try:
                _check_structure(frames[-1], elements)
            except ValueError as error:
                raise ValueError(f"{source} ({split_name}): {error}") from None
    return frames


def split_frames(
    frames: Sequence[Frame], valid_fraction: float, seed: int
) -> tuple[list[Frame], list[Frame]]:
    """Set a random share of the frames aside for validation.

    The share is drawn uniformly by numpy's generator seeded with `seed`: round(fraction · number),
    at least one on either side; both parts keep the frames' order. Neighbouring frames of a
    dynamics run end up in both parts and are nearly the same: name validation files where that
    matters.

    Args:
        frames: at least two.
        valid_fraction: between 0 and 1.
        seed: of the draw.

    Returns:
        (training frames, validation frames)

    Raises:
        ValueError: fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError(
            f"{len(frames)} frame cannot be divided into training and validation frames; give "
            f"more, or name validation files in data.valid"
        )
    number = min(max(round(valid_fraction * len(frames)), 1), len(frames) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(frames))[:number].tolist())
    log.info("%d of %d frames set aside for validation (seed %d)", number, len(frames), seed)
    return (
        [frame for k, frame in enumerate(frames) if k not in chosen],
        [frame for k, frame in enumerate(frames) if k in chosen],
    )


def frame_elements(frames: Sequence[Frame]) -> tuple[str, ...]:
    """Chemical symbols of the elements in the frames, sorted by atomic number."""
    numbers = np.unique(np.concatenate([frame.numbers for frame in frames]))
    return tuple(chemical_symbols[z] for z in numbers)


def resolve_reference_energies(
    config: DataConfig, frames: Sequence[Frame], elements: Sequence[str]
) -> dict[str, float]:
    """The reference energies the configuration asks for: fitted, given or read from a file.

    Args:
        config: `reference_energies` and, for a file, `energy_key`.
        frames: training frames, used by "fit".
        elements: chemical symbols that need one.

    Returns:
        element -> eV, in the order of `elements`.

    Raises:
        ValueError: an element has no energy in what was given.
    """
    setting = config.reference_energies
    if setting == "fit":
        return fit_reference_energies(frames, elements)
    if isinstance(setting, dict):
        known, origin = setting, "data.reference_energies"
    else:
        known, origin = read_reference_energies(setting, config.energy_key), str(setting)
    missing = [symbol for symbol in elements if symbol not in known]
    if missing:
        raise ValueError(
            f"{origin}: no reference energy for {', '.join(missing)} (found {', '.join(known)}); "
            f"add it, or set data.reference_energies: fit"
        )
    return {symbol: known[symbol] for symbol in elements}


def fit_reference_energies(frames: Sequence[Frame], elements: Sequence[str]) -> dict[str, float]:
    """Energy per element by least squares of E/N on the composition fractions.

    Every frame counts alike. When the compositions do not determine all elements (one molecule
    only, say) the solution of minimum norm is taken and a warning logged: sums over the frames' own
    compositions are right, the single energies are then a convention.

    Args:
        frames: at least one.
        elements: chemical symbols; the frames contain no other.

    Returns:
        element -> eV, in the order of `elements`.
    """
    fractions, energies = _composition(frames, elements)
    solution, _, rank, _ = np.linalg.lstsq(fractions, energies)
    if rank < len(elements):
        log.warning(
            "the frames' compositions determine only %d of %d reference energies (%s); the "
            "solution of minimum norm is used",
            rank,
            len(elements),
            ", ".join(elements),
        )
    return dict(zip(elements, solution.tolist(), strict=True))


def read_reference_energies(path: str | Path, energy_key: str = "energy") -> dict[str, float]:
    """Energies of isolated atoms from a file of one-atom frames.

    Args:
        path: any file ASE reads.
        energy_key: label of the energy, eV.

    Returns:
        element -> eV, in the file's order.

    Raises:
        ValueError: file missing or empty, a frame of more than one atom or without an energy, an
            element that comes twice.
    """
    energies: dict[str, float] = {}
    for source, atoms in _read_atoms(Path(path), "reference energies"):
        if len(atoms) != 1:
            raise ValueError(
                f"{source}: has {len(atoms)} atoms; reference energies need isolated atoms"
            )
        symbol = atoms.get_chemical_symbols()[0]
        if symbol in energies:
            raise ValueError(f"{source}: a second energy for {symbol}; keep one")
        energies[symbol] = _energy(atoms, source, energy_key)
    return energies


def check_energy_outliers(frames: Sequence[Frame], elements: Sequence[str]) -> None:
    """Refuse frames whose energy per atom lies absurdly far from the others': wrong unit or label.

    x = E/N minus its fit on the composition; the fit minimises Σ|x|, which a few wrong frames do
    not move (least squares would follow them). Refused is |x - median| > max(50 MAD, 10 eV/atom).

    Args:
        frames: all frames of a run.
        elements: chemical symbols; the frames contain no other.

    Raises:
        ValueError: names the frames, up to five.
    """
    fractions, energies = _composition(frames, elements)
    weights = np.ones(len(frames))
    residuals = energies
    for _ in range(50):  # iteratively reweighted least squares for the sum of absolute values
        solution = np.linalg.lstsq(fractions * weights[:, None], energies * weights)[0]
        residuals = energies - fractions @ solution
        # residuals below 1 meV/atom count as that, so no weight is infinite
        weights = np.maximum(np.abs(residuals), 1e-3) ** -0.5
    deviations = residuals - np.median(residuals)
    limit = max(OUTLIER_MADS * float(np.median(np.abs(deviations))), MIN_OUTLIER)
    far = np.flatnonzero(np.abs(deviations) > limit)
    if len(far):
        names = "; ".join(f"{frames[k].source} by {deviations[k]:+.1f}" for k in far[:5])
        more = f" and {len(far) - 5} more" if len(far) > 5 else ""
        raise ValueError(
            f"targets far outside: the energy per atom of {len(far)} of {len(frames)} frames lies "
            f"more than {limit:.1f} eV/atom from what their composition gives in the others "
            f"({names}{more}); energies must be total energies in eV of one level of theory: "
            f"relabel or remove them"
        )


class GraphDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Frames as graphs with targets, neighbour lists computed once.

    An item holds the inputs of keys.py and NUM_ATOMS, TARGET_ENERGY, REFERENCE_ENERGY,
    TARGET_FORCES, TARGET_STRESS and VOLUME as a batch of one has them.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        elements: Sequence[str],
        reference_energies: Mapping[str, float],
        cutoff: float,
        num_layers: int,
        dtype: str,
    ) -> None:
        """Compute all graphs.

        Args:
            frames: labelled frames.
            elements: chemical symbols in the model's order.
            reference_energies: element -> eV, subtracted from the energies.
            cutoff: Å.
            num_layers: message-passing layers of the model.
            dtype: "float32" or "float64".

        Raises:
            ValueError: a frame with an element that is not in `elements`, named.
        """
        self.frames = list(frames)
        per_species = torch.tensor([reference_energies[e] for e in elements], dtype=torch.float64)
        self.graphs = []
        for frame in self.frames:
            try:
                inputs = graph_inputs(frame, elements, cutoff, num_layers, dtype)
            except ValueError as error:
                raise ValueError(f"{frame.source}: {error}") from None
            self.graphs.append(inputs | _targets(frame, per_species[inputs[keys.SPECIES]], dtype))

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.graphs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The graph of one frame."""
        return self.graphs[index]


def collate_graphs(graphs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join graphs into one that is not connected: atoms and edges one graph after the other.

    Args:
        graphs: items of a GraphDataset of the same dtype and number of layers.

    Returns:
        The same keys, joined, and BATCH; edges stay sorted by centre.
    """
    num_atoms = torch.cat([graph[NUM_ATOMS] for graph in graphs])  # (num_graphs,)
    offsets = torch.cumsum(num_atoms, 0) - num_atoms
    special = {
        keys.EDGE_INDEX: torch.cat(
            [graph[keys.EDGE_INDEX] + n for graph, n in zip(graphs, offsets, strict=True)], dim=1
        ),
        keys.LAYER_NODES: torch.stack([graph[keys.LAYER_NODES] for graph in graphs]).sum(0),
        keys.LAYER_EDGES: torch.stack([graph[keys.LAYER_EDGES] for graph in graphs]).sum(0),
        BATCH: torch.repeat_interleave(torch.arange(len(graphs)), num_atoms),
    }
    joined = {
        key: torch.cat([graph[key] for graph in graphs]) for key in graphs[0] if key not in special
    }
    return joined | special


def _targets(frame: Frame, references: Tensor, dtype: str) -> dict[str, Tensor]:
    """The labels of one frame as a batch of one; `references` (num_atoms,) in eV."""
    reference = references.sum().reshape(1)
    stress = np.full((3, 3), np.nan) if frame.stress is None else frame.stress
    return {
        NUM_ATOMS: torch.tensor([frame.num_atoms]),
        TARGET_ENERGY: frame.energy - reference,
        REFERENCE_ENERGY: reference,
        TARGET_FORCES: torch.tensor(frame.forces, dtype=DTYPES[dtype]),
        TARGET_STRESS: torch.tensor(stress, dtype=DTYPES[dtype]).unsqueeze(0),
        VOLUME: torch.tensor([frame.volume or np.inf], dtype=DTYPES[dtype]),
    }


def _choose(frames: list[Frame], number: int, seed: int) -> list[Frame]:
    """`number` frames at random, in their order; the choice for fewer is part of that for more."""
    if number > len(frames):
        raise ValueError(
            f"data.max_frames is {number}, but there are {len(frames)} training frames"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(frames))[:number])
    return [frames[k] for k in chosen]


def _composition(
    frames: Sequence[Frame], elements: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fractions of the elements (num_frames, num_elements) and energies per atom (num_frames,)."""
    numbers = np.array([atomic_numbers[symbol] for symbol in elements])
    fractions = np.array([(f.numbers[:, None] == numbers).mean(axis=0) for f in frames])
    return fractions, np.array([frame.energy / frame.num_atoms for frame in frames])


def _read_atoms(path: Path, split_name: str) -> Iterator[tuple[str, Atoms]]:
    """(source, atoms) of every frame in a file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file ({split_name})")
    count = 0
    try:
        for count, atoms in enumerate(iread(path, index=":"), start=1):
            yield f"{path}: frame {count - 1}", atoms
    except Exception as error:  # each format raises its own
        where = f"{path}: ASE cannot read frame {count} ({split_name})"
        raise ValueError(f"{where}: {error}") from error
    if count == 0:
        raise ValueError(f"{path}: holds no frames ({split_name})")


def _frame(atoms: Atoms, source: str, config: DataConfig) -> Frame:
    """The checked labels of one structure."""
    energy = _energy(atoms, source, config.energy_key)
    forces = _label(atoms, source, config.forces_key, "forces")
    if forces is None:
        raise ValueError(
            f"{source}: no forces '{config.forces_key}' ({_found(atoms)}); set data.forces_key, or "
            f"remove frames without forces (isolated atoms go to data.reference_energies)"
        )
    if forces.shape != (len(atoms), 3):
        raise ValueError(
            f"{source}: forces '{config.forces_key}' have shape {forces.shape}, not (N, 3)"
        )
    if not np.isfinite(forces).all():
        bad = np.flatnonzero(~np.isfinite(forces).all(axis=1))
        raise ValueError(
            f"{source}: forces '{config.forces_key}' of atoms {bad[:5].tolist()} (from 0) are not "
            f"finite; remove the frame or label it again"
        )
    return Frame(
        numbers=np.asarray(atoms.numbers, dtype=np.int64),
        positions=np.asarray(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell, dtype=np.float64),
        pbc=np.asarray(atoms.pbc, dtype=bool),
        energy=energy,
        forces=forces,
        stress=_stress(atoms, source, config),
        config_type=str(atoms.info.get("config_type", "")),
        source=source,
    )


def _energy(atoms: Atoms, source: str, key: str) -> float:
    energy = _label(atoms, source, key, "energy")
    if energy is None:
        raise ValueError(
            f"{source}: no energy '{key}' ({_found(atoms)}); set data.energy_key, or remove the "
            f"frame"
        )
    if energy.size != 1 or not np.isfinite(energy).all():
        raise ValueError(
            f"{source}: energy '{key}' is {energy.tolist()}, not one finite number; remove the "
            f"frame or label it again"
        )
    return float(energy.reshape(()))


def _stress(atoms: Atoms, source: str, config: DataConfig) -> NDArray[np.float64] | None:
    """(3, 3) from 3x3, nine or six (Voigt: xx yy zz yz xz xy) numbers, with the offset."""
    key = config.stress_key
    stress = None if key is None else _label(atoms, source, key, "stress")
    if stress is None:
        return None
    if stress.size not in (6, 9) or not np.isfinite(stress).all():
        raise ValueError(
            f"{source}: stress '{key}' is {stress.tolist()}, not six (Voigt) or 3x3 finite "
            f"numbers; remove it, label the frame again, or set data.stress_key: null"
        )
    if abs(np.linalg.det(atoms.cell)) == 0:
        raise ValueError(
            f"{source}: has a stress '{key}' but no cell; remove one or set data.stress_key: null"
        )
    full = voigt_6_to_full_3x3_stress(stress.ravel()) if stress.size == 6 else stress.reshape(3, 3)
    if np.abs(full - full.T).max() > 1e-2 * np.abs(full).max():
        raise ValueError(
            f"{source}: stress '{key}' is not symmetric: {full.tolist()}; label the frame again or "
            f"set data.stress_key: null"
        )
    symmetric: NDArray[np.float64] = 0.5 * (full + full.T) + config.stress_offset * np.eye(3)
    return symmetric


def _label(atoms: Atoms, source: str, key: str, what: str) -> NDArray[np.float64] | None:
    """The label as numbers, from info, arrays or the calculator's results, in this order."""
    results: dict[str, Any] = {} if atoms.calc is None else atoms.calc.results
    for place in (atoms.info, atoms.arrays, results):
        if place.get(key) is not None:
            try:
                return np.array(place[key], dtype=np.float64)
            except (TypeError, ValueError):
                got = repr(place[key])
                raise ValueError(f"{source}: {what} '{key}' is not a number: {got}") from None
    return None


def _found(atoms: Atoms) -> str:
    """What the frame has instead, for messages."""
    results = {} if atoms.calc is None else atoms.calc.results
    names = {*atoms.info, *atoms.arrays, *results} - {"numbers", "positions"}
    return f"found {', '.join(sorted(names)) or 'no labels at all'}"


def _check_structure(frame: Frame, elements: Sequence[str] | None) -> None:
    """Elements, cell and distances; errors do not name the frame."""
    if frame.num_atoms == 0:
        raise ValueError("has no atoms; remove the frame")
    if (frame.numbers == 0).any():
        raise ValueError("has atoms of unknown element 'X'; name their element or remove the frame")
    if elements is not None:
        species_indices(frame.numbers, elements)
    if not np.isfinite(frame.cell).all():
        raise ValueError(f"the cell is not finite: {frame.cell.tolist()}; give one or remove it")
    cell = periodic_cell(frame.cell, frame.pbc)
    edge_index, shifts = neighbor_list(frame.positions, cell, frame.pbc, MIN_DISTANCE)
    if edge_index.shape[1]:
        vectors = edge_vectors(frame.positions, cell, edge_index, shifts)
        distances = np.linalg.norm(vectors, axis=1)
        k = int(np.argmin(distances))
        i, j = edge_index[:, k].tolist()
        other = "its own periodic image" if i == j else f"atom {j}"
        raise ValueError(
            f"atom {i} is {distances[k]:.3f} Å from {other} (atoms from 0), less than "
            f"{MIN_DISTANCE} Å; check the units of positions and cell, or remove the frame"
        )
