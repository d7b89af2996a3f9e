"""How far an atom's features are from those of the training set."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.heads import invariants
from .base import Atoms, Sizes


class FeatureDistance(nn.Module):
    """Mahalanobis distance of an atom's features from the training set's, per element.

    d_i = |L_z^T (x_i - mu_z)| / sqrt(num_features), divided by its median over the validation
    frames. x are the scalars and the norms of the tensors of degree >= 1; L_z L_z^T is the inverse
    of the regularised covariance, L_z lower triangular.
    """

    mean: Tensor
    whiten: Tensor
    median: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(sizes.num_elements, sizes.num_invariants))
        whiten = torch.eye(sizes.num_invariants).repeat(sizes.num_elements, 1, 1)
        self.register_buffer("whiten", whiten)
        self.register_buffer("median", torch.ones(()))

    def forward(self, x: Tensor, species: Tensor) -> Tensor:
        """nn.heads.invariants of the atoms -> (num_atoms,) distance; 1 is typical of validation."""
        if self.mean.shape[0] == 1:  # no rows to pick out
            return self._of_element(x, 0)
        out = torch.zeros_like(x[:, 0])
        for element in range(self.mean.shape[0]):
            rows = torch.nonzero(species == element).squeeze(1)
            out = out.index_add(0, rows, self._of_element(x.index_select(0, rows), element))
        return out

    def _of_element(self, x: Tensor, element: int) -> Tensor:
        centered, factor = x - self.mean[element], self.whiten[element]
        size = x.shape[1]
        block = (size + 3) // 4  # columns; of four blocks 5/8 of the product is not zero
        total = torch.zeros_like(x[:, 0])
        for first in range(0, size, block):
            white = centered[:, first:] @ factor[first:, first : first + block]
            total = total + white.pow(2).sum(1)
        return (total / size + 1e-12).sqrt() / self.median

    def fit(self, seen: Atoms) -> None:
        """Mean and inverse covariance of the features of the training frames, per element.

        Features are divided by their standard deviations, and the covariance is shrunk towards the
        identity as Ledoit & Wolf (2004) find optimal, so that an element with few atoms still has a
        finite distance.

        Raises:
            ValueError: an element without two different environments, whose covariance is singular.
        """
        from sklearn.covariance import LedoitWolf  # half a second that only training should pay

        x = invariants(seen.features)
        for element in range(self.mean.shape[0]):
            rows = x[seen.species == element].numpy()
            std = rows.std(0) if len(rows) else np.zeros(x.shape[1])
            if not std.max() > 0:
                raise ValueError(
                    f"element {element} of the model (counted from 0): the covariance of its "
                    f"features is singular, its {len(rows)} atoms in the training frames all have "
                    "the same neighbourhood; add frames with others, or leave the element out"
                )
            std = np.where(std > 1e-6 * std.max(), std, std.max())
            scaled = (rows - rows.mean(0)) / std
            covariance = LedoitWolf(assume_centered=True).fit(scaled).covariance_
            whiten = np.linalg.cholesky(np.linalg.inv(covariance)) / std[:, None]
            self.mean[element] = torch.from_numpy(rows.mean(0))
            self.whiten[element] = torch.from_numpy(whiten)

    def set_unit(self, held: Atoms) -> None:
        """Make the median over the atoms of validation frames 1.

        Raises:
            ValueError: these atoms have no finite distance.
        """
        self.median.fill_(1.0)
        median = self(invariants(held.features), held.species).median()
        if not 1e-5 < float(median) < math.inf:  # 1e-6 is what is left of no distance at all
            raise ValueError(
                f"the feature statistics of the model give a median distance of {float(median):g}: "
                "they are missing or their covariance is singular; train and export it again"
            )
        self.median.copy_(median)
