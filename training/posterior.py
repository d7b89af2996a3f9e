"""A Gaussian over the weights of a potential, and how SWAG finds it along the last epochs.

Samples of it are the members of an ensemble that costs one training.
"""

import copy
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from lmp_hl.potential import Potential

from .config import SwagConfig


class Posterior(NamedTuple):
    """N(mean, diag(variance) + deviations^T deviations) of the weights, float64, on the CPU.

    mean, variance: (num_weights,); deviations: (rank, num_weights), rank 0 for a diagonal one.
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw of the weights, (num_weights,)."""
        shape, rank = self.mean.shape, len(self.deviations)
        own = torch.randn(shape, generator=generator, dtype=torch.float64)
        shared = torch.randn(rank, generator=generator, dtype=torch.float64)
        return self.mean + self.variance.sqrt() * own + shared @ self.deviations


class Moments:
    """Running moments of weights, and the Gaussian that SWAG makes of them.

    SWAG (Maddox et al., arXiv 1902.02476): with T weights w_t along training, their mean m, their
    variances v, and the last K deviations d_t = w_t - m_t from the mean m_t of the first t,

        w ~ N(m, diag(v) / 2 + sum_t d_t d_t^T / (2 (K - 1))).

    Args:
        rank: K.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)  # sum_t (w_t - m)^2
        self.deviations: list[Tensor] = []

    def add(self, weights: Tensor) -> None:
        """One more w_t, (num_weights,), by Welford's update: small variances do not cancel."""
        if self.count == 0:
            self.mean, self.squares = torch.zeros_like(weights), torch.zeros_like(weights)
        self.count += 1
        before = weights - self.mean
        self.mean = self.mean + before / self.count
        after = weights - self.mean
        self.squares = self.squares + before * after
        self.deviations = [*self.deviations, after][-self.rank :]

    def posterior(self) -> Posterior:
        """The Gaussian; needs at least two deviations."""
        deviations = torch.stack(self.deviations) / (2.0 * (len(self.deviations) - 1)) ** 0.5
        return Posterior(self.mean, 0.5 * self.squares / self.count, deviations)


class Swag(L.Callback):
    """Collects the weights after each of the last epochs; an interrupted run keeps its moments.

    It is the weights as the optimiser moves them that are collected, not their running average.
    """

    def __init__(self, config: SwagConfig) -> None:
        self.epochs = config.epochs
        self.moments = Moments(config.rank)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect."""
        if trainer.current_epoch >= (trainer.max_epochs or 0) - self.epochs:
            self.moments.add(weights_of(pl_module.potential))

    def state_dict(self) -> dict[str, Any]:
        """The moments, for the checkpoint that a run is resumed from."""
        return {name: value for name, value in vars(self.moments).items() if name != "rank"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the moments of a checkpoint."""
        for name, value in state_dict.items():
            setattr(self.moments, name, value)


def weights_of(potential: Potential) -> Tensor:
    """All weights that are trained as one vector, (num_weights,) float64, on the CPU."""
    parts = [p.detach().flatten() for p in potential.parameters() if p.requires_grad]
    return torch.cat(parts).cpu().double()


def with_weights(potential: Potential, weights: Tensor) -> Potential:
    """A copy with other weights, as weights_of orders them; buffers stay as they are."""
    out = copy.deepcopy(potential)
    chosen = [p for p in out.parameters() if p.requires_grad]
    vector_to_parameters(weights.to(chosen[0].dtype), chosen)
    return out
