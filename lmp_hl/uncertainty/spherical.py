"""Control: the force error's component along any direction as a histogram, logits on the sphere."""

import math
from typing import Any, ClassVar

import torch
from e3nn import o3
from torch import Tensor, nn

from .. import histogram, keys
from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy, invariants
from .base import Atoms, Method, Sizes
from .distance import FeatureDistance
from .penalised import minimise
from .per_element import error_scale

NUM_BINS = 64
BIN_WIDTH = 0.25  # in units of an atom's typical error: the support reaches 8 of them either way
SIGMA = 0.75  # of the target kernel, in bins
WIDTHS = (0.3, 1.0, 3.0)  # of the smooth functions of the bin that the logits are made of
REACH = 3.0  # bounds what features can add to a logit
FOLDS = 4
PENALTIES = (1e6, 1e-1, 1e-2, 1e-3)  # on the weights; the largest leaves one shape for all atoms
DEGREE = 17  # of the Lebedev rule, which then has 110 points
TRIADS = 2  # random orthonormal ones per atom that the logits are fitted on
SEED = 0


class ComponentHistograms(Method):
    """What heads that know only components of the force error have in common.

    The component y of atom i's error along a direction n has the probabilities softmax(z(n))_k in
    uniform bins around 0 in units of u_i = s_z d_i, d the atom's own feature distance (distance.py)
    and s_z the element's size: it grows away from the data as the default does, but for what that
    takes from neighbours and from symmetry. Logits are of low rank in k, z_k(n) = sum_r v_r(n)
    f_r(k), with

        f_r even: ln(1 + (c_k / a_r)^2), a Student t's logit;   f_r odd: c_k / sqrt(c_k^2 + a_r^2)

    for a few widths a_r, scaled to at most 1; subclasses say what the v_r are. Fitted to held-out
    errors by cross-entropy with their HL-Gauss targets (histogram.py) and a penalty on the weights,
    cross-validated over frames; one last factor gives force_std the errors' mean square.

    The force_std of a subclass is u_i sqrt(mean over its directions of sum_k p_k(n) c_k^2), with
    the kernel's own variance, 0.04 u^2, left in; the entropy is the mean over the directions of the
    differential entropy of y in eV/Å, H + ln(w u_i), nats. Errors beyond the support count as its
    ends; the card says how many.
    """

    NAME: ClassVar[str]

    mean: Tensor
    std: Tensor
    tensor_rms: Tensor
    element_size: Tensor
    centers: Tensor
    functions: Tensor
    cartesian: Tensor
    directions: Tensor
    weights: Tensor

    def __init__(self, sizes: Sizes, directions: Tensor, weights: Tensor) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.reach, self.bin_width = REACH, BIN_WIDTH
        self.distance = FeatureDistance(sizes)
        self.base = nn.Parameter(torch.zeros(len(WIDTHS)))  # of even functions, the same for all
        self.register_buffer("mean", torch.zeros(sizes.num_invariants))
        self.register_buffer("std", torch.ones(sizes.num_invariants))
        self.register_buffer("tensor_rms", torch.ones(2))  # of degrees 1 and 2
        self.register_buffer("element_size", torch.full((sizes.num_elements,), 0.1))  # eV/Å
        centers = histogram.bin_centers(histogram.uniform_edges(NUM_BINS, BIN_WIDTH))
        self.register_buffer("centers", centers.to(dtype))
        even = [torch.log1p((centers / width).square()) for width in WIDTHS]
        odd = [centers / (centers.square() + width**2).sqrt() for width in WIDTHS]
        functions = torch.stack([f / f.abs().max() for f in (*even, *odd)])
        self.register_buffer("functions", functions.to(dtype))
        cartesian = o3.wigner_3j(1, 1, 2, dtype=torch.float64) * math.sqrt(5.0)
        self.register_buffer("cartesian", cartesian.flatten(0, 1).to(dtype))  # (9, 5)
        self.register_buffer("directions", directions.to(dtype))  # (num_directions, 3)
        self.register_buffer("weights", (weights / weights.sum()).to(dtype))

    def coefficients(self, features: Features, directions: Tensor) -> Tensor:
        """v_r, (num_atoms, num_directions, 2 len(WIDTHS)), first of the even functions.

        Args:
            features: of the atoms.
            directions: unit vectors, (num_directions, 3), or (num_atoms, num_directions, 3) for
                each atom its own.
        """
        raise NotImplementedError

    def training_directions(self, num_atoms: int) -> Tensor:
        """Directions whose components are fitted, as `coefficients` takes them."""
        raise NotImplementedError

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward and the class."""
        unit = self.unit(features, species)
        logits = self.coefficients(features, self.directions) @ self.functions
        log_probs = torch.log_softmax(logits, -1)
        probs = torch.exp(log_probs)
        entropy = -(probs * log_probs).sum(-1) @ self.weights
        std = unit * (probs @ self.centers.square() @ self.weights).sqrt()
        return self.named(std, entropy + torch.log(self.bin_width * unit))

    def named(self, std: Tensor, entropy: Tensor) -> dict[str, Tensor]:
        """The fields by their names."""
        raise NotImplementedError

    def unit(self, features: Features, species: Tensor) -> Tensor:
        """u_i, (num_atoms,) eV/Å."""
        distance = self.distance(invariants(features), species)
        return distance * self.element_size.index_select(0, species)

    def standardized(self, features: Features) -> Tensor:
        """Invariants in units of their spread, (num_atoms, num_invariants)."""
        return (invariants(features) - self.mean) / self.std

    def bounded(self, x: Tensor) -> Tensor:
        """Within REACH either way."""
        return self.reach * torch.tanh(x / self.reach)

    def vectors(self, features: Features) -> Tensor:
        """Degree-1 features, (num_atoms, 3, channels)."""
        return features.tensors[1:4].permute(1, 0, 2) / self.tensor_rms[0]

    def quadrupoles(self, features: Features) -> Tensor:
        """Degree-2 features, (num_atoms, 5, channels)."""
        return features.tensors[4:9].permute(1, 0, 2) / self.tensor_rms[1]

    def harmonics(self, directions: Tensor) -> Tensor:
        """Y_2 in the basis of the features, of unit vectors (..., 3) -> (..., 5)."""
        pairs = directions.unsqueeze(-1) * directions.unsqueeze(-2)
        return pairs.flatten(-2) @ self.cartesian

    def fit(self, seen: Atoms, held: Atoms) -> dict[str, Any]:
        """See `calibrate`; the feature statistics are those of the training frames."""
        self.distance.fit(seen)
        return self.calibrate(held)

    @torch.no_grad()
    def calibrate(self, held: Atoms) -> dict[str, Any]:
        """Logits and sizes from validation frames; the penalty is that of the best cross-entropy.

        Returns:
            With the method's name before it: penalty; outside, the share of components beyond the
            support; of two frames or more, cross-validated, the rank correlation of force_std and
            raw_size_ratio, predicted to true root mean square before the last factor.

        Raises:
            ValueError: the model has no feature statistics that these atoms have a distance to.
        """
        from scipy.stats import spearmanr
        from sklearn.model_selection import GroupKFold

        self.distance.set_unit(held)
        self._reset(held)
        directions = self.training_directions(len(held.species))
        y = torch.matmul(directions, held.errors.unsqueeze(2)).squeeze(2)
        y = y / self.unit(held.features, held.species).unsqueeze(1)
        edges = histogram.uniform_edges(NUM_BINS, BIN_WIDTH)
        sigma = torch.full_like(y, SIGMA * BIN_WIDTH)
        # the cross-entropy is linear in the logits but for their normalisation, so all it needs
        # of a target is this
        statistics = histogram.hl_gauss(y, edges, sigma) @ self.functions.T

        start = {k: v.clone() for k, v in self.state_dict().items()}
        scores = torch.zeros(len(PENALTIES), dtype=torch.float64)
        stds = torch.zeros(len(PENALTIES), len(held.species), dtype=torch.float64)
        folds = (
            GroupKFold(min(FOLDS, held.num_frames)).split(y, groups=held.frame)
            if held.num_frames >= 2
            else ()
        )
        for fit_rows, test_rows in folds:
            self.load_state_dict(start)
            rows, left = torch.from_numpy(fit_rows), torch.from_numpy(test_rows)
            fitted, tested = held.rows(rows), held.rows(left)
            for k, penalty in enumerate(PENALTIES):  # each starts where the last one ended
                self._minimise(fitted, directions[rows], statistics[rows], penalty)
                loss = self._cross_entropy(tested.features, directions[left], statistics[left])
                scores[k] += loss * len(left)
                stds[k, left] = self._std(tested)
        best = int(scores.argmin())  # the largest penalty on a tie
        self.load_state_dict(start)
        for penalty in PENALTIES[: best + 1]:
            self._minimise(held, directions, statistics, penalty)
        size = held.errors.square().mean(1).sqrt()
        rmse = size.square().mean().sqrt()
        self.element_size.mul_(rmse / self._std(held).square().mean().sqrt())
        found = {
            "penalty": PENALTIES[best],
            "outside": float((y.abs() > edges[-1]).double().mean()),
        }
        if held.num_frames >= 2:
            rank = spearmanr(stds[best].numpy(), size.numpy()).statistic
            found["rank_correlation"] = float(rank)
            found["raw_size_ratio"] = float(stds[best].square().mean().sqrt() / rmse)
        return {f"{self.NAME}_{key}": value for key, value in found.items()}

    def _std(self, atoms: Atoms) -> Tensor:
        return self(atoms.features, atoms.energy, atoms.species)[f"{self.NAME}_force_std"]

    def _reset(self, held: Atoms) -> None:
        """Forget what was fitted; take scales of features and of errors from these atoms."""
        x, tensors = invariants(held.features), held.features.tensors
        std = x.std(0, correction=0)
        self.mean.copy_(x.mean(0))
        self.std.copy_(torch.where(std > 1e-6 * std.max(), std, std.max().clamp(min=1e-12)))
        rms = [tensors[a:b].square().mean().sqrt() for a, b in ((1, 4), (4, 9))]
        self.tensor_rms.copy_(torch.stack(rms).clamp(min=1e-12))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.base[-1] = -4.0
        distance = self.distance(x, held.species)
        num_elements = len(self.element_size)
        self.element_size.copy_(error_scale(distance, held.errors, held.species, num_elements))

    def _cross_entropy(self, features: Features, directions: Tensor, statistics: Tensor) -> Tensor:
        """Mean over atoms and directions of -sum_k target_k ln p_k, nats."""
        v = self.coefficients(features, directions)
        return (torch.logsumexp(v @ self.functions, -1) - (v * statistics).sum(-1)).mean()

    def _minimise(
        self, atoms: Atoms, directions: Tensor, statistics: Tensor, penalty: float
    ) -> None:
        # `base` is weakly tied to zero: its functions are nearly alike
        tied = [(p, 1e-6 if p is self.base else penalty) for p in self.parameters()]

        def loss() -> Tensor:
            return self._cross_entropy(atoms.features, directions, statistics)

        minimise(loss, tied, max_iter=50)


class SphericalLogits(ComponentHistograms):
    """Logits as functions on the sphere: alpha_k(scalars) + beta_k . n + gamma_k . Y_2(n).

    alpha and gamma are even and beta is odd under k <-> K - 1 - k (k from 0), hence p_k(-n) =
    p_{K-1-k}(n): the component along -n is minus that along n. With ComponentHistograms' functions
    of the bin, alpha_r = base_r + REACH tanh(a_r . x / REACH) of the invariants x, beta_r a vector
    and gamma_r a degree-2 tensor, linear in features of that degree and bounded together, so that
    no feature far from the data makes the distribution a needle. Fitted along random orthonormal
    triads.

    Exact: covariance, z(R n) of a turned structure is z(n), and with it p(n) along any direction.
    By quadrature: means over directions, with a Lebedev rule of 110 points (degree 17; the 55 of a
    half sphere, the others are their mirror images), whose error, within the bounds on the logits,
    is below 1e-6 of force_std; so far does force_std depend on orientation.

    The marginals fit no joint vector in general: a random vector has E[(n . dF)^2] = n^T S n, while
    here the second moment has parts of degree 4 and more. `second_moments` is the S of its parts of
    degree 0 and 2, symmetric, not always positive definite. scales.py has the joint density.

    At 55 directions of 64 bins an atom takes 14 kB in float32 while its fields are computed.
    """

    FIELDS = (keys.SPHERICAL_FORCE_STD, keys.SPHERICAL_FORCE_ENTROPY)
    NAME = "spherical"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, *_half_sphere())
        self.alpha = nn.Parameter(torch.zeros(sizes.num_invariants, len(WIDTHS)))
        self.beta = nn.Parameter(torch.zeros(sizes.channels, len(WIDTHS)))
        self.gamma = nn.Parameter(torch.zeros(sizes.channels, len(WIDTHS)))

    def named(self, std: Tensor, entropy: Tensor) -> dict[str, Tensor]:
        """The fields by their names."""
        return {keys.SPHERICAL_FORCE_STD: std, keys.SPHERICAL_FORCE_ENTROPY: entropy}

    def coefficients(self, features: Features, directions: Tensor) -> Tensor:
        """See ComponentHistograms."""
        alpha = self.base + self.bounded(self.standardized(features) @ self.alpha)
        # (num_atoms, 2l + 1, len(WIDTHS))
        beta = shortened(self.vectors(features) @ self.beta, 0.5 * self.reach)
        gamma = shortened(self.quadrupoles(features) @ self.gamma, 0.5 * self.reach)
        even = alpha.unsqueeze(1) + torch.matmul(self.harmonics(directions), gamma)
        return torch.cat([even, torch.matmul(directions, beta)], -1)

    def training_directions(self, num_atoms: int) -> Tensor:
        """TRIADS random orthonormal triads of each atom, (num_atoms, 3 TRIADS, 3)."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (num_atoms, TRIADS, 3, 3)
        triads, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        return triads.flatten(1, 2)

    def second_moments(self, features: Features, species: Tensor) -> Tensor:
        """S, (num_atoms, 3, 3) (eV/Å)^2, with n^T S n nearest to E[y(n)^2] over the sphere.

        (15 <E[y^2] n n^T> - 3 <E[y^2]> 1) / 2 with means over directions; force_std^2 = tr S / 3.
        """
        logits = self.coefficients(features, self.directions) @ self.functions
        square = torch.softmax(logits, -1) @ self.centers.square()
        square = square * self.unit(features, species).square().unsqueeze(1) * self.weights
        pairs = self.directions.unsqueeze(2) * self.directions.unsqueeze(1)
        eye = torch.eye(3, dtype=square.dtype, device=square.device)
        return torch.tensordot(square, 7.5 * pairs - 1.5 * eye, dims=1)


def shortened(x: Tensor, reach: float) -> Tensor:
    """(num_atoms, 2l + 1, n), all of an atom shortened together to a norm below `reach`."""
    norm = x.pow(2).sum((1, 2), keepdim=True)
    return x / (1.0 + norm / reach**2).sqrt()


def _half_sphere() -> tuple[Tensor, Tensor]:
    """Points (55, 3) of the Lebedev rule, one of each pair of opposite ones, and their weights."""
    from scipy.integrate import lebedev_rule

    points, weights = (torch.from_numpy(x) for x in lebedev_rule(DEGREE))
    x, y, z = points
    upper = (z > 1e-9) | (z.abs() <= 1e-9) & ((y > 1e-9) | (y.abs() <= 1e-9) & (x > 0))
    return points.T[upper].contiguous(), weights[upper]
