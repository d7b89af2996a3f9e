"""A structure as a graph: who is within the cutoff of whom, as the tensors of keys.py.

Whatever has `numbers`, `positions`, `cell` and `pbc` is a structure: `ase.Atoms`, a training frame.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
import vesin
from ase.data import atomic_numbers, chemical_symbols
from ase.geometry import complete_cell
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lmp_hl import keys

DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}

# Å³ (Å², Å with two, one periodic directions): below this a periodic cell has no inside
MIN_CELL_VOLUME: Final = 1e-3


class Structure(Protocol):
    """What graph_inputs needs of a structure; ase.Atoms has it."""

    @property
    def numbers(self) -> Any:
        """(num_atoms,) atomic numbers."""

    @property
    def positions(self) -> Any:
        """(num_atoms, 3) in Å."""

    @property
    def cell(self) -> Any:
        """(3, 3), rows are the cell vectors in Å."""

    @property
    def pbc(self) -> Any:
        """(3,) bool, which cell vectors repeat."""


def periodic_cell(cell: ArrayLike, pbc: ArrayLike) -> NDArray[np.float64]:
    """The cell with every non-periodic vector replaced by a unit vector normal to the others.

    What a file stores in a non-periodic direction (zeros, a box around a molecule) has no meaning
    for neighbours, and a zero vector would make the cell singular.

    Args:
        cell: (3, 3), rows are the cell vectors in Å.
        pbc: (3,) bool or one bool for all.

    Returns:
        (3, 3), Å; the identity when nothing is periodic.

    Raises:
        ValueError: the periodic vectors are not finite or do not span a volume.
    """
    periodic = np.broadcast_to(np.asarray(pbc, dtype=bool), (3,))
    vectors = np.asarray(cell, dtype=np.float64).reshape(3, 3)
    vectors = np.where(periodic[:, None], vectors, 0.0)
    # the product of singular values is a volume, an area or a length: one to three periodic vectors
    finite = bool(np.isfinite(vectors).all())
    if not finite or np.linalg.svd(vectors[periodic])[1].prod() < MIN_CELL_VOLUME:
        raise ValueError(
            f"the periodic cell has no volume: vectors {vectors[periodic].tolist()} Å along the "
            f"periodic directions (pbc {periodic.tolist()}); give a real cell or set pbc to false"
        )
    return np.asarray(complete_cell(vectors), dtype=np.float64)


def neighbor_list(
    positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every pair with |r_j + shift @ cell - r_i| < cutoff, both ways, images of i itself included.

    The cell may be smaller than the cutoff, triclinic, or periodic in one or two directions only;
    atoms may lie outside it.

    Args:
        positions: (num_atoms, 3) in Å.
        cell: (3, 3), rows are the cell vectors in Å; those of non-periodic directions are ignored.
        pbc: (3,) bool or one bool for all.
        cutoff: Å, positive.

    Returns:
        edge_index (2, num_edges), row 0 the centre i, row 1 the neighbour j; cell_shifts
        (num_edges, 3) in whole cell vectors, 0 in non-periodic directions. Sorted by i, j and
        shift.

    Raises:
        ValueError: positions that are not finite numbers, a cell without volume, a cutoff <= 0.
    """
    points = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
    if not np.isfinite(points).all():
        bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
        raise ValueError(f"positions of atoms {bad[:5].tolist()} (from 0) are not finite numbers")
    if not cutoff > 0:
        raise ValueError(f"cutoff must be positive, got {cutoff} Å")
    periodic = np.broadcast_to(np.asarray(pbc, dtype=bool), (3,))
    box = periodic_cell(cell, periodic)
    if len(points) == 0:
        return np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3), dtype=np.int64)

    # vesin's own sorting leaves j and the shifts in an order that may depend on its threads
    search = vesin.NeighborList(cutoff=cutoff * (1 + 1e-9), full_list=True)
    center, neighbor, shifts = search.compute(points, box, periodic, "ijS")
    edge_index = np.stack([center, neighbor]).astype(np.int64)  # (2, num_edges)
    cell_shifts = shifts.astype(np.int64)  # (num_edges, 3)

    vectors = edge_vectors(points, box, edge_index, cell_shifts)
    inside = np.flatnonzero(np.linalg.norm(vectors, axis=1) < cutoff)
    edge_index, cell_shifts = edge_index[:, inside], cell_shifts[inside]
    order = np.lexsort((*cell_shifts.T[::-1], edge_index[1], edge_index[0]))
    return edge_index[:, order], cell_shifts[order]


def edge_vectors(
    positions: NDArray[np.float64],
    cell: ArrayLike,
    edge_index: NDArray[np.int64],
    cell_shifts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """r_j - r_i, positions[j] - positions[i] + cell_shifts @ cell: (num_edges, 3), Å."""
    center, neighbor = edge_index
    vectors: NDArray[np.float64] = positions[neighbor] - positions[center]
    return vectors + cell_shifts @ np.asarray(cell, dtype=np.float64)


def species_indices(numbers: ArrayLike, elements: Sequence[str]) -> NDArray[np.int64]:
    """Atomic numbers as indices into a model's list of elements.

    Args:
        numbers: (num_atoms,) atomic numbers.
        elements: chemical symbols in the model's order.

    Returns:
        (num_atoms,)

    Raises:
        ValueError: an element that is not in the list.
    """
    wanted = np.asarray(numbers, dtype=np.int64).reshape(-1)
    index = np.full(len(chemical_symbols), -1, dtype=np.int64)
    index[[atomic_numbers[symbol] for symbol in elements]] = np.arange(len(elements))
    species = index[wanted]
    if (species < 0).any():
        unknown = [chemical_symbols[z] for z in np.unique(wanted[species < 0])]
        raise ValueError(
            f"element {', '.join(unknown)} is unknown to the model; it knows {', '.join(elements)}"
        )
    return species


def graph_inputs(
    structure: Structure, elements: Sequence[str], cutoff: float, num_layers: int, dtype: str
) -> dict[str, Tensor]:
    """The inputs of keys.py for a structure evaluated as a whole: every atom is owned.

    Args:
        structure: atoms, Å.
        elements: chemical symbols in the model's order.
        cutoff: Å.
        num_layers: message-passing layers of the model, 1 for a strictly local one.
        dtype: "float32" or "float64", of edge_vectors; distances are decided in float64 before.

    Returns:
        species, edge_index, edge_vectors, layer_nodes, layer_edges on the CPU.

    Raises:
        ValueError: an unknown element, a cell without volume, positions that are not finite.
    """
    species = species_indices(structure.numbers, elements)
    positions = np.asarray(structure.positions, dtype=np.float64).reshape(-1, 3)
    edge_index, cell_shifts = neighbor_list(positions, structure.cell, structure.pbc, cutoff)
    cell = periodic_cell(structure.cell, structure.pbc)
    vectors = edge_vectors(positions, cell, edge_index, cell_shifts)
    return {
        keys.SPECIES: torch.from_numpy(species),
        keys.EDGE_INDEX: torch.from_numpy(edge_index),
        keys.EDGE_VECTORS: torch.from_numpy(vectors).to(DTYPES[dtype]),
        keys.LAYER_NODES: torch.full((num_layers,), len(species), dtype=torch.int64),
        keys.LAYER_EDGES: torch.full((num_layers,), edge_index.shape[1], dtype=torch.int64),
    }
