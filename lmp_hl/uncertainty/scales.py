"""Force errors as a categorical distribution over scales, times the distance from the data.

The scales are fitted to the force errors of frames that were not trained on. That spread alone does
not grow where there is no data; the feature distance, which nobody trained, does.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from e3nn import o3
from torch import Tensor, nn

from .. import histogram, keys
from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy, invariants
from .base import Atoms, Method, Sizes
from .distance import FeatureDistance

FOLDS = 4
# on the weights of the force distribution's location; the largest makes it constant per element
PENALTIES = (1e6, 1.0, 1e-1, 1e-2)
# forces that vanish by symmetry have no error; below this share of the RMSE an error counts as
# noise, or else the likelihood would look at nothing but those atoms
NOISE = 0.2


def _exponential(g: Tensor) -> Tensor:
    """exp(G) of traceless symmetric matrices (n, 3, 3) with |G| <= 1, exact to rounding.

    The power series by Horner's rule, its terms kept as a + b G + c G^2 by Cayley and Hamilton's
    G^3 = tr(G^2)/2 G + det(G): plain arithmetic that a compiler fuses, unlike torch.matrix_exp.
    """
    square = (g.unsqueeze(3) * g.unsqueeze(1)).sum(2)
    p = 0.5 * square.diagonal(dim1=1, dim2=2).sum(1)
    q = (square * g).sum((1, 2)) / 3.0
    a, b, c = torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for k in range(18, 0, -1):  # 1/19! is below float64's rounding
        a, b, c = 1.0 + q * c / k, (a + p * c) / k, b / k
    one = torch.eye(3, dtype=g.dtype, device=g.device)
    return a[:, None, None] * one + b[:, None, None] * g + c[:, None, None] * square


class ForceScales(NamedTuple):
    """Of force errors: logits (num_atoms, num_scales), shape (num_atoms, 3, 3) SPD with det 1."""

    logits: Tensor
    shape: Tensor


class ForceDistribution(nn.Module):
    """Joint density of an atom's force error, p(dF) = sum_k q_k N(0, (s_k g)^2 C), equivariant.

    q is categorical over the log-spaced scales s_k (1 meV/Å to 10 eV/Å), C = exp(G) with G the
    traceless symmetric tensor of degree-2 features, and g the feature distance, which carries the
    growth away from the data that a fitted spread alone does not have. Isotropic summary:
    force_std = sqrt(tr Sigma / 3).
    """

    log_scales: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    tensor_rms: Tensor
    cartesian: Tensor
    bin_width: Tensor
    masses: Tensor

    def __init__(self, sizes: Sizes, num_scales: int = 32, num_bins: int = 128) -> None:
        super().__init__()
        num_invariants = sizes.num_invariants
        self.location = nn.Linear(num_invariants, 1, bias=False)
        self.element_location = nn.Embedding(sizes.num_elements, 1)
        self.log_spread = nn.Parameter(torch.zeros(()))
        self.delta = nn.Parameter(torch.zeros(num_scales))
        self.shape_weight = nn.Parameter(torch.zeros(sizes.channels))
        nn.init.zeros_(self.location.weight)
        nn.init.constant_(self.element_location.weight, math.log(0.1))
        self.register_buffer(
            "log_scales", torch.linspace(math.log(1e-3), math.log(10.0), num_scales)
        )
        self.register_buffer("feature_mean", torch.zeros(num_invariants))
        self.register_buffer("feature_std", torch.ones(num_invariants))
        self.register_buffer("tensor_rms", torch.ones(()))
        cartesian = o3.wigner_3j(1, 1, 2, dtype=torch.float64) * math.sqrt(5.0)
        self.register_buffer("cartesian", cartesian.permute(2, 0, 1).to(torch.get_default_dtype()))
        # masses of N(0, sigma^2) for log-spaced sigma, each way as many again as there are scales
        self.num_extra = num_scales
        self.spacing = math.log(1e4) / (num_scales - 1)
        self.register_buffer("bin_width", torch.ones(()))  # eV/Å, set_bin_width
        self.register_buffer("masses", torch.zeros(3 * num_scales, num_bins))
        self.set_bin_width(0.01)

    def set_bin_width(self, bin_width: float) -> None:
        """Choose the bins of `entropy`, in eV/Å, and tabulate the masses of the scales in them."""
        edges = histogram.uniform_edges(self.masses.shape[1], bin_width)
        steps = torch.arange(self.masses.shape[0], dtype=torch.float64) - self.num_extra
        sigma = 1e-3 * torch.exp(steps * self.spacing)
        self.bin_width.fill_(bin_width)
        self.masses.copy_(histogram.hl_gauss(torch.zeros_like(sigma), edges, sigma))

    def forward(self, features: Features, species: Tensor) -> ForceScales:
        """Features of the atoms -> their force errors' distribution before the distance factor."""
        x = (invariants(features) - self.feature_mean) / self.feature_std
        location = self.location(x) + self.element_location(species)
        relative = (self.log_scales - location) * torch.exp(-self.log_spread)
        t = torch.matmul(features.tensors[4:9], self.shape_weight) / self.tensor_rms
        g = torch.einsum("mi,mab->iab", t, self.cartesian)
        # bounded, so that no feature far from the data can make the ellipsoid a needle
        norm = g.pow(2).sum((1, 2), keepdim=True)
        shape = _exponential(g / (1.0 + norm).sqrt())
        return ForceScales(self.delta - 0.5 * relative.pow(2), shape)

    def std(self, force: ForceScales, factor: Tensor) -> Tensor:
        """sqrt(tr Sigma / 3) of each atom, eV/Å; `factor` (num_atoms,) is g."""
        mean_square = (torch.softmax(force.logits, 1) * torch.exp(2.0 * self.log_scales)).sum(1)
        trace = force.shape.diagonal(dim1=1, dim2=2).sum(1)
        return factor * (mean_square * trace / 3.0).sqrt()

    def entropy(self, force: ForceScales, factor: Tensor) -> Tensor:
        """Entropy, nats, of the histogram of one force component's error, isotropic part.

        The mixture sum_k q_k N(0, (s_k g)^2 tr C / 3) in the model's uniform bins; its scales are
        taken between tabulated ones by linear interpolation of the masses in log sigma.
        """
        trace = force.shape.diagonal(dim1=1, dim2=2).sum(1)
        steps = torch.log(factor * (trace / 3.0).sqrt()) / self.spacing + self.num_extra
        steps = steps.clamp(0.0, 2.0 * self.num_extra - 1.001).unsqueeze(1)
        # an atom whose features are not finite gets a nan here, not an index out of bounds
        index = torch.nan_to_num(steps).long()
        index = index + torch.arange(force.logits.shape[1], device=steps.device)
        upper = steps - steps.floor()
        q = torch.softmax(force.logits, 1)
        weights = torch.zeros((q.shape[0], self.masses.shape[0]), dtype=q.dtype, device=q.device)
        weights = weights.scatter_add(1, index, q * (1.0 - upper)).scatter_add(
            1, index + 1, q * upper
        )
        return histogram.entropy(weights @ self.masses)

    def log_density(self, force: ForceScales, factor: Tensor, errors: Tensor) -> Tensor:
        """Log p(dF) of each atom; errors (num_atoms, 3) in eV/Å -> (num_atoms,)."""
        mahalanobis = (
            errors.unsqueeze(1) @ torch.linalg.solve(force.shape, errors.unsqueeze(2))
        ).flatten()
        log_sigma = self.log_scales + torch.log(factor).unsqueeze(1)
        kernel = -0.5 * mahalanobis.unsqueeze(1) * torch.exp(-2.0 * log_sigma) - 3.0 * log_sigma
        mixture = torch.logsumexp(torch.log_softmax(force.logits, 1) + kernel, 1)
        return mixture - 1.5 * math.log(2.0 * math.pi)


class Scales(Method):
    """The default: `distance`, and `force_std` and `force_entropy` of ForceDistribution with it."""

    FIELDS = (keys.FORCE_ENTROPY, keys.FORCE_STD, keys.DISTANCE)

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.distance = FeatureDistance(sizes)
        self.force_distribution = ForceDistribution(sizes)

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward."""
        distance = self.distance(features, species)
        force = self.force_distribution(features, species)
        return {
            keys.FORCE_ENTROPY: self.force_distribution.entropy(force, distance),
            keys.FORCE_STD: self.force_distribution.std(force, distance),
            keys.DISTANCE: distance,
        }

    def card(self) -> dict[str, Any]:
        """Bins of force_entropy."""
        bins = self.force_distribution
        return {
            "force_histogram": {
                "num_bins": int(bins.masses.shape[1]),
                "bin_width": float(bins.bin_width),
            }
        }

    @torch.no_grad()
    def fit(self, seen: Atoms, held: Atoms) -> dict[str, Any]:
        """Fit the validation frames' force errors: shape by likelihood, size by second moment.

        The penalty is the one whose cross-validated force_std (over frames) ranks the errors best,
        the largest on a tie; see _fit for what is fitted.

        Returns:
            penalty; ratio predicted/true force error and rank correlation, both cross-validated.
        """
        from scipy.stats import spearmanr
        from sklearn.model_selection import GroupKFold

        self.distance.fit(seen, held)
        head = self.force_distribution
        x = invariants(held.features)
        head.feature_mean.copy_(x.mean(0))
        std = x.std(0)
        head.feature_std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))
        head.tensor_rms.copy_(held.features.tensors[4:9].square().mean().sqrt())
        rmse = held.errors.square().mean().sqrt()
        torch.nn.init.constant_(head.element_location.weight, float(rmse.log()))
        distance = self.distance(held.features, held.species)

        start = {k: v.clone() for k, v in head.state_dict().items()}
        best, penalty, cross_std = -math.inf, PENALTIES[0], torch.full_like(distance, math.nan)
        for candidate in PENALTIES if held.num_frames >= 2 else ():
            predicted = torch.zeros_like(distance)
            folds = GroupKFold(min(FOLDS, held.num_frames)).split(x, groups=held.frame)
            for fit_rows, test_rows in folds:
                head.load_state_dict(start)
                _fit(head, held.rows(torch.from_numpy(fit_rows)), distance[fit_rows], candidate)
                part = held.rows(torch.from_numpy(test_rows))
                force = head(part.features, part.species)
                predicted[test_rows] = head.std(force, distance[test_rows])
            score = float(spearmanr(predicted.numpy(), held.errors.norm(dim=1).numpy()).statistic)
            if score > best:
                best, penalty, cross_std = score, candidate, predicted
        head.load_state_dict(start)
        _fit(head, held, distance, penalty)
        head.set_bin_width(float(head.std(head(held.features, held.species), distance).median()))
        return {
            "penalty": penalty,
            "size_ratio": float(cross_std.square().mean().sqrt() / rmse),
            "rank_correlation": best,
        }


def _above_noise(errors: Tensor, noise: Tensor) -> Tensor:
    """Errors (num_atoms, 3) stretched to a length of at least `noise`, in any direction if zero."""
    length = errors.norm(dim=1, keepdim=True)
    stretched = errors * (noise / length.clamp(min=1e-12))
    stretched = torch.where(length > 1e-12, stretched, noise / math.sqrt(3.0))
    return torch.where(length < noise, stretched, errors)


def _fit(head: ForceDistribution, atoms: Atoms, distance: Tensor, penalty: float) -> None:
    """Penalised maximum likelihood, then one factor on all scales.

    A mixture's likelihood hardly minds a tail that is too heavy, but force_std is read as a size:
    the factor makes its mean square that of the errors.
    """
    rmse = atoms.errors.square().mean().sqrt()
    errors = _above_noise(atoms.errors, NOISE * rmse)
    # delta is weakly tied to zero: a free weight for every scale would follow single atoms
    tied: Sequence[tuple[Tensor, float]] = (
        (head.location.weight, penalty),
        (head.shape_weight, penalty),
        (head.delta, 1e-2),
        (head.log_spread, 1e-2),
    )
    parameters = list(head.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        force = head(atoms.features, atoms.species)
        value = -head.log_density(force, distance, errors).mean()
        for weight, strength in tied:
            value = value + strength * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    for parameter in parameters:
        parameter.requires_grad_(False)
    std = head.std(head(atoms.features, atoms.species), distance)
    head.element_location.weight.add_(torch.log(rmse / std.square().mean().sqrt()))
