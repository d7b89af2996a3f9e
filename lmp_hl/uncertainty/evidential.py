"""Evidential forces: a distribution over the mean and the covariance of an atom's force error."""

import math
from typing import Any, NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from .. import keys
from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy, Readout
from .base import Atoms, Loss, Method, Sizes
from .scales import spd_exponential

# typical force component, eV/Å, and evidence; a factor of 100 either way is allowed
TYPICAL = (0.1, 10.0)
REACH = math.log(100.0)
PENALTY = 0.01


class Evidence(NamedTuple):
    """Of force errors, before the factor of `fit`.

    aleatoric: (num_atoms, 3, 3) SPD, (eV/Å)², exp(2 log_std + G); log_std: (num_atoms,); generator:
    (num_atoms, 3, 3) traceless symmetric G; evidence: (num_atoms,) positive.
    """

    aleatoric: Tensor
    log_std: Tensor
    generator: Tensor
    evidence: Tensor


class Evidential(Method):
    """Normal-inverse-Wishart evidence on forces with an SPD tensor that rotates with the atoms.

    The force label is N(mu, S) with unknown mu and S: mu | S ~ N(F, S / kappa), F the conservative
    force, S ~ IW(Psi, nu). Then (d = 3)

        aleatoric   E[S]    = Psi / (nu - 4)
        epistemic   Cov[mu] = E[S] / kappa
        predictive  Student t with nu - 2 degrees of freedom and the scale Psi (1 + 1/kappa) /
                    (nu - 2), whose covariance is the sum of the two above.

    E[S] = s^2 exp(G), s from the scalars, G the traceless symmetric tensor of degree-2 features:
    equivariant and positive definite (arXiv 2602.10419, e2IP: a tangent-space tensor and the
    exponential map). That paper's loss, regularisation and couplings we could not read, and sources
    on evidential regression disagree: the t density knows Psi and kappa only as Psi (1 + 1/kappa),
    so independent ones are not identified (Meinert & Lavin, arXiv 2104.06135). Here both count the
    same observations, as in the conjugate update: kappa = e, nu = 4 + e with one evidence e > 0,
    which the weight of the tails tells. The loss is the t's negative log-likelihood plus PENALTY
    times e times the squared Mahalanobis error per component, after the penalty on evidence for
    wrong predictions of Amini et al. (2020), both times a constant as in mean_variance.py.

    Limits: e -> infinity is a Gaussian of covariance E[S] without epistemic part; e -> 0 makes the
    epistemic part infinite. Nothing makes e small where there are no data.
    """

    FIELDS = (
        keys.EVIDENTIAL_FORCE_STD,
        keys.EVIDENTIAL_ALEATORIC_STD,
        keys.EVIDENTIAL_EPISTEMIC_STD,
    )
    trained = True

    typical: Tensor
    cartesian: Tensor
    factor: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.readout = Readout(sizes.num_scalars, sizes.num_elements, 2)
        for layer in (self.readout.linear, self.readout.out):  # all atoms alike at the start
            torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(self.readout.linear.bias)
        self.shape_weight = torch.nn.Parameter(torch.zeros(sizes.channels))
        self.reach = REACH
        self.register_buffer("typical", torch.tensor(TYPICAL).log())
        cartesian = o3.wigner_3j(1, 1, 2, dtype=torch.float64) * math.sqrt(5.0)
        self.register_buffer("cartesian", cartesian.permute(2, 0, 1).to(torch.get_default_dtype()))
        self.register_buffer("factor", torch.ones(()))

    def evidence(self, features: Features, species: Tensor) -> Evidence:
        """Features of the atoms -> E[S] and what it is made of, and e; before `fit`."""
        hidden = self.readout.activations(features.scalars)
        free = self.readout(features.scalars, hidden, species)
        logs = self.typical + self.reach * torch.tanh(free / self.reach)
        log_std = logs[:, 0]
        t = torch.matmul(features.tensors[4:9], self.shape_weight)
        g = torch.einsum("mi,mab->iab", t, self.cartesian)
        # bounded, so that no feature far from the data can make the ellipsoid a needle
        g = g / (1.0 + g.pow(2).sum((1, 2), keepdim=True)).sqrt()
        aleatoric = torch.exp(2.0 * log_std)[:, None, None] * spd_exponential(g)
        return Evidence(aleatoric, log_std, g, torch.exp(logs[:, 1]))

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward; sqrt(tr / 3) of the covariances."""
        found = self.evidence(features, species)
        std = (found.aleatoric.diagonal(dim1=1, dim2=2).sum(1) / 3.0).sqrt() * self.factor
        return {
            keys.EVIDENTIAL_FORCE_STD: std * (1.0 + 1.0 / found.evidence).sqrt(),
            keys.EVIDENTIAL_ALEATORIC_STD: std,
            keys.EVIDENTIAL_EPISTEMIC_STD: std / found.evidence.sqrt(),
        }

    def log_density(self, found: Evidence, errors: Tensor) -> Tensor:
        """Log density of the predictive t at `errors` (num_atoms, 3), eV/Å -> (num_atoms,)."""
        dof = found.evidence + 2.0
        # Psi (1 + 1/kappa) / (nu - 2) in units of E[S]
        scale = (found.evidence + 1.0) / dof
        mahalanobis = _mahalanobis(found, errors) / scale
        log_det = 6.0 * found.log_std + 3.0 * torch.log(scale)
        constant = torch.lgamma(0.5 * dof + 1.5) - torch.lgamma(0.5 * dof)
        tail = 0.5 * (dof + 3.0) * torch.log1p(mahalanobis / dof)
        return constant - 1.5 * torch.log(math.pi * dof) - 0.5 * log_det - tail

    def loss(self, atoms: Atoms) -> Loss:
        """See Method.loss and the class; the energy's loss stays as it is."""
        found = self.evidence(atoms.features, atoms.species)
        total = found.aleatoric.diagonal(dim1=1, dim2=2).sum(1) / 3.0 * (1.0 + 1.0 / found.evidence)
        scale = total.detach().mean()
        nll = -self.log_density(found, atoms.errors) - 1.5 * torch.log(2.0 * math.pi * scale)
        wrong = _mahalanobis(found, atoms.errors).detach() / 3.0
        return Loss(None, (2.0 / 3.0) * scale * (nll + PENALTY * found.evidence * wrong).mean())

    @torch.no_grad()
    def fit(self, seen: Atoms, held: Atoms) -> dict[str, Any]:
        """One factor on all three: the size of the validation frames' force errors.

        Returns:
            Predicted / true root mean square before that.
        """
        self.factor.fill_(1.0)
        std = self(held.features, held.energy, held.species)[keys.EVIDENTIAL_FORCE_STD]
        ratio = (std.square().mean() / held.errors.square().mean()).sqrt()
        self.factor.copy_(1.0 / ratio)
        return {"evidential_raw_size_ratio": float(ratio)}


def _mahalanobis(found: Evidence, errors: Tensor) -> Tensor:
    """Errors^T E[S]^-1 errors, (num_atoms,)."""
    inverse = spd_exponential(-found.generator)
    square = torch.einsum("ia,iab,ib->i", errors, inverse, errors)
    return square * torch.exp(-2.0 * found.log_std)
