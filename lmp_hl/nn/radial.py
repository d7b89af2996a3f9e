"""Radial functions: Bessel functions that vanish smoothly at the cutoff."""

import math

import torch
from torch import Tensor, nn


class RadialBasis(nn.Module):
    """b_n(r) = sqrt(2/r_c) sin(n pi r / r_c) / r * u(r / r_c), with u = u' = u'' = 0 at 1.

    Bessel functions and polynomial envelope u (p = 6) as in Gasteiger, Gross & Guennemann, ICLR
    2020. Learned radial functions are linear combinations of these, taken after the sum over
    neighbours where that is cheaper.
    """

    frequencies: Tensor

    def __init__(self, cutoff: float, num_radial: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("frequencies", math.pi * torch.arange(1, num_radial + 1) / cutoff)

    def forward(self, lengths: Tensor) -> Tensor:
        """(num_edges,) in Å -> (num_edges, num_radial), zero with two derivatives at r_c."""
        x = lengths / self.cutoff
        p = 6.0
        envelope = (
            1.0
            - 0.5 * (p + 1.0) * (p + 2.0) * x.pow(6)
            + p * (p + 2.0) * x.pow(7)
            - 0.5 * p * (p + 1.0) * x.pow(8)
        )
        envelope = torch.where(x < 1.0, envelope, torch.zeros_like(envelope))
        scale = math.sqrt(2.0 / self.cutoff) * envelope / lengths
        return torch.sin(lengths.unsqueeze(1) * self.frequencies) * scale.unsqueeze(1)
