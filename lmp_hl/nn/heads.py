"""Heads: features per atom -> energy (histogram or scalar), force distribution, feature distance.

The energy head is trained; force distribution and distance are fitted afterwards on frozen features
(training/calibrate.py) and stay out of the energy and its gradient.
"""

import math
from typing import NamedTuple

import torch
from e3nn import o3
from torch import Tensor, nn

from .. import histogram
from .backbone import Features


class AtomicEnergy(NamedTuple):
    """Output of an energy head, in the network's own dtype, without reference energies.

    energy: (num_atoms,) eV, the histogram's expectation;
    anchor: (num_atoms,) eV, where the histogram stands;
    logits: (num_atoms, num_bins) of bins at anchor + offsets; (num_atoms, 0) for a scalar head;
    tau2: (num_atoms,) eV², curvature of the logits around the anchor; (0,) for a scalar head.
    """

    energy: Tensor
    anchor: Tensor
    logits: Tensor
    tau2: Tensor


class Readout(nn.Module):
    """Invariant features -> outputs through one hidden layer, with a bias per element."""

    def __init__(self, num_scalars: int, num_elements: int, num_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_scalars, num_out)
        self.hidden = nn.Linear(num_scalars, num_scalars)
        self.out = nn.Linear(num_scalars, num_out, bias=False)
        self.element_bias = nn.Embedding(num_elements, num_out)
        nn.init.zeros_(self.element_bias.weight)

    def forward(self, scalars: Tensor, species: Tensor) -> Tensor:
        """(num_atoms, num_scalars), (num_atoms,) -> (num_atoms, num_out)."""
        hidden = torch.nn.functional.silu(self.hidden(scalars))
        return self.linear(scalars) + self.out(hidden) + self.element_bias(species)


class ScalarEnergy(nn.Module):
    """The control: one number per atom, E_i = scale * m(h_i)."""

    scale: Tensor

    def __init__(self, num_scalars: int, num_elements: int) -> None:
        super().__init__()
        self.anchor = Readout(num_scalars, num_elements, 1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, scalars: Tensor, species: Tensor) -> AtomicEnergy:
        """Features of the atoms -> their energies."""
        energy = self.scale * self.anchor(scalars, species).squeeze(1)
        none = energy.new_zeros(0)
        return AtomicEnergy(energy, energy, energy.new_zeros((energy.shape[0], 0)), none)

    def entropy_floor(self) -> float:
        """A number has no entropy: 0 nats."""
        return 0.0


class HistogramEnergy(nn.Module):
    """HL-Gauss energy: a categorical distribution over bins that stand around an anchor m_i.

    Bin k of atom i has its centre at m_i + o_k; its logit is -(c_k - m_i)^2 / 2 tau_i^2 +
    delta_k(h_i), and the energy is the expectation E_i = m_i + sum_k softmax(z)_k o_k. Bins that
    move with the anchor need no support wide enough for every energy that may ever occur: w can
    follow the size of the errors (meV) instead of the spread of energies (eV), and far from the
    data the energy extrapolates as a scalar's would instead of saturating at the last bin. tau
    starts at the target kernel's width, delta at zero.
    """

    scale: Tensor
    bin_width: Tensor
    edges: Tensor
    offsets: Tensor

    def __init__(self, num_scalars: int, num_elements: int, num_bins: int, sigma: float) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.sigma_in_bins = sigma
        self.anchor = Readout(num_scalars, num_elements, 1)
        self.log_tau = nn.Linear(num_scalars, 1)
        self.delta = nn.Linear(num_scalars, num_bins)
        for layer in (self.log_tau, self.delta):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("bin_width", torch.ones((), dtype=torch.float64))  # eV
        # offsets in units of w: exact in any dtype, scaled by bin_width where they are used
        edges = histogram.uniform_edges(num_bins, 1.0).to(torch.get_default_dtype())
        self.register_buffer("edges", edges)
        self.register_buffer("offsets", histogram.bin_centers(self.edges))

    def set_bin_width(self, bin_width: float) -> None:
        """Set w, in eV; the support is num_bins * w wide."""
        histogram.uniform_edges(self.num_bins, bin_width)  # checks it
        self.bin_width.fill_(bin_width)

    @torch.jit.unused
    def shape_parameters(self) -> list[nn.Parameter]:
        """The weights of tau and delta, which shape the histogram around the anchor."""
        return [*self.log_tau.parameters(), *self.delta.parameters()]

    def kernel_variance(self) -> float:
        """Variance of a perfect prediction, sigma^2 + w^2 / 12, in units of w^2."""
        return self.sigma_in_bins**2 + 1.0 / 12.0

    def forward(self, scalars: Tensor, species: Tensor) -> AtomicEnergy:
        """Features of the atoms -> histograms and their expectations."""
        anchor = self.scale * self.anchor(scalars, species).squeeze(1)
        width = self.bin_width.to(anchor.dtype)
        # The bins stand at the anchor's present value; only the logits' parabola moves with its
        # gradient, so that cross-entropy pulls the anchor towards the target as a squared error
        # would, by (E - y) / tau^2.
        shift = (anchor - anchor.detach()) / width  # zero, with a gradient
        relative = self.offsets - shift.unsqueeze(1)
        # bounded: far from the data a width may not become 0 or infinite
        log_tau = 3.0 * torch.tanh(self.log_tau(scalars) / 3.0)
        tau2 = self.kernel_variance() * torch.exp(2.0 * log_tau)
        logits = self._shape(scalars) - relative.pow(2) / (2.0 * tau2)
        energy = self._expected(anchor, scalars, tau2)
        return AtomicEnergy(energy, anchor, logits, tau2.squeeze(1) * width.square())

    def _shape(self, scalars: Tensor) -> Tensor:
        # bounded: far from the data a free delta singles out one bin, and entropy says "certain"
        return 3.0 * torch.tanh(self.delta(scalars) / 3.0)

    def _expected(self, anchor: Tensor, scalars: Tensor, tau2: Tensor) -> Tensor:
        # here the bins move with the anchor: same value, gradient of the moving histogram
        logits = self._shape(scalars) - self.offsets.pow(2) / (2.0 * tau2)
        probs = torch.softmax(logits, dim=1)
        return anchor + self.bin_width.to(anchor.dtype) * histogram.expectation(probs, self.offsets)

    def entropy_floor(self) -> float:
        """Entropy of a perfect prediction, nats."""
        return histogram.entropy_floor(self.sigma_in_bins, 1.0)


def invariants(features: Features) -> Tensor:
    """Scalars and norms of tensors of degree >= 1, (num_atoms, num_scalars + l_max * channels)."""
    parts = [features.scalars]
    degree = 1
    while degree * degree < features.tensors.shape[0]:
        block = features.tensors[degree * degree : (degree + 1) * (degree + 1)]
        parts.append((block.pow(2).sum(0) + 1e-12).sqrt())
        degree += 1
    return torch.cat(parts, dim=1)


class FeatureDistance(nn.Module):
    """Mahalanobis distance of an atom's features from the training set's, per element.

    d_i = |L_z^T (x_i - mu_z)| / sqrt(num_features), divided by its median over the validation
    frames. x are the scalars and the norms of the tensors of degree >= 1; L_z L_z^T is the inverse
    of the regularised covariance.
    """

    mean: Tensor
    whiten: Tensor
    median: Tensor

    def __init__(self, num_scalars: int, channels: int, l_max: int, num_elements: int) -> None:
        super().__init__()
        self.l_max = l_max
        size = num_scalars + l_max * channels
        self.register_buffer("mean", torch.zeros(num_elements, size))
        self.register_buffer("whiten", torch.eye(size).repeat(num_elements, 1, 1))
        self.register_buffer("median", torch.ones(()))

    def forward(self, features: Features, species: Tensor) -> Tensor:
        """Features of the atoms -> (num_atoms,) distance; 1 is typical of validation frames."""
        x = invariants(features)
        out = torch.zeros_like(x[:, 0])
        for element in range(self.mean.shape[0]):
            rows = torch.nonzero(species == element).squeeze(1)
            white = (x.index_select(0, rows) - self.mean[element]) @ self.whiten[element]
            distance = (white.pow(2).mean(1) + 1e-12).sqrt()
            out = out.index_add(0, rows, distance)
        return out / self.median


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

    def __init__(
        self,
        num_scalars: int,
        channels: int,
        l_max: int,
        num_elements: int,
        num_scales: int = 32,
        num_bins: int = 128,
    ) -> None:
        super().__init__()
        num_invariants = num_scalars + l_max * channels
        self.location = nn.Linear(num_invariants, 1, bias=False)
        self.element_location = nn.Embedding(num_elements, 1)
        self.log_spread = nn.Parameter(torch.zeros(()))
        self.delta = nn.Parameter(torch.zeros(num_scales))
        self.shape_weight = nn.Parameter(torch.zeros(channels))
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
