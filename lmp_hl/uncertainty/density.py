"""How probable an atom's features are under a density of those of the training set."""

import numpy as np
import torch
from torch import Tensor

from .. import keys
from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy, invariants
from .base import Atoms, Sizes
from .per_element import Array, PerElement, error_scale, principal_axes, rows_of

COLUMNS = 32  # principal axes in which the mixture lives
COMPONENTS = 8  # at most, per element
ATOMS_PER_COLUMN = 2  # a component needs so many different atoms for each column
MAX_ATOMS = 10000  # of an element that the mixture is fitted to
SEED = 0


class LatentDensity(PerElement):
    """Gaussian mixture per element on the invariant features, fitted to the training atoms.

    Features are projected on the element's leading principal axes, z = A^T (x - mu) / s, where

        p(z) = sum_k w_k N(z; m_k, S_k),

    its number of components chosen by the Bayesian information criterion; with too few atoms for
    one it is the standard normal density. What the axes leave out, r = x - mu - A s z, is normal
    with the mean of the variances left out (the noise of probabilistic principal components,
    Tipping & Bishop 1999), so that an atom which differs in a direction that no training atom
    varied in is far away too. Latent mixture as uncertainty of a potential: Zhu et al., arXiv
    2211.09866.

    `latent_nll` is -log p in nats, less the median of the element's validation atoms. It grows with
    the square of a distance, errors with the distance: `density_force_std` is s_z u, with
    u^2 = 1 + 2 latent_nll / num_features (a normal density's squared distance over its typical
    value), kept positive by a softplus, and s_z such that its mean square on validation atoms of
    element z is that of the errors of a force component.
    """

    FIELDS = (keys.LATENT_NLL, keys.DENSITY_FORCE_STD)

    scale: Tensor
    axes: Tensor
    std: Tensor
    rest: Tensor
    centers: Tensor
    factors: Tensor
    log_weights: Tensor
    offset: Tensor
    error_scale: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        elements, features = sizes.num_elements, sizes.num_invariants
        columns = min(COLUMNS, features)
        eye = torch.eye(features)[:, :columns]
        self.num_features = features
        self.register_buffer("mean", torch.zeros(elements, features))
        self.register_buffer("scale", torch.ones(elements, features))
        self.register_buffer("axes", eye.repeat(elements, 1, 1))
        self.register_buffer("std", torch.ones(elements, columns))
        self.register_buffer("rest", torch.ones(elements))
        self.register_buffer("centers", torch.zeros(elements, COMPONENTS, columns))
        factors = torch.eye(columns).repeat(elements, 1, COMPONENTS)
        self.register_buffer("factors", factors)  # columns of all components side by side
        # of each component, with the logarithm of its determinant
        self.register_buffer("log_weights", torch.zeros(elements, COMPONENTS))
        self.register_buffer("offset", torch.zeros(elements))
        self.register_buffer("error_scale", torch.ones(elements))

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward."""
        nll = self.of_all(invariants(features), species)
        size = self._size(nll)
        return {
            keys.LATENT_NLL: nll,
            keys.DENSITY_FORCE_STD: size * self.error_scale.index_select(0, species),
        }

    def of_element(self, x: Tensor, element: int) -> Tensor:
        """See PerElement.of_element; latent_nll."""
        return self._nll(x, element) - self.offset[element]

    def _nll(self, x: Tensor, element: int) -> Tensor:
        """(n, num_features) of one element -> (n,) nats, up to a constant."""
        t = (x - self.mean[element]) / self.scale[element]
        projected = t @ self.axes[element]  # (n, columns)
        z = projected / self.std[element]
        shifted = (z @ self.factors[element]).reshape(-1, self.centers.shape[1], z.shape[1])
        square = (shifted - self.centers[element]).pow(2).sum(2)
        exponents = self.log_weights[element] - 0.5 * square
        # not torch.logsumexp: it asks whether there are atoms, which a compiler cannot know
        largest = exponents.amax(1)
        mixture = largest + torch.exp(exponents - largest.unsqueeze(1)).sum(1).log()
        left = (t.pow(2).sum(1) - projected.pow(2).sum(1)).clamp(min=0.0)
        return 0.5 * left / self.rest[element] - mixture

    def _size(self, nll: Tensor) -> Tensor:
        # softplus(4 u^2) / 4: u^2 where it is of order one or larger, positive below
        square = 4.0 * (1.0 + 2.0 * nll / self.num_features)
        return (torch.nn.functional.softplus(square) / 4.0 + 1e-6).sqrt()

    def fit(self, seen: Atoms, held: Atoms) -> dict[str, object]:
        """Axes and mixture from the training atoms, median and error scale from validation.

        Returns:
            latent_components: of each element's mixture, 0 for the standard normal density.

        Raises:
            ValueError: no atoms, or features that are not finite.
        """
        x = invariants(seen.features)
        components = []
        for element in range(self.mean.shape[0]):
            components.append(self._fit_element(element, rows_of(x, seen.species, element)))
            # for an element that no validation atom is of
            chosen = seen.species == element
            own = x[chosen] if bool(chosen.any()) else x
            self.offset[element] = self._nll(own, element).median()
        return {"latent_components": components, **self.calibrate(held)}

    def calibrate(self, held: Atoms) -> dict[str, object]:
        """Median and error scale from validation atoms; the density stays."""
        x = invariants(held.features)
        for element in range(self.mean.shape[0]):
            chosen = held.species == element
            if bool(chosen.any()):
                self.offset[element] = self._nll(x[chosen], element).median()
        nll = self(held.features, held.energy, held.species)[keys.LATENT_NLL]
        scale = error_scale(self._size(nll), held.errors, held.species, len(self.mean))
        self.error_scale.copy_(scale)
        return {}

    def _fit_element(self, element: int, rows: Array) -> int:
        axes = principal_axes(rows)
        columns = self.std.shape[1]
        for buffer, value in (
            (self.mean, axes.mean),
            (self.scale, axes.scale),
            (self.axes, axes.axes[:, :columns]),
            (self.std, axes.std[:columns]),
        ):
            buffer[element] = torch.from_numpy(value)
        left_out = axes.std[columns:]
        self.rest[element] = float(np.square(left_out).mean()) if len(left_out) else 1.0
        z = ((rows - axes.mean) / axes.scale) @ axes.axes[:, :columns] / axes.std[:columns]
        count, means, factors, log_weights = _mixture(z)
        # fewer components than places: copies that share a weight
        index = np.arange(COMPONENTS) % max(count, 1)
        copies = np.bincount(index, minlength=max(count, 1))
        self.factors[element] = torch.from_numpy(np.concatenate(factors[index], axis=1))
        centers = np.einsum("kd,kde->ke", means[index], factors[index])
        self.centers[element] = torch.from_numpy(centers)
        self.log_weights[element] = torch.from_numpy(log_weights[index] - np.log(copies[index]))
        return count


def _mixture(z: Array) -> tuple[int, Array, Array, Array]:
    """Mixture of (num_atoms, columns) with the smallest BIC; 0 components: the standard normal.

    Returns:
        number, means (k, columns), factors P_k (k, columns, columns) with S_k^-1 = P_k P_k^T, and
        logarithms of weight times |P_k| (k,).
    """
    from sklearn.mixture import GaussianMixture

    num_atoms, columns = z.shape
    if num_atoms > MAX_ATOMS:
        z = z[np.random.default_rng(SEED).choice(num_atoms, MAX_ATOMS, replace=False)]
    distinct = len(np.unique(z.round(6), axis=0))  # atoms of a perfect crystal are all alike
    most = min(COMPONENTS, distinct // (ATOMS_PER_COLUMN * columns))
    if most == 0:
        return 0, np.zeros((1, columns)), np.eye(columns)[None], np.zeros(1)
    fitted = [
        # the data has unit variance: no direction of a component is sharper than a thirtieth
        GaussianMixture(k, covariance_type="full", reg_covar=1e-3, random_state=SEED).fit(z)
        for k in range(1, most + 1)
    ]
    best = min(fitted, key=lambda mixture: float(mixture.bic(z)))
    factors = best.precisions_cholesky_
    log_det = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    return best.n_components, best.means_, factors, np.log(best.weights_) + log_det
