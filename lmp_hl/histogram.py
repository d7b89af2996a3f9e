"""The one place that turns values into bins and bins into values, entropy and variance.

HL-Gauss (Imani & White 2018; Farebrother et al. 2024): a target y becomes the mass of N(y, sigma^2)
in each bin, renormalised on the support; the loss is the cross-entropy with softmax(logits); the
decoded value is the expectation of the bin centres. All functions are TorchScript-compatible and
work in the dtype and on the device of their arguments; lengths carry whatever unit the bin edges
carry.
"""

import math

import torch
from torch import Tensor


def uniform_edges(num_bins: int, bin_width: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Edges of `num_bins` equal bins centred on zero.

    Args:
        num_bins: at least 2.
        bin_width: w > 0, in the unit of the binned quantity.
        dtype: of the result.

    Returns:
        (num_bins + 1,) ascending edges from -num_bins * w / 2 to +num_bins * w / 2.

    Raises:
        ValueError: fewer than two bins or a width that is not positive and finite.
    """
    if num_bins < 2:
        raise ValueError(f"a histogram needs at least 2 bins, got {num_bins}; set model.num_bins")
    if not (bin_width > 0 and math.isfinite(bin_width)):
        raise ValueError(f"bin width must be positive, got {bin_width}; set model.bin_width")
    return (torch.arange(num_bins + 1, dtype=dtype) - num_bins / 2) * bin_width


def bin_centers(edges: Tensor) -> Tensor:
    """Midpoints of the bins, (num_bins,), from (num_bins + 1,) edges."""
    return 0.5 * (edges[1:] + edges[:-1])


def outside_support(targets: Tensor, edges: Tensor) -> Tensor:
    """Which targets lie outside [edges[0], edges[-1]], as booleans of the targets' shape.

    `hl_gauss` gives such a target the distribution of the nearest end of the support, so whoever
    builds a loss counts them with this function and reports the count.
    """
    return (targets < edges[0]) | (targets > edges[-1])


def hl_gauss(targets: Tensor, edges: Tensor, sigma: Tensor) -> Tensor:
    """Bin probabilities of N(target, sigma^2) renormalised on the support.

    p_k = [Phi((b_k - y)/sigma) - Phi((b_{k-1} - y)/sigma)]
          / [Phi((b_K - y)/sigma) - Phi((b_0 - y)/sigma)]

    Args:
        targets: (...,); those outside the support are taken at its nearest end (see
            outside_support).
        edges: (num_bins + 1,) ascending, uniform or not.
        sigma: kernel width in the unit of the edges; broadcasts against targets.

    Returns:
        (..., num_bins); rows sum to 1.
    """
    inside = torch.minimum(torch.maximum(targets, edges[0]), edges[-1]).unsqueeze(-1)
    z = (edges - inside) / (math.sqrt(2.0) * sigma.unsqueeze(-1))
    # erf differences lose all digits in the upper tail; erfc of the folded argument does not
    upper = torch.erfc(z.abs())
    right = torch.where(
        z[..., :-1] >= 0, upper[..., :-1] - upper[..., 1:], torch.zeros_like(z[..., 1:])
    )
    left = torch.where(
        z[..., 1:] <= 0, upper[..., 1:] - upper[..., :-1], torch.zeros_like(z[..., 1:])
    )
    across = torch.where(
        (z[..., :-1] < 0) & (z[..., 1:] > 0),
        2.0 - upper[..., 1:] - upper[..., :-1],
        torch.zeros_like(z[..., 1:]),
    )
    mass = left + right + across
    return mass / mass.sum(-1, keepdim=True)


def two_hot(targets: Tensor, edges: Tensor) -> Tensor:
    """All mass on the two bins whose centres enclose the target, so that their mean is the target.

    Args:
        targets: (...,); those beyond the outermost centres are taken there.
        edges: (num_bins + 1,) of uniform bins.

    Returns:
        (..., num_bins); rows sum to 1.
    """
    centers = bin_centers(edges)
    width = edges[1] - edges[0]
    inside = torch.minimum(torch.maximum(targets, centers[0]), centers[-1]).unsqueeze(-1)
    return torch.relu(1.0 - ((inside - centers) / width).abs())


def one_hot(targets: Tensor, edges: Tensor) -> Tensor:
    """All mass on the bin that holds the target; its centre is off by up to half a bin.

    Args:
        targets: (...,); those outside the support are taken at its nearest bin.
        edges: (num_bins + 1,) ascending, uniform or not.

    Returns:
        (..., num_bins).
    """
    bins = torch.searchsorted(edges[1:-1].contiguous(), targets.contiguous(), right=True)
    return torch.nn.functional.one_hot(bins, edges.shape[0] - 1).to(edges.dtype)


def cross_entropy(target_probs: Tensor, logits: Tensor) -> Tensor:
    """-sum_k p_k log softmax(logits)_k of each row, in nats; (..., num_bins) -> (...,)."""
    return -(target_probs * torch.log_softmax(logits, dim=-1)).sum(-1)


def expectation(probs: Tensor, centers: Tensor) -> Tensor:
    """Decoded value sum_k p_k c_k of each row; (..., num_bins) -> (...,), unit of the centres."""
    return (probs * centers).sum(-1)


def variance(probs: Tensor, centers: Tensor) -> Tensor:
    """Variance of the bin centres of each row; (..., num_bins) -> (...,), unit squared."""
    mean = expectation(probs, centers).unsqueeze(-1)
    return (probs * (centers - mean) ** 2).sum(-1)


def excess_variance(probs: Tensor, centers: Tensor, sigma: float, bin_width: float) -> Tensor:
    """Variance above that of a perfect prediction, Var(p) - sigma^2 - w^2/12; may be negative.

    Args:
        probs: (..., num_bins).
        centers: (num_bins,).
        sigma: standard deviation of the target kernel.
        bin_width: w of the uniform bins.

    Returns:
        (...,), unit of the centres squared.
    """
    return variance(probs, centers) - sigma**2 - bin_width**2 / 12.0


def entropy(probs: Tensor) -> Tensor:
    """Shannon entropy of each row, in nats.

    Args:
        probs: (..., num_bins); rows sum to 1. With uniform bins only: otherwise it follows the
            widths, use differential_entropy.

    Returns:
        (...,); 0 for one certain bin, log(num_bins) for a uniform row.
    """
    # not xlogy, which is several times slower; 0 log(tiny) is 0 as well
    return -(probs * torch.log(probs.clamp(min=1e-37))).sum(-1)


def entropy_of_logits(logits: Tensor) -> Tensor:
    """entropy(softmax(logits)), nats, without a logarithm per bin; (..., num_bins) -> (...,).

    log Z - sum_k p_k (z_k - max z) with Z = 1 / max p, both terms >= 0, so that nothing cancels;
    the softmax is all that is dear, and whoever compiles this has it from the energy.
    """
    probs = torch.softmax(logits, -1)
    below = logits - logits.amax(-1, keepdim=True)
    return -torch.log(probs.amax(-1)) - (probs * below).sum(-1)


def differential_entropy(probs: Tensor, edges: Tensor) -> Tensor:
    """Entropy of the piecewise constant density, H + sum_k p_k ln w_k, independent of the binning.

    Args:
        probs: (..., num_bins).
        edges: (num_bins + 1,), uniform or not.

    Returns:
        (...,) nats relative to one unit of the edges; may be negative.
    """
    return entropy(probs) + (probs * torch.log(edges[1:] - edges[:-1])).sum(-1)


def entropy_floor(sigma: float, bin_width: float) -> float:
    """Entropy of a perfect prediction in uniform bins, averaged over where in its bin it falls.

    The kernel's own entropy 1/2 ln[2 pi e (sigma^2/w^2 + 1/12)]: 1.200 nats at sigma = 0.75 w. The
    Gaussian form holds to 1e-3 nats for sigma >= 0.7 w.

    Args:
        sigma: standard deviation of the target kernel.
        bin_width: w, in the same unit.

    Returns:
        The floor in nats.
    """
    return 0.5 * math.log(2.0 * math.pi * math.e * ((sigma / bin_width) ** 2 + 1.0 / 12.0))


def mean_entropy_of_kernel(sigma: float) -> float:
    """Entropy of `hl_gauss` averaged over where in its bin the target falls, for any width.

    What entropy_floor approximates for sigma >= 0.7 w; here by quadrature.

    Args:
        sigma: standard deviation of the target kernel in bin widths.

    Returns:
        The floor in nats; 0 in the limit of a narrow kernel.
    """
    targets = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    edges = uniform_edges(2 * math.ceil(8.0 * sigma + 1.0), 1.0)
    probs = hl_gauss(targets, edges, torch.full_like(targets, sigma))
    return float(entropy(probs).mean())
