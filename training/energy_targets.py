"""What the histograms of a frame's atoms are trained towards: atom by atom, or the frame at once.

Only energies of whole frames are known. The forms here differ in what of the atoms' histograms is
compared with a frame's energy. All are scaled so that, where the atoms' histograms are alike, every
anchor feels the gradient of (dE)^2 / N, so that a weight means the same in all of them.
"""

import math
from typing import Final

import torch
from torch import Tensor

from lmp_hl import histogram
from lmp_hl.nn.heads import HistogramEnergy

from . import frames as fr
from .losses import HistogramLoss, energy_histogram, weighted
from .prediction import Prediction

BEYOND: Final = 4.0  # squared error over variance beyond which `of_the_sum` widens no further
NAMES: Final = ("shares", "latent", "pooled_probs", "pooled_logits", "sum")


def energy_loss(
    name: str,
    head: HistogramEnergy,
    prediction: Prediction,
    batch: dict[str, Tensor],
    frame_weights: Tensor | None = None,
) -> HistogramLoss:
    """The cross-entropy of an energy head's histograms, eV², mean over frames.

    Args:
        name: one of NAMES. "shares" and "latent": see losses.energy_histogram. "pooled_probs",
            "pooled_logits": see pooled. "sum": see of_the_sum.
        head: of the prediction.
        prediction: of the batch.
        batch: with target energies.
        frame_weights: (num_graphs,); None: all 1.
    """
    if name == "sum":
        return of_the_sum(head, prediction, batch, frame_weights)
    if name in ("pooled_probs", "pooled_logits"):
        return pooled(head, prediction, batch, name == "pooled_logits", frame_weights)
    return energy_histogram(head, prediction, batch, name == "latent", frame_weights)


def pooled(
    head: HistogramEnergy,
    prediction: Prediction,
    batch: dict[str, Tensor],
    logits: bool,
    frame_weights: Tensor | None = None,
) -> HistogramLoss:
    """Cross-entropy of one pooled histogram per frame with the energy per atom; a control.

    Bins stand at every atom's own anchor, so what is pooled are the distributions of the residual
    e_i - m_i: the mean over the atoms of its probabilities, or the softmax of the mean of its
    logits. The target is the kernel at (E - sum_i m_i) / N, the scale 2 N times the mean of tau^2.

    The mean of probabilities wants every atom's residual to be that of the mean; the softmax of
    mean logits does not have the mean of the atoms' energies as its expectation. Hence neither is
    the likelihood of a sum, and the gradient is that of (dE)^2 / N for equal histograms only.
    """
    graph_of, num_atoms = batch[fr.BATCH], batch[fr.NUM_ATOMS]
    atoms = prediction.atoms

    def mean(values: Tensor) -> Tensor:
        zeros = values.new_zeros((len(num_atoms), *values.shape[1:]))
        total = zeros.index_add(0, graph_of, values)
        return total / num_atoms.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))

    pulled = head.pulled_logits(atoms)
    if logits:
        log_probs = torch.log_softmax(mean(pulled), 1)
    else:
        each = torch.log_softmax(pulled, 1)
        index = graph_of.unsqueeze(1).expand_as(each)
        lowest = each.new_full((len(num_atoms), each.shape[1]), -math.inf)
        top = lowest.scatter_reduce(0, index, each.detach(), "amax")
        log_probs = top + torch.log(mean(torch.exp(each - top[graph_of])))
    anchor = mean(atoms.anchor.detach().double())
    missing = (prediction.energy - batch[fr.TARGET_ENERGY]).detach() / num_atoms
    target = batch[fr.TARGET_ENERGY] / num_atoms - anchor
    target = (target / head.bin_width).to(log_probs.dtype)
    target_probs = head.target_probs(target, torch.full_like(target, head.sigma_in_bins))
    entropy = -(target_probs * log_probs).sum(1)
    scale = 2.0 * num_atoms * mean(atoms.tau2.detach())
    squared = (prediction.energy - batch[fr.TARGET_ENERGY]).square() / num_atoms
    outside = histogram.outside_support(target, head.edges)
    per_frame = torch.where(outside, squared, scale * (entropy - head.entropy_floor()).double())
    probs = log_probs.detach().exp()
    excess = histogram.excess_variance(probs, head.offsets, head.sigma_in_bins, 1.0)
    true = (missing / head.bin_width).square().mean().clamp(min=1e-12)
    spread = (excess.clamp(min=0.0).mean() / true).sqrt()
    return HistogramLoss(weighted(per_frame, frame_weights).mean(), outside.double().mean(), spread)


def of_the_sum(
    head: HistogramEnergy,
    prediction: Prediction,
    batch: dict[str, Tensor],
    frame_weights: Tensor | None = None,
) -> HistogramLoss:
    """Cross-entropy of the distribution of the frame's energy, the sum of independent atoms.

    The convolution of the atoms' histograms is taken as the Gaussian with its mean E and variance
    V = sum_i Var_i, which for tens of atoms it is but for its tails. The target has the variance
    that perfect atoms would add up to, N (sigma^2 + w^2 / 12):

        1/2 ln(2 pi V) + [dE^2 + N (sigma^2 + w^2 / 12)] / 2 V, less its floor, times 2 V / N,

    the factor detached, so that every atom's energy feels the gradient of (dE)^2 / N.
    """
    graph_of, num_atoms = batch[fr.BATCH], batch[fr.NUM_ATOMS]
    probs = torch.softmax(prediction.atoms.logits, 1)
    each = histogram.variance(probs, head.offsets).double()
    variance = torch.zeros_like(prediction.energy).index_add(0, graph_of, each)
    variance = variance * head.bin_width.square()
    least = num_atoms * head.kernel_variance() * head.bin_width.square()
    residual = prediction.energy - batch[fr.TARGET_ENERGY]
    fixed, squared = variance.detach(), residual.square()
    # an error far beyond the spread would widen every histogram by much more than the rate allows
    known = torch.minimum(squared.detach(), BEYOND * fixed)
    entropy = 0.5 * (torch.log(variance / least) + (known + least) / variance - 1.0)
    entropy = entropy + 0.5 * (squared - known) / fixed
    per_frame = 2.0 * fixed / num_atoms * entropy
    excess = (variance.detach() - least).clamp(min=0.0).mean()
    spread = (excess / residual.detach().square().mean().clamp(min=1e-24)).sqrt()
    loss = weighted(per_frame, frame_weights).mean()
    return HistogramLoss(loss, torch.zeros_like(spread), spread)
