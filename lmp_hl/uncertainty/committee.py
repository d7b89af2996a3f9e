"""A committee of categorical energy heads on one backbone; its disagreement is its uncertainty."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import histogram, keys
from ..nn.heads import AtomicEnergy, EnergyHead, HistogramEnergy, Readout
from .base import Atoms

SPREAD = 0.5  # of the logarithms of the members' first singular values


class SingularReadout(Readout):
    """A member of a singular-value ensemble: a readout that shares all but its singular values.

    The hidden layer's weights are U diag(s) V^T. U and V are the singular vectors that the first
    readout started with and stay as they are; s are the member's own, and the other layers are
    shared. After arXiv 2601.22068, which takes the vectors from a pretrained network; here the
    network is trained together with the members.
    """

    u: Tensor
    v: Tensor

    def __init__(self, shared: Readout) -> None:
        nn.Module.__init__(self)
        self.linear, self.out, self.element_bias = shared.linear, shared.out, shared.element_bias
        self.bias = shared.hidden.bias
        u, s, vh = torch.linalg.svd(shared.hidden.weight.detach())
        self.register_buffer("u", u)
        self.register_buffer("v", vh.T.contiguous())
        self.singular_values = nn.Parameter(s * torch.exp(SPREAD * torch.randn_like(s)))

    def activations(self, scalars: Tensor) -> Tensor:
        """See Readout.activations."""
        hidden = torch.matmul(torch.matmul(scalars, self.v) * self.singular_values, self.u.T)
        return torch.nn.functional.silu(hidden + self.bias)

    @torch.jit.unused
    @torch.no_grad()
    def dense(self) -> Readout:
        """An ordinary readout with weights of its own that gives the same."""
        elements = self.element_bias.weight.shape[0]
        out = Readout(self.linear.in_features, elements, self.linear.out_features)
        out = out.to(self.u)
        for name in ("linear", "out", "element_bias"):
            getattr(out, name).load_state_dict(getattr(self, name).state_dict())
        out.hidden.weight.copy_(self.u * self.singular_values @ self.v.T)
        out.hidden.bias.copy_(self.bias)
        return out


class CommitteeEnergy(EnergyHead):
    """Several HL-Gauss heads with anchors, widths and shapes of their own; E_i is their mean.

    Diversity comes from their initial weights, from forces trained on one member per frame in turn
    and, if asked for, from bootstrapped frames (lmp_hl.training.losses). Fields of an atom:

        committee_entropy     H[mean_a p_a], total
        aleatoric_entropy     mean_a H[p_a]
        mutual_information    their difference (BALD, Houlsby et al., arXiv 1112.5745), >= 0
        committee_energy_std  standard deviation over the members of their mean energies

    The histograms p_a stand in bins of equal width w at anchors of their own. Each is read as a
    density that is constant in its bins and integrated over common bins around the mean anchor: a
    bin's mass goes to the two common bins it overlaps, what is beyond the ends to the last ones.

    How the total is divided among atoms is a gauge that members may choose differently, so from
    every member's energies its mean over the training atoms of an element, less that of the
    committee, is taken first. Mutual information cannot exceed the logarithm of the number of
    members, and disagreement d well below the kernel's width s hardly shows in it, 1/2 ln(1 + d^2 /
    s^2); the standard deviation has neither limit. Atoms of a frame disagree coherently, so its
    square does not add up over atoms; its one factor is that of the frames' total energies.

    With `singular` the members' anchors are SingularReadouts: a cheaper, less diverse committee.
    """

    FIELDS = (
        keys.COMMITTEE_ENTROPY,
        keys.ALEATORIC_ENTROPY,
        keys.MUTUAL_INFORMATION,
        keys.COMMITTEE_ENERGY_STD,
    )

    centers: Tensor
    factor: Tensor
    bin_width: Tensor

    def __init__(
        self,
        num_members: int,
        num_scalars: int,
        num_elements: int,
        num_bins: int,
        sigma: float,
        target: str = "hlgauss",
        singular: bool = False,
    ) -> None:
        super().__init__()
        if num_members < 2:
            raise ValueError(f"model.num_members must be at least 2, got {num_members}")
        self.heads = nn.ModuleList(
            HistogramEnergy(num_scalars, num_elements, num_bins, sigma, target)
            for _ in range(num_members)
        )
        if singular:
            shared = self.parts()[0].anchor
            for head in self.parts():
                head.anchor = SingularReadout(shared)
        self.num_bins = num_bins
        self.register_buffer("centers", torch.zeros(num_elements, num_members))  # eV
        self.register_buffer("factor", torch.ones(()))
        # of all heads; the members' own are set with it
        self.register_buffer("bin_width", torch.ones((), dtype=torch.float64))

    @torch.jit.unused
    def parts(self) -> list[Any]:
        """The members."""
        return list(self.heads)

    @torch.jit.unused
    def split(self) -> list[HistogramEnergy]:
        """The members as ordinary heads that share nothing; see lmp_hl.ensemble.split_committee."""
        heads = copy.deepcopy(self.parts())
        for head in heads:
            if isinstance(head.anchor, SingularReadout):
                head.anchor = head.anchor.dense()
        return heads

    def set_bin_width(self, bin_width: float) -> None:
        """Set w of every member, in eV."""
        for head in self.parts():
            head.set_bin_width(bin_width)
        self.bin_width.fill_(bin_width)

    def members(self, scalars: Tensor, species: Tensor) -> list[AtomicEnergy]:
        """Output of every member."""
        out: list[AtomicEnergy] = []
        for head in self.heads:
            out.append(head(scalars, species))
        return out

    def combine(self, members: list[AtomicEnergy]) -> AtomicEnergy:
        """The mean energy; the rest with a dimension of members after the first."""
        return AtomicEnergy(
            torch.stack([member.energy for member in members], 1).mean(1),
            torch.stack([member.anchor for member in members], 1),
            torch.stack([member.logits for member in members], 1),
            torch.stack([member.tau2 for member in members], 1),
            torch.stack([member.hidden for member in members], 1),
        )

    def forward(self, scalars: Tensor, species: Tensor) -> AtomicEnergy:
        """Features of the atoms -> their energies, see `combine`."""
        return self.combine(self.members(scalars, species))

    def deviations(self, energy: AtomicEnergy, species: Tensor) -> Tensor:
        """(num_atoms, num_members): members' energies from their mean, in the common gauge, eV."""
        width = self.bin_width.to(energy.anchor.dtype)
        mean = histogram.expectation(torch.softmax(energy.logits, -1), self._offsets(energy.logits))
        means = energy.anchor + width * mean - self.centers.index_select(0, species)
        return means - means.mean(1, keepdim=True)

    def _offsets(self, like: Tensor) -> Tensor:
        """Bin centres in bins from the anchor."""
        k = torch.arange(self.num_bins, dtype=like.dtype, device=like.device)
        return k - 0.5 * (self.num_bins - 1)

    def common_bins(self, energy: AtomicEnergy, species: Tensor) -> Tensor:
        """Members' probabilities in bins that all share, (num_atoms, num_members, num_bins)."""
        anchor = energy.anchor - self.centers.index_select(0, species)
        shift = (anchor - anchor.mean(1, keepdim=True)) / self.bin_width.to(anchor.dtype)
        shift = shift.clamp(-1.0 * self.num_bins, 1.0 * self.num_bins).unsqueeze(2)
        # an atom whose features are not finite gets a nan here, not an index out of bounds
        lower = torch.nan_to_num(shift).floor()
        upper = shift - lower  # share of a bin's mass that goes to the upper of the two
        k = torch.arange(self.num_bins, device=shift.device)
        index = lower.long() + k
        probs = torch.softmax(energy.logits, -1)
        last = self.num_bins - 1
        out = torch.zeros_like(probs)
        out = out.scatter_add(2, index.clamp(0, last), probs * (1.0 - upper))
        return out.scatter_add(2, (index + 1).clamp(0, last), probs * upper)

    def fields(self, energy: AtomicEnergy, species: Tensor) -> dict[str, Tensor]:
        """See the class."""
        probs = self.common_bins(energy, species)
        total = histogram.entropy(probs.mean(1))
        aleatoric = histogram.entropy(probs).mean(1)
        deviations = self.deviations(energy, species)
        variance = deviations.pow(2).sum(1) / (deviations.shape[1] - 1.0)
        return {
            keys.COMMITTEE_ENTROPY: total,
            keys.ALEATORIC_ENTROPY: aleatoric,
            keys.MUTUAL_INFORMATION: (total - aleatoric).clamp(min=0.0),
            keys.COMMITTEE_ENERGY_STD: self.factor * (variance + 1e-20).sqrt(),
        }

    @torch.jit.unused
    @torch.no_grad()
    def fit(self, seen: Atoms, held: Atoms) -> dict[str, Any]:
        """The gauge from training atoms; then `calibrate`."""
        self.centers.zero_()
        deviations = self.deviations(seen.energy, seen.species)
        for element in range(len(self.centers)):
            rows = seen.species == element
            if rows.any():
                self.centers[element] = deviations[rows].mean(0)
        return self.calibrate(held)

    @torch.jit.unused
    @torch.no_grad()
    def calibrate(self, held: Atoms) -> dict[str, Any]:
        """The factor from the errors of the total energies of validation frames.

        Returns:
            Predicted / true root mean square error of the total energy before the factor.
        """
        deviations = self.deviations(held.energy, held.species)
        totals = deviations.new_zeros((held.num_frames, deviations.shape[1]))
        totals = totals.index_add(0, held.frame, deviations)
        variance = totals.square().sum(1) / (totals.shape[1] - 1)
        ratio = (variance.mean() / held.energy_errors.square().mean()).sqrt()
        self.factor.copy_(1.0 / ratio.clamp(min=1e-12))
        return {"committee_raw_energy_size_ratio": float(ratio)}
