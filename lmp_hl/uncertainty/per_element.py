"""Statistics per element that post-hoc methods share, also for an element with few atoms or none.

An element with fewer than two training atoms takes the statistics of all atoms: there is no spread
to measure, but what the model file says has to be a number.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import Method

Array = NDArray[np.float64]

PRIOR_ATOMS = 10  # an element's scale counts the scale of all elements as so many atoms of its own


class PerElement(Method):
    """A method that evaluates the atoms of each element with statistics of their own."""

    mean: Tensor  # (num_elements, num_features)

    def of_element(self, x: Tensor, element: int) -> Tensor:
        """Features (n, num_features) of atoms of one element -> a number for each, (n,)."""
        raise NotImplementedError

    def of_all(self, x: Tensor, species: Tensor) -> Tensor:
        """Features and species of atoms -> `of_element` of each, (num_atoms,)."""
        if self.mean.shape[0] == 1:  # no rows to pick out
            return self.of_element(x, 0)
        out = torch.zeros_like(x[:, 0])
        for element in range(self.mean.shape[0]):
            rows = torch.nonzero(species == element).squeeze(1)
            out = out.index_add(0, rows, self.of_element(x.index_select(0, rows), element))
        return out


class Axes(NamedTuple):
    """Principal axes of one element's features, largest variance first.

    x -> ((x - mean) / scale) @ axes / std has unit variance along every column.

    mean, scale: (num_features,); axes: (num_features, num_features) orthonormal columns;
    std: (num_features,) of the features in units of `scale`, positive.
    """

    mean: Array
    scale: Array
    axes: Array
    std: Array


def rows_of(x: Tensor, species: Tensor, element: int) -> Array:
    """Rows of (num_atoms, num_features) that belong to an element; all if fewer than two do.

    Raises:
        ValueError: there are no rows, or one is not finite.
    """
    if len(x) == 0:
        raise ValueError("fitting an uncertainty needs atoms, got a set without any")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(1)).sum())
        raise ValueError(
            f"features of {bad} of {len(x)} atoms are not finite: the training diverged; lower "
            f"training.learning_rate or look at the frames"
        )
    chosen = species == element
    return np.asarray((x[chosen] if int(chosen.sum()) >= 2 else x).numpy(), dtype=np.float64)


def principal_axes(rows: Array) -> Axes:
    """Principal axes of (num_atoms, num_features), finite and positive for any rows.

    Features are divided by their standard deviations (constant ones by a number), and the
    covariance is shrunk towards a multiple of the identity as Ledoit & Wolf (2004) find optimal, so
    that few atoms do not make directions that they happen not to span infinitely sharp.
    """
    from sklearn.covariance import LedoitWolf  # half a second that only training should pay

    mean, scale = rows.mean(0), rows.std(0)
    floor = 1e-6 * max(float(scale.max()), float(np.abs(mean).max()), 1e-12)
    # a constant feature: as large as the others, or as its own size, so that a change is seen
    typical = np.median(scale[scale > floor]) if (scale > floor).any() else np.abs(mean).max()
    scale = np.where(scale > floor, scale, max(float(typical), floor))
    covariance = LedoitWolf(assume_centered=True).fit((rows - mean) / scale).covariance_
    variance, axes = np.linalg.eigh(covariance)
    variance = np.maximum(variance, 1e-8 * max(float(variance[-1]), 1.0))
    return Axes(mean, scale, axes[:, ::-1].copy(), np.sqrt(variance[::-1]))


def error_scale(size: Tensor, errors: Tensor, species: Tensor, num_elements: int) -> Tensor:
    """Per element the s with mean (s * size)^2 = mean square error of a force component.

    Elements with few atoms lean on all: log s is the mean of the element's own and of that of all
    elements, which counts as so many atoms (PRIOR_ATOMS).

    Args:
        size: (num_atoms,) positive, what the error is taken to be proportional to.
        errors: (num_atoms, 3) eV/Å.
        species: (num_atoms,).
        num_elements: how many scales.

    Returns:
        (num_elements,) eV/Å per unit of `size`.
    """
    square, error = size.square(), errors.square().mean(1)
    pooled = error.mean() / square.mean()
    zeros = torch.zeros(num_elements, dtype=size.dtype)
    count = zeros.index_add(0, species, torch.ones_like(size))
    own_square, own_error = zeros.index_add(0, species, square), zeros.index_add(0, species, error)
    # an element without atoms has no ratio; one whose forces all vanish has one that is too small
    ratio = torch.where(count > 0, own_error / torch.where(count > 0, own_square, 1.0), pooled)
    logarithm = count * torch.log(torch.maximum(ratio, 1e-6 * pooled))
    return torch.exp(0.5 * (logarithm + PRIOR_ATOMS * torch.log(pooled)) / (count + PRIOR_ATOMS))
