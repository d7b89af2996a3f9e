"""How far an atom's features are from those of the training set."""

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.backbone import Features
from ..nn.heads import invariants
from .base import Atoms, Sizes


class FeatureDistance(nn.Module):
    """Mahalanobis distance of an atom's features from the training set's, per element.

    d_i = |L_z^T (x_i - mu_z)| / sqrt(num_features), divided by its median over the validation
    frames. x are the scalars and the norms of the tensors of degree >= 1; L_z L_z^T is the inverse
    of the regularised covariance.
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

    def forward(self, features: Features, species: Tensor) -> Tensor:
        """Features of the atoms -> (num_atoms,) distance; 1 is typical of validation frames."""
        x = invariants(features)
        out = torch.zeros_like(x[:, 0])
        for element in range(self.mean.shape[0]):
            rows = torch.nonzero(species == element).squeeze(1)
            white = (x.index_select(0, rows) - self.mean[element]) @ self.whiten[element]
            distance = (white.pow(2).mean(1) + 1e-12).sqrt()
            out = out.index_add(0, rows, distance)
        return out / self.median

    def fit(self, seen: Atoms, held: Atoms) -> None:
        """Mean and inverse covariance of the features per element, median of the distance.

        Features are divided by their standard deviations, and the covariance is shrunk towards the
        identity as Ledoit & Wolf (2004) find optimal, so that an element with few atoms still has a
        finite distance.
        """
        from sklearn.covariance import LedoitWolf  # half a second that only training should pay

        x = invariants(seen.features)
        for element in range(self.mean.shape[0]):
            rows = x[seen.species == element].numpy()
            std = rows.std(0)
            std = np.where(std > 1e-6 * std.max(), std, max(std.max(), 1e-12))
            scaled = (rows - rows.mean(0)) / std
            covariance = LedoitWolf(assume_centered=True).fit(scaled).covariance_
            whiten = np.linalg.cholesky(np.linalg.inv(covariance)) / std[:, None]
            self.mean[element] = torch.from_numpy(rows.mean(0))
            self.whiten[element] = torch.from_numpy(whiten)
        self.median.fill_(1.0)
        self.median.copy_(self(held.features, held.species).median())
