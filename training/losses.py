"""What training minimises: cross-entropy of per-atom energies, squared errors of forces, stress.

Weights and units make the histogram and the scalar control comparable: the energy term of both has
the gradient of (dE)^2 / N in the mean energy of every atom, whatever the bin width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmp_hl import histogram, keys
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import AtomicEnergy, HistogramEnergy
from lmp_hl.uncertainty import Atoms
from lmp_hl.uncertainty.neighbors import neighbor_weights

from . import frames as fr
from .prediction import Prediction


def bootstrap_weights(batch: dict[str, Tensor], num_members: int) -> Tensor:
    """Weights (num_graphs, num_members) of the frames for each member: Poisson draws of mean 1.

    Drawn from a hash (splitmix64) of the frame's energy label and the member, so that a frame has
    the same weights in every epoch, batch and process.
    """
    x = batch[fr.TARGET_ENERGY].double().view(torch.int64).unsqueeze(1)
    x = x + (1 + torch.arange(num_members, device=x.device)) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    uniform = ((x >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
    counts = torch.arange(16, dtype=torch.float64, device=x.device)
    cumulative = torch.cumsum(torch.exp(-1.0 - torch.lgamma(counts + 1.0)), 0)
    return (uniform.unsqueeze(2) > cumulative).sum(2).double()


def energy_squared(
    prediction: Prediction, batch: dict[str, Tensor], frame_weights: Tensor | None = None
) -> Tensor:
    """Mean over frames, weighted by (num_graphs,) weights if given, of (dE)^2 / N, eV²."""
    residual = prediction.energy - batch[fr.TARGET_ENERGY]
    return weighted(residual.square() / batch[fr.NUM_ATOMS], frame_weights).mean()


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values times weights, if there are any."""
    return values if weights is None else values * weights


class HistogramLoss(NamedTuple):
    """loss: eV²; outside: share of targets beyond the support; spread: predicted / true error."""

    loss: Tensor
    outside: Tensor
    spread: Tensor


# smallest excess variance that latent shares tell apart, in units of w²
LATENT_FLOOR = 0.01


def energy_histogram(
    head: HistogramEnergy,
    prediction: Prediction,
    batch: dict[str, Tensor],
    latent: bool = False,
    frame_weights: Tensor | None = None,
) -> HistogramLoss:
    """HL-Gauss cross-entropy of every atom's histogram with its share of the frame's energy.

    Atom i's target is N(E_i + dE / N, sigma^2), E_i its detached mean and dE the frame's missing
    energy, in the bins that stand at its detached anchor. Its cross-entropy is multiplied by 2
    tau_i^2 (detached; the beta-NLL of Seitzer et al. 2022): the anchor then feels exactly the
    gradient of (dE)^2 / N, and atoms whose histogram has widened are not neglected. The mean over
    frames of the sum over atoms is returned, less the floor of the entropy.

    `latent`: instead of equal ones, the shares that an expectation-maximisation step expects of
    independent Gaussian atomic errors: share_i = v_i / sum_j v_j of the excess variances (at least
    LATENT_FLOOR), target N(E_i + share_i dE, sigma^2 + v_i (1 - share_i)), whose second term is
    what the sum leaves open. The pulls on the anchors add up to the same.

    A target beyond the support has no histogram: there the squared error takes over, with the same
    pull, and the share of such targets is returned for the log.
    """
    graph_of = batch[fr.BATCH]
    width = head.bin_width
    missing = (batch[fr.TARGET_ENERGY] - prediction.energy).detach()
    atoms = prediction.atoms
    probs = torch.softmax(atoms.logits.detach(), 1)
    excess = histogram.excess_variance(probs, head.offsets, head.sigma_in_bins, 1.0)
    share = (missing / batch[fr.NUM_ATOMS])[graph_of]
    kernel = head.sigma_in_bins**2
    open_variance = torch.zeros_like(excess)
    if latent:
        v = excess.clamp(min=LATENT_FLOOR)
        part = v / torch.zeros_like(missing, dtype=v.dtype).index_add(0, graph_of, v)[graph_of]
        share = missing[graph_of] * part
        open_variance = v * (1.0 - part)
    offset = (atoms.energy - atoms.anchor).detach().double()
    targets = ((offset + share) / width).to(atoms.logits.dtype)  # in bins from the anchor
    target_probs = head.target_probs(targets, (kernel + open_variance).sqrt())
    floor = head.entropy_floor() + 0.5 * torch.log1p(open_variance / head.kernel_variance())
    entropy = histogram.cross_entropy(target_probs, head.pulled_logits(atoms))
    scale = 2.0 * atoms.tau2.detach()
    squared = (atoms.energy.double() - (atoms.energy.detach() + share)).square()
    outside = histogram.outside_support(targets, head.edges)
    per_atom = torch.where(outside, squared, scale * (entropy - floor).double())
    if frame_weights is not None:
        per_atom = per_atom * frame_weights[graph_of]
    excess = excess.clamp(min=0.0).mean()
    return HistogramLoss(
        per_atom.sum() / batch[fr.NUM_ATOMS].shape[0],
        outside.double().mean(),
        (excess / targets.square().mean().clamp(min=1e-12)).sqrt(),
    )


def with_errors(
    prediction: Prediction, batch: dict[str, Tensor], cutoff: float, detach: bool
) -> Atoms:
    """The atoms of a batch as an uncertainty method's loss sees them.

    Args:
        prediction: of predict.
        batch: with targets.
        cutoff: of the potential, Å.
        detach: cut the gradients of features, energies and errors.
    """

    def cut(value: Tensor) -> Tensor:
        return value.detach() if detach else value

    if prediction.features is None:
        raise ValueError("the prediction has no features; make it with predict()")
    return Atoms(
        Features(*map(cut, prediction.features)),
        AtomicEnergy(*map(cut, prediction.atoms)),
        batch[keys.SPECIES],
        batch[fr.BATCH],
        cut(batch[fr.TARGET_FORCES] - prediction.forces),
        cut(batch[fr.TARGET_ENERGY] - prediction.energy),
        batch[keys.EDGE_INDEX],
        neighbor_weights(batch[keys.EDGE_VECTORS], cutoff),
    )


def forces_squared(
    prediction: Prediction, batch: dict[str, Tensor], frame_weights: Tensor | None = None
) -> Tensor:
    """Mean squared error of a force component, (eV/Å)²; weighted by frame if asked for."""
    squared = (prediction.forces - batch[fr.TARGET_FORCES]).square()
    if frame_weights is not None:
        squared = squared * frame_weights[batch[fr.BATCH]].unsqueeze(1)
    return squared.mean()


def stress_squared(prediction: Prediction, batch: dict[str, Tensor]) -> Tensor:
    """Mean over virial components of (V d sigma)^2 / N, eV²; 0 if no frame has a stress."""
    target = batch[fr.TARGET_STRESS]
    known = torch.isfinite(target)
    scale = (batch[fr.VOLUME] / batch[fr.NUM_ATOMS].sqrt()).reshape(-1, 1, 1)
    error = torch.where(known, (prediction.stress - torch.nan_to_num(target)) * scale, 0.0)
    return error.square().sum() / known.sum().clamp(min=1)
