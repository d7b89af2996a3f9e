"""Force errors as a categorical distribution over scales, times the distance from the data.

The scales are fitted to the force errors of frames that were not trained on. That spread alone does
not grow where there is no data; the feature distance, which nobody trained, does.
"""

import math
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
from .neighbors import neighbor_mean
from .penalised import minimise
from .per_element import error_scale

FOLDS = 4
# forces that nearly vanish by symmetry have next to no error; below this share of the size expected
# an error counts as noise, or else the likelihood would look at nothing but those atoms
NOISE = 0.2
# l = 1 features below this share of their training rms say that the force vanishes by symmetry
SYMMETRIC = 0.1
FLOOR = 0.05  # what is then left of the spread
PENALTY = 0.1  # on the weights of the shape: few atoms must not make needles
TABLE = (-12.0, 12.0, 481)  # log(std / bin width): from, to, number of entropies


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
    """1, x, x^2, ... (number, n) of x (n,); products, because pow is slow."""
    found = [torch.ones_like(x), x]
    for k in range(2, number):
        found.append(found[k // 2] * found[k - k // 2])
    return torch.stack(found)


class ForceShape(NamedTuple):
    """Of force errors: generator G (num_atoms, 3, 3) of the shape and damping h (num_atoms,).

    C = exp(G) is SPD with determinant 1; G is traceless, symmetric and |G| < 1; 0 < h < 1.
    """

    generator: Tensor
    damping: Tensor


class ForceDistribution(nn.Module):
    """Joint density of an atom's force error, equivariant and with heavy tails.

        p(dF) = sum_k q_k N(0, (a_z r_k h g)^2 C),    sum_k q_k r_k^2 = 1

    q is categorical over log-spaced relative scales r_k, a_z the size of element z, C = exp(G) with
    G the traceless symmetric tensor of degree-2 features, and g the feature distance of the atom
    and its neighbours (_growth), which grows away from the data as a fitted spread alone does not.
    Where symmetry makes forces vanish it makes their errors vanish: h = sqrt((t^2 + (f c)^2) / (t^2
    + c^2)), f = FLOOR, c = SYMMETRIC, t the rms of the l = 1 features over the channels, each in
    units of its rms in the training set. Isotropic summary: force_std = sqrt(tr Sigma / 3) = a_z h
    g sqrt(tr C / 3).

    Sizes that a network reads from the features, instead of one for each element, were tried: they
    rank no better near the data, and their rank and size are worse away from it.
    """

    log_scales: Tensor
    vector_rms: Tensor
    tensor_rms: Tensor
    size: Tensor
    cartesian: Tensor
    trace_series: Tensor
    bin_width: Tensor
    entropies: Tensor

    def __init__(self, sizes: Sizes, num_scales: int = 32, num_bins: int = 128) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.log_spread = nn.Parameter(torch.zeros(()))
        self.delta = nn.Parameter(torch.zeros(num_scales))
        self.shape_weight = nn.Parameter(torch.zeros(sizes.channels))
        log_scales = torch.linspace(math.log(1e-2), math.log(30.0), num_scales)
        self.register_buffer("log_scales", log_scales)
        self.register_buffer("vector_rms", torch.ones(sizes.channels))
        self.register_buffer("tensor_rms", torch.ones(()))
        self.register_buffer("size", torch.full((sizes.num_elements,), 0.1))  # a, eV/Å
        cartesian = o3.wigner_3j(1, 1, 2, dtype=torch.float64) * math.sqrt(5.0)
        self.register_buffer("cartesian", cartesian.permute(2, 0, 1).to(torch.get_default_dtype()))
        series = _trace_series()
        self.register_buffer("trace_series", series.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("bin_width", torch.ones(()))  # eV/Å, see tabulate
        self.register_buffer("entropies", torch.zeros(TABLE[2]))
        self.symmetric = ((FLOOR * SYMMETRIC) ** 2, SYMMETRIC**2)
        self.first, self.spacing = TABLE[0], (TABLE[1] - TABLE[0]) / (TABLE[2] - 1)
        self.tabulate(0.01)

    def forward(self, tensors: Tensor) -> ForceShape:
        """What the features say of an atom's errors; tensors of Features."""
        # numbers of all atoms side by side: loops over 3 x 3 are slow when compiled
        t = torch.matmul(tensors[4:9], self.shape_weight) / self.tensor_rms
        g = (self.cartesian.flatten(1).t() @ t).t().reshape(-1, 3, 3)
        # bounded, so that no feature far from the data can make the ellipsoid a needle
        norm = g.pow(2).sum((1, 2), keepdim=True)
        weights = self.vector_rms.pow(-2) / self.vector_rms.shape[0]
        square = torch.matmul(tensors[1:4].pow(2).sum(0), weights)
        damping = (square + self.symmetric[0]) / (square + self.symmetric[1])
        return ForceShape(g / (1.0 + norm).sqrt(), damping.sqrt())

    def spread(self, shape: ForceShape) -> Tensor:
        """Of h sqrt(tr C / 3), (num_atoms,): force_std without the element's size and g."""
        return shape.damping * (self.shape_trace(shape.generator) / 3.0).sqrt()

    def shape_trace(self, generator: Tensor) -> Tensor:
        """Trace of C = exp(G), (num_atoms,), from the two invariants of G; see _trace_series."""
        p = 0.5 * generator.pow(2).sum((1, 2))
        q = (torch.linalg.cross(generator[:, 0], generator[:, 1]) * generator[:, 2]).sum(1)
        return ((self.trace_series.t() @ _powers(p, 8)) * _powers(q, 5)).sum(0)

    def entropy(self, std: Tensor) -> Tensor:
        """Of one component's error in the model's bins, isotropic part, (num_atoms,), nats.

        The mixture's shape is the same for all atoms, so it is a function of force_std alone; taken
        from a table by linear interpolation in log(std).
        """
        step = (torch.log(std / self.bin_width) - self.first) / self.spacing
        step = step.clamp(0.0, self.entropies.shape[0] - 1.001)
        # an atom whose features are not finite gets a nan here, not an index out of bounds
        index = torch.nan_to_num(step).long()
        low, high = self.entropies[index], self.entropies[index + 1]
        return low + (step - index) * (high - low)

    def relative(self) -> tuple[Tensor, Tensor]:
        """Log q and log r, each (num_scales,)."""
        logits = self.delta - 0.5 * (self.log_scales * torch.exp(-self.log_spread)).square()
        log_q = torch.log_softmax(logits, 0)
        return log_q, self.log_scales - 0.5 * torch.logsumexp(log_q + 2.0 * self.log_scales, 0)

    def log_density(
        self, shape: ForceShape, size: Tensor, growth: Tensor, errors: Tensor
    ) -> Tensor:
        """Log p(dF) of each atom.

        Args:
            shape: of the atoms.
            size: a_z of each, (num_atoms,), eV/Å.
            growth: g, (num_atoms,).
            errors: (num_atoms, 3), eV/Å.
        """
        ellipsoid = spd_exponential(shape.generator)
        mahalanobis = (
            errors.unsqueeze(1) @ torch.linalg.solve(ellipsoid, errors.unsqueeze(2))
        ).flatten()
        log_q, log_r = self.relative()
        log_sigma = log_r + torch.log(size * shape.damping * growth).unsqueeze(1)
        kernel = -0.5 * mahalanobis.unsqueeze(1) * torch.exp(-2.0 * log_sigma) - 3.0 * log_sigma
        return torch.logsumexp(log_q + kernel, 1) - 1.5 * math.log(2.0 * math.pi)

    @torch.no_grad()
    def tabulate(self, bin_width: float) -> None:
        """Choose the bins of `entropy`, in eV/Å, and tabulate the entropies of the mixture."""
        self.bin_width.fill_(bin_width)
        edges = histogram.uniform_edges(self.num_bins, 1.0)
        log_q, log_r = (x.double() for x in self.relative())
        log_std = torch.linspace(*TABLE, dtype=torch.float64)
        sigma = torch.exp(log_std.unsqueeze(1) + log_r)
        masses = histogram.hl_gauss(torch.zeros_like(sigma), edges, sigma)
        self.entropies.copy_(histogram.entropy((log_q.exp().unsqueeze(1) * masses).sum(1)))

    def scale_features(self, seen: Features) -> None:
        """Take the units of the features from those of the training frames."""
        self.tensor_rms.copy_(seen.tensors[4:9].square().mean().sqrt())
        rms = seen.tensors[1:4].square().sum(0).mean(0).sqrt()
        # only perfect crystals among the training frames: nothing that differs is symmetric
        self.vector_rms.copy_(rms.clamp(min=1e-6 * max(float(rms.max()), 1e-6)))

    def fit(self, atoms: Atoms, growth: Tensor) -> None:
        """Penalised maximum likelihood of the mixture and the shape.

        The sizes are no parameters: a likelihood hardly minds a tail that is too heavy, but
        force_std is read as a size, so its mean square is that of the errors, for each element.

        Args:
            atoms: their errors are fitted.
            growth: g, (num_atoms,).
        """
        # the mixture is weakly tied: a free weight for every scale would follow single atoms
        tied = ((self.shape_weight, PENALTY), (self.delta, 1e-2), (self.log_spread, 1e-2))
        for parameter, _ in tied:
            nn.init.zeros_(parameter)
        num_elements = len(self.size)

        def sizes(shape: ForceShape) -> Tensor:
            expected = growth * self.spread(shape)
            return error_scale(expected, atoms.errors, atoms.species, num_elements)

        def loss() -> Tensor:
            shape = self(atoms.features.tensors)
            size = sizes(shape)[atoms.species]
            with torch.no_grad():
                errors = _above_noise(atoms.errors, NOISE * size * growth * shape.damping)
            return -self.log_density(shape, size, growth, errors).mean()

        minimise(loss, tied, max_iter=100)
        self.size.copy_(sizes(self(atoms.features.tensors)))


def _growth(square: Tensor, of_neighbors: Tensor) -> Tensor:
    """The g of ForceDistribution from d^2 of the atoms and the mean of d^2 over their neighbours.

    Half of the variance of a force's error is taken to come from the atom's own energy and half
    from its neighbours'. Neither half alone ranks as well; which weights the neighbours have and
    which power is averaged hardly matters.
    """
    return (0.5 * (square + of_neighbors)).sqrt()


def _above_noise(errors: Tensor, noise: Tensor) -> Tensor:
    """Errors (num_atoms, 3) stretched to a length of at least `noise`, in any direction if zero."""
    length, noise = errors.norm(dim=1, keepdim=True), noise.unsqueeze(1)
    stretched = errors * (noise / length.clamp(min=1e-12))
    stretched = torch.where(length > 1e-12, stretched, noise / math.sqrt(3.0))
    return torch.where(length < noise, stretched, errors)


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

    SHARED = ("square",)

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
        distance = self.distance(invariants(features), species)
        force = self.force_distribution
        return {
            keys.DISTANCE: distance,
            "square": distance.square(),
            "spread": force.size[species] * force.spread(force(features.tensors)),
        }

    def finish(
        self, values: dict[str, Tensor], neighbors: dict[str, Tensor], species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.finish."""
        distance = values[keys.DISTANCE]
        std = values["spread"] * _growth(values["square"], neighbors["square"])
        return {
            keys.FORCE_ENTROPY: self.force_distribution.entropy(std),
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
                "num_bins": bins.num_bins,
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
        self.force_distribution.scale_features(seen.features)
        return self.calibrate(held)

    @torch.no_grad()
    def calibrate(self, held: Atoms) -> dict[str, Any]:
        """Fit the validation frames' force errors, see ForceDistribution.fit.

        Returns:
            Ratio predicted/true force error and rank correlation, both cross-validated over frames.

        Raises:
            ValueError: the model has no feature statistics that these atoms have a distance to.
        """
        from scipy.stats import spearmanr
        from sklearn.model_selection import GroupKFold

        self.distance.set_unit(held)
        force, species, tensors = self.force_distribution, held.species, held.features.tensors
        distance = self.distance(invariants(held.features), species)
        square = distance.square()
        growth = _growth(square, neighbor_mean(square, held.edge_index, held.edge_weights))

        cross_std = torch.full_like(growth, math.nan)
        if held.num_frames >= 2:
            folds = GroupKFold(min(FOLDS, held.num_frames)).split(growth, groups=held.frame)
            for fit_rows, rows in folds:
                force.fit(held.rows(torch.from_numpy(fit_rows)), growth[fit_rows])
                spread = growth[rows] * force.spread(force(tensors[:, rows]))
                cross_std[rows] = force.size[species[rows]] * spread
        force.fit(held, growth)
        std = force.size[species] * growth * force.spread(force(tensors))
        force.tabulate(float(std.median()))

        size = held.errors.square().mean(1).sqrt()
        frame, coverage = held.frame.numpy(), conformal.attainable_coverage(held.num_frames)
        self.coverage.fill_(coverage)
        if coverage > 0:
            scores = (size / cross_std).numpy()
            self.bound_factor.fill_(conformal.pooled_quantile(scores, frame, coverage))
            self.reach.fill_(conformal.pooled_quantile(distance.numpy(), frame, coverage))
        return {
            "size_ratio": float((cross_std.square().mean() / size.square().mean()).sqrt()),
            "rank_correlation": float(spearmanr(cross_std.numpy(), size.numpy()).statistic),
        }
