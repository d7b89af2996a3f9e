"""Whether an atom's features lie outside of what the training atoms span (D-optimality)."""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from .. import keys
from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy
from .base import Atoms, Sizes
from .per_element import Array, PerElement, principal_axes, rows_of

TOLERANCE = 1.01  # MaxVol stops when no swap makes the volume larger by more than this factor
MAX_SWAPS = 10000


class ExtrapolationGrade(PerElement):
    """Grade gamma_i = max_j |(x_i A^-1)_j| with A the active set of the atom's element.

    x_i = (1, scalars) is what enters the atom's energy linearly; A holds the training atoms of the
    element whose x span the largest volume (MaxVol). A prediction is a combination of those in A
    with the coefficients x A^-1: gamma <= 1 interpolates, gamma > 1 extrapolates. Podryabinkin &
    Shapeev, Comput. Mater. Sci. 140, 171 (2017); for per-atom energies of ACE: Lysogorskiy et al.,
    arXiv 2212.08716.

    Directions that an element's training atoms do not span (fewer atoms than features, or none) are
    completed by rows of one regularised standard deviation, see per_element.principal_axes. A grade
    looks at extremes: it says where a potential extrapolates and ranks errors poorly inside.
    """

    FIELDS = (keys.EXTRAPOLATION_GRADE,)

    inverse: Tensor
    constant: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        elements, features = sizes.num_elements, sizes.num_scalars
        self.register_buffer("mean", torch.zeros(elements, features))
        # x A^-1 = constant + (scalars - mean) @ inverse
        self.register_buffer("inverse", torch.eye(features, features + 1).repeat(elements, 1, 1))
        self.register_buffer("constant", torch.zeros(elements, features + 1))

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward."""
        return {keys.EXTRAPOLATION_GRADE: self.of_all(features.scalars, species)}

    def of_element(self, x: Tensor, element: int) -> Tensor:
        """See PerElement.of_element; the grade."""
        coefficients = self.constant[element] + (x - self.mean[element]) @ self.inverse[element]
        return coefficients.abs().amax(1)

    def fit(self, seen: Atoms, held: Atoms) -> dict[str, object]:
        """Choose the active set of every element among the training atoms.

        Returns:
            grade_above_1: share of the validation atoms that extrapolate.

        Raises:
            ValueError: no atoms, or features that are not finite.
        """
        for element in range(self.mean.shape[0]):
            rows = rows_of(seen.features.scalars, seen.species, element)
            axes = principal_axes(rows)
            white = axes.axes / axes.std / axes.scale[:, None]  # (features, features)
            y = np.column_stack([np.ones(len(rows)), (rows - axes.mean) @ white])
            num_columns = y.shape[1]
            if np.linalg.matrix_rank(y, tol=1e-3 * np.sqrt(len(y))) < num_columns:
                y = np.vstack(
                    [y, np.column_stack([np.ones(num_columns - 1), np.eye(num_columns)[1:, 1:]])]
                )
            inverse = np.linalg.inv(y[maxvol(y)])
            self.mean[element] = torch.from_numpy(axes.mean)
            self.constant[element] = torch.from_numpy(inverse[0])
            self.inverse[element] = torch.from_numpy(white @ inverse[1:])
        return self.calibrate(held)

    def calibrate(self, held: Atoms) -> dict[str, object]:
        """Nothing has a size here: only the share of `held` that extrapolates."""
        grade = self(held.features, held.energy, held.species)[keys.EXTRAPOLATION_GRADE]
        return {"grade_above_1": float((grade > 1.0).double().mean())}


def maxvol(a: Array) -> np.ndarray:
    """Rows of a tall matrix that span a dominant volume: no single swap makes it much larger.

    Starts from QR with column pivoting and swaps rows greedily (Goreinov et al. 2010, "How to find
    a good submatrix").

    Args:
        a: (num_rows, num_columns) of full column rank.

    Returns:
        (num_columns,) indices; every element of a @ inv(a[indices]) is at most TOLERANCE in size.
    """
    num_columns = a.shape[1]
    _, pivots = scipy.linalg.qr(a.T, mode="r", pivoting=True)
    chosen = pivots[:num_columns].copy()
    coefficients = scipy.linalg.solve(a[chosen].T, a.T).T  # (num_rows, num_columns)
    for _ in range(MAX_SWAPS):
        row, column = np.unravel_index(np.abs(coefficients).argmax(), coefficients.shape)
        pivot = coefficients[row, column]
        if abs(pivot) <= TOLERANCE:
            break
        change = coefficients[row].copy()
        change[column] -= 1.0
        coefficients -= np.outer(coefficients[:, column] / pivot, change)
        chosen[column] = row
    return chosen
