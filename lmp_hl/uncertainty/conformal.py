"""Bounds with a stated coverage from frames that a model was not trained on.

Atoms of one frame resemble each other, so frames are what is exchangeable, not atoms: the two-layer
hierarchical setting of Dunn, Wasserman & Ramdas (2022), "Distribution-Free Prediction Sets for
Two-Layer Hierarchical Models" (arXiv 1809.07441), with their pooled distribution function.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

# what is promised, by how many frames there are
COVERAGES: Final = (0.95, 0.9, 0.8)
MIN_FRAMES: Final = 4  # fewer have no bound at 80 %


def attainable_coverage(num_frames: int) -> float:
    """The largest of COVERAGES for which so many frames give a finite bound, 0 if there is none.

    The unseen frame has a weight of 1 / (num_frames + 1) and may be arbitrarily bad: 95 % needs 19
    frames, 90 % 9 and 80 % 4.
    """
    # a product: 1 - 0.95 is not 0.05 in floating point
    found = [c for c in COVERAGES if num_frames >= c * (num_frames + 1) - 1e-9]
    return max(found, default=0.0)


def pooled_quantile(scores: ArrayLike, frame: ArrayLike, coverage: float) -> float:
    """What the score of an atom of a new frame stays below with probability `coverage`.

    With k frames of n_j atoms the smallest s for which sum_j (share of frame j's scores <= s) >=
    (k + 1) coverage: every frame has the same weight, and the new one's lies at infinity.

    Args:
        scores: (num_atoms,), any unit.
        frame: (num_atoms,) label of the frame each belongs to.
        coverage: in (0, 1).

    Returns:
        In the unit of the scores; inf where there are too few frames for this coverage.
    """
    values = np.asarray(scores, dtype=np.float64)
    _, index, counts = np.unique(frame, return_inverse=True, return_counts=True)
    order = np.argsort(values)
    reached = np.cumsum(1.0 / counts[index[order]])
    k = int(np.searchsorted(reached, (len(counts) + 1) * coverage - 1e-9))
    return float(values[order[k]]) if k < len(values) else math.inf
