"""Control: the force error's x, y and z components as three histograms of their own."""

import torch
from torch import Tensor, nn

from .. import keys
from ..nn.backbone import Features
from .base import Sizes
from .spherical import WIDTHS, ComponentHistograms


class CartesianHistograms(ComponentHistograms):
    """Plain heads on the Cartesian axes, as categorical forces are often done; a control only.

    Axis a has weights of its own on the invariants and on its components of the tensors, n_a . t_1
    and Y_2(n_a) . t_2, and may use every function of the bin for each: nothing ties the three to
    each other or to a mirror image. So fields are NOT invariant under rotation and inversion, by
    several per cent where the errors are anisotropic; a run that uses them depends on how its cell
    lies. They are still per atom: force_std is the root mean square over the three axes.
    """

    FIELDS = (keys.XYZ_FORCE_STD, keys.XYZ_FORCE_ENTROPY)
    NAME = "xyz"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, torch.eye(3), torch.ones(3))
        num_inputs = sizes.num_invariants + 2 * sizes.channels
        self.bias = nn.Parameter(torch.zeros(3, 2 * len(WIDTHS)))
        self.weight = nn.Parameter(torch.zeros(3, num_inputs, 2 * len(WIDTHS)))

    def named(self, std: Tensor, entropy: Tensor) -> dict[str, Tensor]:
        """The fields by their names."""
        return {keys.XYZ_FORCE_STD: std, keys.XYZ_FORCE_ENTROPY: entropy}

    def coefficients(self, features: Features, directions: Tensor) -> Tensor:
        """See ComponentHistograms; `directions` can only be the axes."""
        along = torch.matmul(directions, self.vectors(features))
        twice = torch.matmul(self.harmonics(directions), self.quadrupoles(features))
        x = self.standardized(features).unsqueeze(1).expand(-1, 3, -1)
        inputs = torch.cat([x, along, twice], 2).transpose(0, 1)  # (3, num_atoms, num_inputs)
        free = torch.baddbmm(self.bias.unsqueeze(1), inputs, self.weight).transpose(0, 1)
        base = torch.cat([self.base, torch.zeros_like(self.base)])
        return base + self.bounded(free)

    def training_directions(self, num_atoms: int) -> Tensor:
        """The axes, for every atom."""
        return self.directions.expand(num_atoms, -1, -1)
