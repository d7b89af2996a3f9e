"""Energy heads: features of an atom -> its energy, as a histogram or as a number."""

import math
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn

from .. import histogram, keys
from .backbone import Features


class AtomicEnergy(NamedTuple):
    """Output of an energy head, in the network's own dtype, without reference energies.

    energy: (num_atoms,) eV, the histogram's expectation;
    anchor: (num_atoms,) eV, where the histogram stands;
    logits: (num_atoms, num_bins) of bins at anchor + offsets; (num_atoms, 0) for a scalar head;
    tau2: (num_atoms,) eV², curvature of the logits around the anchor; (0,) for a scalar head;
    hidden: (num_atoms, num_scalars) activations that, beside the scalars, the last layer weights.

    A committee's anchor, logits, tau2 and hidden have a dimension of members after that of atoms.
    """

    energy: Tensor
    anchor: Tensor
    logits: Tensor
    tau2: Tensor
    hidden: Tensor


class Readout(nn.Module):
    """Invariant features -> outputs through one hidden layer, with a bias per element."""

    def __init__(self, num_scalars: int, num_elements: int, num_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_scalars, num_out)
        self.hidden = nn.Linear(num_scalars, num_scalars)
        self.out = nn.Linear(num_scalars, num_out, bias=False)
        self.element_bias = nn.Embedding(num_elements, num_out)
        nn.init.zeros_(self.element_bias.weight)

    def activations(self, scalars: Tensor) -> Tensor:
        """Of the hidden layer, (num_atoms, num_scalars) -> same shape."""
        return torch.nn.functional.silu(self.hidden(scalars))

    def forward(self, scalars: Tensor, hidden: Tensor, species: Tensor) -> Tensor:
        """Scalars, their activations and (num_atoms,) species -> (num_atoms, num_out)."""
        return self.linear(scalars) + self.out(hidden) + self.element_bias(species)


class EnergyHead(nn.Module):
    """What is asked of an energy head besides its forward, (scalars, species) -> AtomicEnergy."""

    FIELDS: ClassVar[tuple[str, ...]] = ()  # names of keys.py that `fields` returns

    @torch.jit.unused
    def parts(self) -> list[Any]:
        """The heads that are trained on their own energies: itself, or a committee's members."""
        return [self]

    @torch.jit.unused
    def fit(self, seen: Any, held: Any) -> dict[str, Any]:
        """What its fields need from frozen features; arguments and result as Method.fit has."""
        return {}


class ScalarEnergy(EnergyHead):
    """The control: one number per atom, E_i = scale * m(h_i)."""

    scale: Tensor

    def __init__(self, num_scalars: int, num_elements: int) -> None:
        super().__init__()
        self.anchor = Readout(num_scalars, num_elements, 1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, scalars: Tensor, species: Tensor) -> AtomicEnergy:
        """Features of the atoms -> their energies."""
        hidden = self.anchor.activations(scalars)
        energy = self.scale * self.anchor(scalars, hidden, species).squeeze(1)
        none = energy.new_zeros(0)
        return AtomicEnergy(energy, energy, energy.new_zeros((energy.shape[0], 0)), none, hidden)

    def fields(self, energy: AtomicEnergy, species: Tensor) -> dict[str, Tensor]:
        """A number says nothing about itself."""
        out: dict[str, Tensor] = {}
        return out


TARGETS: Final = ("hlgauss", "two_hot", "one_hot")  # kernels of the histogram's target


class HistogramEnergy(EnergyHead):
    """HL-Gauss energy: a categorical distribution over bins that stand around an anchor m_i.

    Bin k of atom i has its centre at m_i + o_k; its logit is -(c_k - m_i)^2 / 2 tau_i^2 +
    delta_k(h_i), and the energy is the expectation E_i = m_i + sum_k softmax(z)_k o_k. Bins that
    move with the anchor need no support wide enough for every energy that may ever occur: w can
    follow the size of the errors (meV) instead of the spread of energies (eV), and far from the
    data the energy extrapolates as a scalar's would instead of saturating at the last bin. tau
    starts at the target kernel's width, delta at zero.

    `target` is the kernel it is trained towards: N(y, sigma^2) integrated over the bins, or as
    controls all mass on the two bins around y or on the one that holds it (sigma has no effect).
    """

    FIELDS: ClassVar[tuple[str, ...]] = (keys.ENTROPY, keys.EXCESS_ENTROPY)

    scale: Tensor
    bin_width: Tensor
    edges: Tensor
    offsets: Tensor

    def __init__(
        self,
        num_scalars: int,
        num_elements: int,
        num_bins: int,
        sigma: float,
        target: str = "hlgauss",
    ) -> None:
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"model.target must be one of {', '.join(TARGETS)}, got {target!r}")
        self.num_bins = num_bins
        self.target = target
        self.sigma_in_bins, self.floor = _kernel(target, sigma)
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
        """Mean square distance of the target's mass from the target, in units of w^2.

        Averaged over where in its bin it falls: sigma^2 + 1/12; two bins 1/6, one bin 1/12.
        """
        return self.sigma_in_bins**2 + 1.0 / 12.0

    def target_probs(self, targets: Tensor, sigma: Tensor) -> Tensor:
        """Kernels at `targets` (n,), in bins from the anchor -> (n, num_bins); sigma in bins."""
        if self.target == "two_hot":
            return histogram.two_hot(targets, self.edges)
        if self.target == "one_hot":
            return histogram.one_hot(targets, self.edges)
        return histogram.hl_gauss(targets, self.edges, sigma)

    def forward(self, scalars: Tensor, species: Tensor) -> AtomicEnergy:
        """Features of the atoms -> histograms and their expectations."""
        hidden = self.anchor.activations(scalars)
        anchor = self.scale * self.anchor(scalars, hidden, species).squeeze(1)
        # bounded: far from the data a width may not become 0 or infinite
        log_tau = 3.0 * torch.tanh(self.log_tau(scalars) / 3.0)
        tau2 = self.kernel_variance() * torch.exp(2.0 * log_tau)
        # bounded: far from the data a free delta singles out one bin, and entropy says "certain"
        shape = 3.0 * torch.tanh(self.delta(scalars) / 3.0)
        logits = shape - self.offsets.pow(2) / (2.0 * tau2)
        width = self.bin_width.to(anchor.dtype)
        mean = histogram.expectation(torch.softmax(logits, -1), self.offsets)
        tau2 = tau2.squeeze(1) * width.square()
        return AtomicEnergy(anchor + width * mean, anchor, logits, tau2, hidden)

    @torch.jit.unused
    def pulled_logits(self, atoms: AtomicEnergy) -> Tensor:
        """The logits with a gradient in the anchor, for a loss whose target stands still.

        Bins move with the anchor, and so would a target that is given in them. Here they stand
        where the anchor is now and only the parabola moves, so that cross-entropy pulls the anchor
        towards the target as a squared error would, by (E - y) / tau^2. The values are the same.
        """
        width = self.bin_width.to(atoms.anchor.dtype)
        shift = (atoms.anchor - atoms.anchor.detach()) * (width / atoms.tau2)  # zero
        return atoms.logits + self.offsets * shift.unsqueeze(1)

    def fields(self, energy: AtomicEnergy, species: Tensor) -> dict[str, Tensor]:
        """Entropy of each atom's histogram and how far it is above the floor, nats."""
        entropy = histogram.entropy_of_logits(energy.logits)
        return {keys.ENTROPY: entropy, keys.EXCESS_ENTROPY: entropy - self.entropy_floor()}

    def entropy_floor(self) -> float:
        """Entropy of a perfect prediction, nats."""
        return self.floor


def _kernel(target: str, sigma: float) -> tuple[float, float]:
    """Standard deviation, in bins, and mean entropy, in nats, of a target's mass."""
    if target == "one_hot":
        return 0.0, 0.0
    if target == "two_hot":  # at a distance d: variance d (1 - d), on average 1/6 = 1/12 + 1/12
        return math.sqrt(1.0 / 12.0), 0.5
    wide = sigma >= 0.7  # the closed form is exact enough
    floor = histogram.entropy_floor(sigma, 1.0) if wide else histogram.mean_entropy_of_kernel(sigma)
    return sigma, floor


def invariants(features: Features) -> Tensor:
    """Scalars and norms of tensors of degree >= 1, (num_atoms, num_scalars + l_max * channels)."""
    parts = [features.scalars]
    degree = 1
    while degree * degree < features.tensors.shape[0]:
        block = features.tensors[degree * degree : (degree + 1) * (degree + 1)]
        parts.append((block.pow(2).sum(0) + 1e-12).sqrt())
        degree += 1
    return torch.cat(parts, dim=1)
