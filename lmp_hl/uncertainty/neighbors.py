"""Mean of a per-atom value over the neighbours of the atom, the near ones counting more.

The force on an atom is made of the energies of its neighbours too, so what is unusual about them
matters to its error. The mean is taken of values of the atoms themselves: an edge carries what its
centre contributes to its neighbour, as it carries a force.
"""

import torch
from torch import Tensor


def neighbor_weights(edge_vectors: Tensor, cutoff: float) -> Tensor:
    """w(r) = (1 - r^2 / r_c^2)^4, zero with three derivatives at the cutoff.

    Args:
        edge_vectors: (num_edges, 3), Å.
        cutoff: Å.

    Returns:
        (num_edges,)
    """
    return (1.0 - edge_vectors.pow(2).sum(1) / cutoff**2).clamp(min=0.0).square().square()


def weighted_mean(values: Tensor, sums: Tensor, weights: Tensor) -> Tensor:
    """(w_0 v_i + sum_j w_ij v_j) / (w_0 + sum_j w_ij), w_0 = 0.001.

    The atom itself hardly counts, but with no neighbour it is alone in the mean, and a first one
    that comes in from the cutoff changes the mean gradually.

    Args:
        values: v of the atoms, (num_atoms,).
        sums: of w_ij v_j over their neighbours, (num_atoms,).
        weights: sums of w_ij, (num_atoms,).

    Returns:
        (num_atoms,); its own value for an atom without neighbours.
    """
    own = 1e-3
    return (own * values + sums) / (own + weights)


def neighbor_mean(values: Tensor, edge_index: Tensor, edge_weights: Tensor) -> Tensor:
    """`weighted_mean` of atoms all of whose edges are given.

    Args:
        values: (num_atoms,).
        edge_index: (2, num_edges), every pair both ways; an atom may neighbour its own images.
            Neighbours beyond num_atoms have weights, but what they add to the sums is missing.
        edge_weights: (num_edges,), see neighbor_weights.

    Returns:
        (num_atoms,)
    """
    zeros = values.new_zeros(values.shape[0])
    known = torch.nonzero(edge_index[1] < values.shape[0]).squeeze(1)
    carried = edge_weights * values.index_select(0, edge_index[0])
    sums = zeros.index_add(0, edge_index[1].index_select(0, known), carried.index_select(0, known))
    weights = zeros.index_add(0, edge_index[0], edge_weights)
    return weighted_mean(values, sums, weights)
