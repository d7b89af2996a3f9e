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
from . import conformal
from .base import Atoms, Method, Sizes
from .distance import FeatureDistance

FOLDS = 4
# on the weights of the force distribution's location; the largest makes it constant per element
PENALTIES = (1e6, 1.0, 1e-1, 1e-2)
# forces that vanish by symmetry have no error; below this share of the RMSE an error counts as
# noise, or else the likelihood would look at nothing but those atoms
NOISE = 0.2


def _trace_series(num_p: int = 8, num_q: int = 5) -> Tensor:
    """Coefficients K of tr exp(G) = sum_ij K_ij p^i q^j, p = tr(G^2)/2, q = det(G), tr(G) = 0.

    From sum_n tr(G^n) / n! with the power sums of the roots of x^3 = p x + q. Exact to rounding for
    |G| <= 1, where p <= 1/2 and |q| <= 0.14.
    """
    series = torch.zeros(num_p, num_q, dtype=torch.float64)
    for i in range(num_p):
        for j in range(num_q):
            n = 2 * i + 3 * j
            ways = math.factorial(i) * math.factorial(j)
            power_sum = n * math.factorial(i + j - 1) / ways if n else 3.0
            series[i, j] = power_sum / math.factorial(n)
    return series


def spd_exponential(g: Tensor) -> Tensor:
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


def _powers(x: Tensor, number: int) -> Tensor:
    """1, x, x^2, ... (n, number) of x (n,); products, because pow is slow."""
    found = [torch.ones_like(x), x]
    for k in range(2, number):
        found.append(found[k // 2] * found[k - k // 2])
    return torch.stack(found, 1)


class ForceScales(NamedTuple):
    """Of force errors: logits (num_atoms, num_scales), generator G (num_atoms, 3, 3) of the shape.

    C = exp(G) is SPD with determinant 1; G is traceless, symmetric and |G| < 1.
    """

    logits: Tensor
    generator: Tensor


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
    trace_series: Tensor
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
        series = _trace_series()
        self.register_buffer("trace_series", series.to(torch.get_default_dtype()), persistent=False)
        # masses of N(0, sigma^2) for log-spaced sigma, each way as many again as there are scales
        self.num_extra = num_scales
        self.spacing = math.log(1e4) / (num_scales - 1)
        self.register_buffer("bin_width", torch.ones(()))  # eV/Å, set_bin_width
        # of the upper half of the bins: the lower half is its mirror image
        self.register_buffer("masses", torch.zeros(3 * num_scales, num_bins // 2))
        self.set_bin_width(0.01)

    def set_bin_width(self, bin_width: float) -> None:
        """Choose the bins of `entropy`, in eV/Å, and tabulate the masses of the scales in them."""
        num_bins = 2 * self.masses.shape[1]
        edges = histogram.uniform_edges(num_bins, bin_width)
        steps = torch.arange(self.masses.shape[0], dtype=torch.float64) - self.num_extra
        sigma = 1e-3 * torch.exp(steps * self.spacing)
        self.bin_width.fill_(bin_width)
        masses = histogram.hl_gauss(torch.zeros_like(sigma), edges, sigma)
        self.masses.copy_(masses[:, num_bins // 2 :])

    def forward(self, x: Tensor, tensors: Tensor, species: Tensor) -> ForceScales:
        """Force errors' distribution before the distance factor.

        Args:
            x: nn.heads.invariants of the features, (num_atoms, num_invariants).
            tensors: of the features.
            species: (num_atoms,).
        """
        weight = self.location.weight[0] / self.feature_std
        location = ((x - self.feature_mean) @ weight).unsqueeze(1) + self.element_location(species)
        relative = (self.log_scales - location) * torch.exp(-self.log_spread)
        t = torch.matmul(tensors[4:9], self.shape_weight / self.tensor_rms)
        g = (t.t() @ self.cartesian.flatten(1)).reshape(-1, 3, 3)
        # bounded, so that no feature far from the data can make the ellipsoid a needle
        norm = g.pow(2).sum((1, 2), keepdim=True)
        return ForceScales(self.delta - 0.5 * relative.pow(2), g / (1.0 + norm).sqrt())

    def reset(self, x: Tensor, tensors: Tensor, errors: Tensor) -> None:
        """Forget what was fitted; take scales of features and of errors from these atoms."""
        std = x.std(0)
        self.feature_mean.copy_(x.mean(0))
        self.feature_std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))
        self.tensor_rms.copy_(tensors[4:9].square().mean().sqrt())
        for weight in (self.location.weight, self.log_spread, self.delta, self.shape_weight):
            nn.init.zeros_(weight)
        rmse = errors.square().mean().sqrt()
        nn.init.constant_(self.element_location.weight, float(rmse.log()))

    def summary(self, force: ForceScales, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Size and entropy of one component's error, isotropic part.

        Args:
            force: of the atoms.
            factor: g, (num_atoms,).

        Returns:
            sqrt(tr Sigma / 3), (num_atoms,), eV/Å; entropy, (num_atoms,), nats, of the mixture
            sum_k q_k N(0, (s_k g)^2 tr C / 3) in the model's uniform bins, its scales taken between
            tabulated ones by linear interpolation of the masses in log sigma.
        """
        q = torch.softmax(force.logits, 1)
        spread = factor * (self.shape_trace(force.generator) / 3.0).sqrt()
        std = spread * (q @ torch.exp(2.0 * self.log_scales)).sqrt()

        steps = torch.log(spread) / self.spacing + self.num_extra
        steps = steps.clamp(0.0, 2.0 * self.num_extra - 1.001).unsqueeze(1)
        upper = steps - steps.floor()
        # every scale lies between two rows of the table, and the next scale between the next two
        none = torch.zeros_like(upper)
        q = torch.cat([q * (1.0 - upper), none], 1) + torch.cat([none, q * upper], 1)
        # an atom whose features are not finite gets a nan here, not an index out of bounds
        index = torch.nan_to_num(steps).long() + torch.arange(q.shape[1], device=steps.device)
        weights = torch.zeros((q.shape[0], self.masses.shape[0]), dtype=q.dtype, device=q.device)
        return std, 2.0 * histogram.entropy(weights.scatter(1, index, q) @ self.masses)

    def shape_trace(self, generator: Tensor) -> Tensor:
        """Trace of C = exp(G), (num_atoms,), from the two invariants of G; see _trace_series."""
        p = 0.5 * generator.pow(2).sum((1, 2))
        q = (torch.linalg.cross(generator[:, 0], generator[:, 1]) * generator[:, 2]).sum(1)
        return ((_powers(p, 8) @ self.trace_series) * _powers(q, 5)).sum(1)

    def log_density(self, force: ForceScales, factor: Tensor, errors: Tensor) -> Tensor:
        """Log p(dF) of each atom; errors (num_atoms, 3) in eV/Å -> (num_atoms,)."""
        shape = spd_exponential(force.generator)
        mahalanobis = (
            errors.unsqueeze(1) @ torch.linalg.solve(shape, errors.unsqueeze(2))
        ).flatten()
        log_sigma = self.log_scales + torch.log(factor).unsqueeze(1)
        kernel = -0.5 * mahalanobis.unsqueeze(1) * torch.exp(-2.0 * log_sigma) - 3.0 * log_sigma
        mixture = torch.logsumexp(torch.log_softmax(force.logits, 1) + kernel, 1)
        return mixture - 1.5 * math.log(2.0 * math.pi)


class Scales(Method):
    """The default: a force error's size from ForceDistribution, grown by the feature distance.

    `force_std`, `force_entropy` and `distance`, and two promises that conformal prediction keeps
    for frames exchangeable with the validation frames, and only for those: not away from them, nor
    along one trajectory, whose frames resemble each other.

    `force_bound` = q force_std lies above an atom's force error sqrt(|dF|^2 / 3) with the coverage
    in the card: q is a quantile over frames (conformal.py) of error / force_std, each force_std
    cross-validated over frames. That is cross-conformal prediction (Vovk 2015): the coverage is the
    stated one where the folds' fits are nearly those of the whole, and without that not proven
    beyond 1 - 2 (1 - coverage) (Barber et al. 2021).

    `extrapolating` is 1 where `distance` is beyond the same quantile of the validation frames'
    distances: at most a share 1 - coverage of the atoms of such frames is flagged, so a larger
    share says that these are other frames.

    Fewer than conformal.MIN_FRAMES frames allow neither, and the model file offers neither then.
    """

    FIELDS = (
        keys.FORCE_ENTROPY,
        keys.FORCE_STD,
        keys.FORCE_BOUND,
        keys.DISTANCE,
        keys.EXTRAPOLATING,
    )

    coverage: Tensor
    bound_factor: Tensor
    reach: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.distance = FeatureDistance(sizes)
        self.force_distribution = ForceDistribution(sizes)
        self.register_buffer("coverage", torch.zeros(()))  # promised; 0: no promise
        self.register_buffer("bound_factor", torch.full((), math.inf))  # q
        self.register_buffer("reach", torch.full((), math.inf))  # distance still known

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward."""
        x = invariants(features)
        distance = self.distance(x, species)
        force = self.force_distribution(x, features.tensors, species)
        std, entropy = self.force_distribution.summary(force, distance)
        return {
            keys.FORCE_ENTROPY: entropy,
            keys.FORCE_STD: std,
            keys.FORCE_BOUND: self.bound_factor * std,
            keys.DISTANCE: distance,
            keys.EXTRAPOLATING: (distance > self.reach).to(distance.dtype),
        }

    def available_fields(self) -> list[str]:
        """All, or those that promise nothing when there were too few frames to promise on."""
        promises = (keys.FORCE_BOUND, keys.EXTRAPOLATING)
        return [name for name in self.FIELDS if self.coverage > 0 or name not in promises]

    def card(self) -> dict[str, Any]:
        """Bins of force_entropy, and what force_bound and extrapolating promise."""
        bins = self.force_distribution
        card: dict[str, Any] = {
            "force_histogram": {
                "num_bins": 2 * int(bins.masses.shape[1]),
                "bin_width": float(bins.bin_width),
            }
        }
        if self.coverage > 0:
            card["conformal"] = {
                "coverage": round(float(self.coverage), 6),  # of a float32 buffer
                "force_bound_over_force_std": float(self.bound_factor),
                "extrapolating_beyond_distance": float(self.reach),
            }
        return card

    def fit(self, seen: Atoms, held: Atoms) -> dict[str, Any]:
        """See calibrate; the feature statistics are those of the training frames."""
        self.distance.fit(seen)
        return self.calibrate(held)

    @torch.no_grad()
    def calibrate(self, held: Atoms) -> dict[str, Any]:
        """Fit the validation frames' force errors: shape by likelihood, size by second moment.

        The penalty is the one whose cross-validated force_std (over frames) ranks the errors best,
        the largest on a tie; see _fit for what is fitted.

        Returns:
            penalty; ratio predicted/true force error and rank correlation, both cross-validated.

        Raises:
            ValueError: the model has no feature statistics that these atoms have a distance to.
        """
        from scipy.stats import spearmanr
        from sklearn.model_selection import GroupKFold

        self.distance.set_unit(held)
        head = self.force_distribution
        x, tensors, species = invariants(held.features), held.features.tensors, held.species
        head.reset(x, tensors, held.errors)
        distance = self.distance(x, species)

        start = {k: v.clone() for k, v in head.state_dict().items()}
        best, penalty, cross_std = -math.inf, PENALTIES[0], torch.full_like(distance, math.nan)
        for candidate in PENALTIES if held.num_frames >= 2 else ():
            predicted = torch.zeros_like(distance)
            folds = GroupKFold(min(FOLDS, held.num_frames)).split(x, groups=held.frame)
            for fit_rows, test_rows in folds:
                head.load_state_dict(start)
                _fit(head, held.rows(torch.from_numpy(fit_rows)), distance[fit_rows], candidate)
                force = head(x[test_rows], tensors[:, test_rows], species[test_rows])
                predicted[test_rows] = head.summary(force, distance[test_rows])[0]
            score = float(spearmanr(predicted.numpy(), held.errors.norm(dim=1).numpy()).statistic)
            if score > best:
                best, penalty, cross_std = score, candidate, predicted
        head.load_state_dict(start)
        _fit(head, held, distance, penalty)
        std, _ = head.summary(head(x, tensors, species), distance)
        head.set_bin_width(float(std.median()))

        size = held.errors.square().mean(1).sqrt()
        frame, coverage = held.frame.numpy(), conformal.attainable_coverage(held.num_frames)
        self.coverage.fill_(coverage)
        if coverage > 0:
            scores = (size / cross_std).numpy()
            self.bound_factor.fill_(conformal.pooled_quantile(scores, frame, coverage))
            self.reach.fill_(conformal.pooled_quantile(distance.numpy(), frame, coverage))
        return {
            "penalty": penalty,
            "size_ratio": float((cross_std.square().mean() / size.square().mean()).sqrt()),
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
    x, tensors = invariants(atoms.features), atoms.features.tensors
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
        force = head(x, tensors, atoms.species)
        value = -head.log_density(force, distance, errors).mean()
        for weight, strength in tied:
            value = value + strength * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    for parameter in parameters:
        parameter.requires_grad_(False)
    std, _ = head.summary(head(x, tensors, atoms.species), distance)
    head.element_location.weight.add_(torch.log(rmse / std.square().mean().sqrt()))
