"""Sizes read from an atom's features: what the trained methods predict about their own errors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn.backbone import Features
from .base import Sizes

REACH = math.log(100.0)


class LogSizes(nn.Module):
    """Logarithms of positive numbers, each within a factor of 100 of a typical one.

    One hidden layer on the scalars and a bias per element; all atoms have the typical sizes at the
    start. The bound keeps a likelihood from neglecting some atoms and an atom far from the data
    from sizes of 0 or infinity.

    Args:
        sizes: of the network.
        typical: one number for each output, in its unit.
    """

    typical: Tensor

    def __init__(self, sizes: Sizes, typical: Sequence[float]) -> None:
        super().__init__()
        num_out = len(typical)
        self.reach = REACH
        self.linear = nn.Linear(sizes.num_scalars, num_out, bias=False)
        self.hidden = nn.Linear(sizes.num_scalars, sizes.num_scalars)
        self.out = nn.Linear(sizes.num_scalars, num_out, bias=False)
        self.element_bias = nn.Embedding(sizes.num_elements, num_out)
        for layer in (self.linear, self.out, self.element_bias):
            nn.init.zeros_(layer.weight)
        self.register_buffer("typical", torch.tensor(typical).log())

    def forward(self, features: Features, species: Tensor) -> Tensor:
        """Features and (num_atoms,) species -> (num_atoms, num_out)."""
        hidden = torch.nn.functional.silu(self.hidden(features.scalars))
        free = self.linear(features.scalars) + self.out(hidden) + self.element_bias(species)
        return self.typical + self.reach * torch.tanh(free / self.reach)
