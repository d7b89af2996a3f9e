"""Mean-variance estimation: the network predicts the size of its own energy and force errors."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import keys
from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy, Readout
from .base import Atoms, Loss, Method, Sizes

# typical force component, eV/Å, and atomic energy, eV; a factor of 100 either way is allowed
TYPICAL = (0.1, 0.01)
REACH = math.log(100.0)


class MeanVariance(Method):
    """Gaussian errors with predicted variances, trained by the joint energy-force likelihood.

    With the variance s_i^2 of a force component and v_i of the energy of atom i, V = sum_i v_i,

        NLL_JEF = sum_frames 1/2 [ln V + (E* - E)^2 / V]
                + sum_atoms sum_xyz 1/2 [ln s_i^2 + (F* - F)^2 / s_i^2],

    the negative log-likelihood of both labels that arXiv 2510.03046 trains mean-variance potentials
    with (a conventional one leaves the forces a squared error). How that paper weighs the two terms
    and makes the variances of the two we could not read; here both variances are read out of the
    scalars, and each term is multiplied by a constant of the batch, twice the mean variance, so
    that it has the unit, the weight and, for equal variances, the gradient of the squared error.

    The energy errors of the atoms are taken as independent: V grows with the number of atoms, that
    of a replicated cell's true error with its square. A trained variance says what is hard among
    the data, not where there are none.
    """

    FIELDS = (keys.MEAN_VARIANCE_FORCE_STD, keys.MEAN_VARIANCE_ENERGY_STD)
    trained = True

    typical: Tensor
    factor: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.readout = Readout(sizes.num_scalars, sizes.num_elements, 2)
        for layer in (self.readout.linear, self.readout.out):  # all atoms alike at the start
            torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(self.readout.linear.bias)
        self.reach = REACH
        self.register_buffer("typical", torch.tensor(TYPICAL).log())
        self.register_buffer("factor", torch.ones(2))

    def log_std(self, features: Features, species: Tensor) -> Tensor:
        """(num_atoms, 2): logs of sqrt(s_i^2), eV/Å, and of sqrt(v_i), eV, before `fit`."""
        hidden = self.readout.activations(features.scalars)
        free = self.readout(features.scalars, hidden, species)
        return self.typical + self.reach * torch.tanh(free / self.reach)

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward."""
        std = self.factor * torch.exp(self.log_std(features, species))
        return {keys.MEAN_VARIANCE_FORCE_STD: std[:, 0], keys.MEAN_VARIANCE_ENERGY_STD: std[:, 1]}

    def loss(self, atoms: Atoms) -> Loss:
        """See Method.loss and the class; its value is the squared error where variances are right.

        With u = V / N: mean over frames of u0 [ln(u / u0) + dE^2 / N u], u0 the mean of u; over
        atoms likewise with the mean square of the force components.
        """
        variance = torch.exp(2.0 * self.log_std(atoms.features, atoms.species)).double()
        frames = torch.zeros_like(atoms.energy_errors, dtype=torch.float64)
        num_atoms = frames.index_add(0, atoms.frame, torch.ones_like(variance[:, 1]))
        of_frame = frames.index_add(0, atoms.frame, variance[:, 1]) / num_atoms
        return Loss(
            _scaled_nll(of_frame, atoms.energy_errors.double().square() / num_atoms),
            _scaled_nll(variance[:, 0], atoms.errors.double().square().mean(1)),
        )

    @torch.no_grad()
    def fit(self, seen: Atoms, held: Atoms) -> dict[str, Any]:
        """One factor each on force and energy standard deviations: the validation errors' size.

        Returns:
            Predicted / true root mean square of both before that.
        """
        self.factor.fill_(1.0)
        fields = self(held.features, held.energy, held.species)
        force_std, energy_std = (fields[name] for name in self.FIELDS)
        forces = (force_std.square().mean() / held.errors.square().mean()).sqrt()
        energy = (energy_std.square().sum() / held.energy_errors.square().sum()).sqrt()
        self.factor.copy_(1.0 / torch.stack([forces, energy]))
        return {
            "mean_variance_raw_force_size_ratio": float(forces),
            "mean_variance_raw_energy_size_ratio": float(energy),
        }


def _scaled_nll(variance: Tensor, squared_error: Tensor) -> Tensor:
    """Twice the Gaussian NLL times the mean variance, less ln of that: in units of the variance."""
    scale = variance.detach().mean()
    return (scale * (torch.log(variance / scale) + squared_error / variance)).mean()
