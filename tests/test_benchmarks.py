"""The arithmetic of the benchmarks: what they compute rather than measure."""

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark script as a module, by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_drift_is_found_within_its_error_in_correlated_noise(benchmark):
    slope = benchmark("drift").slope
    time = np.arange(0, 20, 0.02)  # ps
    off = []
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=len(time) + 9)
        noise = np.convolve(noise, np.ones(10) / 10, "valid")  # correlated over 0.2 ps
        value, error = slope(time, 0.03 * time + noise, 1.0)
        off.append((value - 0.03) / error)
    # of Student's t with 18 degrees of freedom 5 % lie beyond 2.1; 200 draws: 5 ± 1.5 %
    assert 0.01 < np.mean(np.abs(off) > 2.1) < 0.12


def test_drift_of_a_random_walk_is_found_within_its_error(benchmark):
    walk = benchmark("drift").walk
    time = np.arange(0, 20, 0.02)  # ps
    off = []
    for seed in range(200):
        steps = np.random.default_rng(seed).normal(size=len(time))
        value, error = walk(time, 0.03 * time + 0.1 * np.cumsum(steps), 1.0)
        off.append((value - 0.03) / error)
    # as above, 18 degrees of freedom
    assert 0.01 < np.mean(np.abs(off) > 2.1) < 0.12


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 3), (2, 2, 2)])
@pytest.mark.parametrize("reach", [3.0, 7.0])
def test_ghosts_are_those_counted_one_by_one(benchmark, grid, reach):
    scaling = benchmark("scaling")
    cells = (2, 3, 4)
    number = np.arange(-6, 11)
    corners = np.stack(np.meshgrid(number, number, number, indexing="ij"), -1).reshape(-1, 1, 3)
    basis = np.array(scaling.DIAMOND) / 4 + scaling.ORIGIN
    atoms = (scaling.LATTICE * (corners + basis)).reshape(-1, 3)
    size = scaling.LATTICE * np.array(cells) / grid
    ranks = scaling.traffic(cells, grid, reach)
    assert len(ranks) == np.prod(grid) and sum(rank.owned for rank in ranks) == 8 * 24
    for place, rank in zip(np.ndindex(grid), ranks, strict=True):
        low, high = place * size, (np.array(place) + 1) * size
        owned = ((atoms >= low) & (atoms < high)).all(1)
        seen = ((atoms >= low - reach) & (atoms < high + reach)).all(1)
        assert rank.owned == owned.sum() and rank.ghosts == seen.sum() - owned.sum()
        if min(grid) > 1:
            assert rank.remote == rank.ghosts
        if max(grid) == 1:
            assert rank.remote == 0


def test_atoms_near_a_cube_are_those_counted_one_by_one(benchmark):
    scaling = benchmark("scaling")
    number = np.arange(-5, 9)
    corners = np.stack(np.meshgrid(number, number, number, indexing="ij"), -1).reshape(-1, 1, 3)
    basis = np.array(scaling.DIAMOND) / 4 + scaling.ORIGIN
    atoms = (scaling.LATTICE * (corners + basis)).reshape(-1, 3)
    size = 3 * scaling.LATTICE
    nearest = np.clip(atoms, 0, size)
    expected = (np.linalg.norm(atoms - nearest, axis=1) < 5.0).sum()
    assert scaling.sites_near(size, 5.0) == expected > 8 * 27
