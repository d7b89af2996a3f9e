"""Do stress labels agree with the energies? A constant on the diagonal often keeps them apart.

At a fixed cutoff of plane waves the basis grows with the cell, which the energies of strained cells
contain and the stress of a single calculation does not (Pulay stress; Francis and Payne, J. Phys.:
Condens. Matter 2, 4395 (1990)). A potential has one energy: trained on both it fits neither.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .frames import Frame

Array = NDArray[np.float64]

MAX_STRAIN = 0.04  # of two cells that are compared: the trapezoidal rule's error goes as its cube
MIN_STRAIN = 1e-4
SAME_PLACE = 2e-3  # fractional coordinates that differ by less were strained with the cell


class StressOffset(NamedTuple):
    """What the labels lack: added to their diagonal they agree best with the energies."""

    value: float
    """eV/Å³, positive in tension."""

    before: float
    """Root mean square of (ΔE - V s:Δε) / V over the pairs of frames, s the stress, eV/Å³."""

    after: float
    """The same with the offset."""

    num_pairs: int

    @property
    def explains(self) -> bool:
        """Whether the offset is more than 1 meV/Å³ and removes most of the disagreement."""
        return abs(self.value) > 1e-3 and self.after < 0.5 * self.before


def stress_offset(frames: Sequence[Frame]) -> StressOffset | None:
    """The constant p that makes ΔE = V (s + p 1):Δε of pairs of frames that differ by a strain.

    s is the mean stress of the two frames (trapezoidal rule), V the volume of the mean cell h and
    Δε the symmetric part of h⁻¹ Δh, rows of h being cell vectors; p is the least-squares solution
    of all pairs.

    Args:
        frames: training frames; those without stress are left out.

    Returns:
        None if no two frames differ by a small strain of their volume alone.
    """
    groups: defaultdict[bytes, list[Frame]] = defaultdict(list)
    for frame in frames:
        if frame.stress is not None and frame.pbc.all():
            groups[_arrangement(frame)].append(frame)
    pairs = [
        _mismatch(a, b)
        for members in groups.values()
        for k, a in enumerate(members)
        for b in members[:k]
        if _strained(a, b)
    ]
    if not pairs:
        return None
    missing, dilation = np.array(pairs).T
    if not np.abs(dilation).max() > MIN_STRAIN:
        return None
    value = float(missing @ dilation / (dilation @ dilation))
    rest = missing - value * dilation
    return StressOffset(value, _rms(missing), _rms(rest), len(pairs))


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x * x)))


def _fractional(frame: Frame) -> Array:
    return np.linalg.solve(frame.cell.T, frame.positions.T).T


def _arrangement(frame: Frame) -> bytes:
    """Elements and coarse places, which differ between frames of dynamics: those make no pairs."""
    fractional = _fractional(frame)
    # bins that no simple fraction lies at the edge of
    bins = np.round(32 * (fractional - fractional[0]) + 0.37).astype(np.int64) % 32
    return frame.numbers.tobytes() + bins.tobytes()


def _gradient(a: Frame, b: Frame) -> Array:
    """h⁻¹ Δh with the mean cell h; (3, 3)."""
    return np.linalg.solve(0.5 * (a.cell + b.cell), b.cell - a.cell)


def _strained(a: Frame, b: Frame) -> bool:
    gradient = _gradient(a, b)
    rotation = np.abs(gradient - gradient.T).max()
    if not MIN_STRAIN < np.abs(gradient).max() < MAX_STRAIN or rotation > 1e-2 * MAX_STRAIN:
        return False
    moved = _fractional(a) - _fractional(b)
    return bool(np.abs(moved - np.round(moved)).max() < SAME_PLACE)


def _mismatch(a: Frame, b: Frame) -> tuple[float, float]:
    """The numbers (ΔE - V s:Δε) / V, eV/Å³, and tr Δε."""
    gradient, volume = _gradient(a, b), abs(float(np.linalg.det(0.5 * (a.cell + b.cell))))
    assert a.stress is not None
    assert b.stress is not None
    work = volume * float(np.tensordot(0.5 * (a.stress + b.stress), gradient))
    return (b.energy - a.energy - work) / volume, float(np.trace(gradient))
