"""The arithmetic of the benchmarks: what they compute rather than measure."""

import importlib
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from test_compile import write_checkpoint
from test_frames import SHARED
from test_uncertainty_posthoc import dataset as random_frames
from test_uncertainty_posthoc import fields_of, with_methods

from lmp_hl.predictions import predict
from lmp_hl.training.calibrate import collect_atoms
from lmp_hl.training.config import ModelConfig

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


def lennard_jones(rng, rattle, num_frames):
    frames = []
    for _ in range(num_frames):
        atoms = bulk("Ar", "fcc", a=5.3, cubic=True)
        atoms.rattle(rattle, rng=rng)
        atoms.calc = LennardJones(sigma=3.4, epsilon=0.1, rc=5.0)
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    return frames


def test_rows_are_trained_once_scored_and_written_and_missing_ones_give_a_reason(
    benchmark, monkeypatch, tmp_path, capsys
):
    script, training = benchmark("uncertainty"), benchmark("uncertainty_training")
    data, rows, tables = (benchmark(f"uncertainty_{n}") for n in ("data", "rows", "tables"))
    rng = np.random.default_rng(0)

    def split(folder):
        parts = {"train": (0.1, 12), "valid": (0.1, 6), "id": (0.1, 6), "ood": (0.3, 6)}
        return {name: lennard_jones(rng, *how) for name, how in parts.items()}

    monkeypatch.setitem(data.DATASETS, "argon", data.Dataset("", split, "argon"))
    monkeypatch.setattr(training, "HERE", tmp_path)
    (tmp_path / "uncertainty_argon.yaml").write_text(
        textwrap.dedent("""\
            name: argon
            data: {train: train.xyz, valid: valid.xyz}
            model: {cutoff: 5.0, channels: 4, hidden: 8, num_radial: 4}
            training: {epochs: 3, warmup_epochs: 1, num_threads: 1, accelerator: cpu}
            """)
    )
    refitted = rows.Method("refitted", "scalar", ("scales",))
    for name, method in (("refitted", refitted), ("none", replace(refitted, fit=("none",)))):
        monkeypatch.setitem(rows.METHODS, name, method)
    swag = {"method": "swag", "members": 2, "epochs": 2, "rank": 2}
    goes_on = {"init_from": "scalar", "epochs": 2, "posterior": swag}
    changes = {"model": {"head": "scalar", "uncertainty": []}, "training": goes_on}
    monkeypatch.setitem(rows.TRAININGS, "swag", changes)
    sampled = replace(rows.METHODS["swag"], members=2)
    monkeypatch.setitem(rows.METHODS, "swag", sampled)
    chosen = [rows.Row("argon", m, 0) for m in ("swag", "scalar", "refitted", "none")]
    out = tmp_path / "runs"

    def run(number, **how):
        found = script.run(chosen[:number], tmp_path, out, num_resamples=4, **how)
        return found, capsys.readouterr().out

    results, said = run(4)
    # four rows, one network and what goes on from it
    assert [said.count(f"training argon-{name}") for name in ("scalar", "swag")] == [1, 1]
    assert results["argon/swag/0"]["report"]["growth"]["ensemble_force_std"]["value"] > 0
    assert results["argon/swag/0"]["cost"]["training_over_twin"] > 1
    assert results["argon/none/0"]["failed"].startswith("no uncertainty method 'none'")
    first, second = (results[f"argon/{m}/0"] for m in ("scalar", "refitted"))
    assert first["report"]["sets"]["held out"]["num_frames"] == 6
    assert first["report"]["growth"]["force_std"]["value"] > 0
    assert first["report"] == second["report"]
    assert first["cost"]["seconds"] > first["cost"]["fit_seconds"] > 0
    assert first["cost"]["inference_over_twin"] > 0
    # nothing is done twice, and scoring needs no training
    assert run(3)[1] == ""
    again, said = run(2, score_only=True)
    assert "training" not in said
    assert again["argon/scalar/0"]["report"] == first["report"]

    paths = tables.write_results({"argon": list(results.values())}, tmp_path / "results")
    assert [p.suffix for p in paths] == [".md", ".json", ".png", ".png", ".png"]
    page = paths[0].read_text()
    assert str(tmp_path) not in page
    for text in (
        "| `refitted` |",
        "force_std",
        "*control* (of `scalar`) | num_atoms",
        "1 / 10 / 0.1",
    ):
        assert text in page
    assert "no uncertainty method 'none' in this version: `argon/none/0`" in page
    assert [r["row"] for r in json.loads(paths[1].read_text())] == [r.name for r in chosen]


def test_an_ensemble_is_the_mean_with_its_spread_right_on_validation_frames(benchmark):
    from lmp_hl.metrics import size_ratio
    from lmp_hl.predictions import Predictions

    script = benchmark("uncertainty")
    rng = np.random.default_rng(1)

    def members(num_frames, size):
        true = rng.normal(size=(4 * num_frames, 3))
        nothing = np.full((num_frames, 3, 3), np.nan)
        wrong = rng.normal(0, 2 * size, true.shape)  # what all members have in common
        controls = {"force_norm": np.ones(len(true)), "atom_energy": np.ones(len(true))}
        return [
            Predictions(
                np.full(num_frames, 4), np.full(num_frames, ""), np.zeros(num_frames),
                rng.normal(0, 0.5, num_frames), nothing, nothing,
                np.repeat(np.arange(num_frames), 4), np.full(len(true), 1), true,
                true + wrong + rng.normal(0, size, true.shape), {}, {}, controls,
            )
            for _ in range(5)
        ]  # fmt: skip

    sets = {"ID": members(500, 0.1), "valid": members(500, 0.1), "OOD": members(500, 0.3)}
    found = script.ensemble([{n: p[k] for n, p in sets.items()} for k in range(5)])
    for name, parts in sets.items():
        forces = np.stack([p.forces for p in parts])
        np.testing.assert_allclose(found[name].forces, forces.mean(0))
        covariance = [np.cov(forces[:, atom].T) for atom in range(20)]
        raw = found[name].fields["ensemble_raw_std"][:20]
        np.testing.assert_allclose(raw, [np.sqrt(np.trace(c) / 3) for c in covariance])
        energies = np.stack([p.energy for p in parts]).std(0, ddof=1)
        np.testing.assert_allclose(found[name].energy_std["ensemble_energy_std"], energies)
    valid, near, far = (found[n] for n in ("valid", "ID", "OOD"))
    assert size_ratio(valid.fields["ensemble_force_std"], valid.error) == pytest.approx(1)
    # 6000 components either side: 1 % each
    for p in (near, far):
        assert size_ratio(p.fields["ensemble_force_std"], p.error) == pytest.approx(1, abs=0.05)


def test_heads_of_a_trained_committee_are_the_members_of_an_ensemble(benchmark, tmp_path):
    script = benchmark("uncertainty")
    path = write_checkpoint(tmp_path / "model.ckpt", head="committee", num_members=3)
    model = ModelConfig(**torch.load(path, weights_only=True)["model"])
    config = SimpleNamespace(output_dir=tmp_path, model=model)
    frames = random_frames(4).frames
    networks = script.members_of(script.METHODS["committee_forces"], [config])
    committee, *heads = (
        predict(of_one, frames, "4 frames")
        for of_one in (script.unfitted(config, ()), *(network.model for network in networks))
    )
    found = script.ensemble([{"valid": predictions} for predictions in heads])["valid"]
    assert len(heads) == 3
    # forces of float32
    np.testing.assert_allclose(found.forces, committee.forces, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.energy, committee.energy, rtol=1e-6)
    spread = np.stack([p.forces for p in heads]).std(0, ddof=1)
    raw = found.fields["ensemble_raw_std"]
    np.testing.assert_allclose(raw, np.sqrt((spread**2).mean(1)), rtol=1e-5)
    assert raw.min() > 0


def test_every_row_has_a_method_and_every_method_a_training(benchmark):
    rows, data = benchmark("uncertainty_rows"), benchmark("uncertainty_data")
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)
    assert {row.method for row in rows.ROWS} == set(rows.METHODS)
    assert {method.training for method in rows.METHODS.values()} <= set(rows.TRAININGS)
    datasets = {row.dataset for row in rows.ROWS}
    assert datasets <= set(data.DATASETS)
    for dataset in datasets:
        assert (BENCHMARKS / f"uncertainty_{data.DATASETS[dataset].settings}.yaml").is_file()


@pytest.mark.parametrize("name", ["3bpa", "acac", "si", "nbmotaw"])
def test_sets_for_development_have_no_test_frames(benchmark, name):
    """Nor does one frame stand in two of their parts."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    data = benchmark("uncertainty_data")
    developed = next(n for n in data.DEVELOPMENT if n.startswith(name))

    def frames(dataset, parts):
        found = data.DATASETS[dataset]
        split = found.split(SHARED / found.folder)
        chosen = [a for part in parts for a in split[part]]
        return [(a.positions.tobytes(), a.cell[:].tobytes(), str(a.symbols)) for a in chosen]

    tested = frames(name, ["id", "ood"] if name != "acac" else ["id"])
    used = frames(developed, ["train", "valid", "id", "ood"])
    assert len(used) > 100 and len(set(used)) == len(used)
    assert not set(used) & set(tested)


@pytest.fixture
def frozen(benchmark):
    """What benchmarks/uncertainty_form.py works on, of a random network."""
    script = benchmark("uncertainty_form")
    potential = with_methods(names=("scales",))
    numbers = {"train": 8, "valid": 8, "ID": 5, "OOD": 4}
    parts = {
        name: collect_atoms(potential, random_frames(number, seed=k))
        for k, (name, number) in enumerate(numbers.items())
    }
    (method,) = potential.uncertainty_methods()
    method.fit(parts["train"], parts["valid"])
    return potential, script.Frozen(method, parts)


def test_the_form_called_default_is_that_of_the_default(benchmark, frozen):
    script = benchmark("uncertainty_form")
    potential, network = frozen
    expected = {n: fields_of(potential, network.parts[n])["force_std"] for n in ("ID", "OOD")}
    for other in ("undamped", "read", "own"):  # leave nothing behind
        assert not torch.allclose(script.sizes(script.FORMS[other], network)["ID"], expected["ID"])
    found = script.sizes(script.FORMS["default"], network)
    for name, std in found.items():
        torch.testing.assert_close(std, expected[name], rtol=1e-6, atol=0)


def test_a_form_leads_by_what_its_likelihood_is_better(benchmark, frozen, monkeypatch):
    script = benchmark("uncertainty_form")
    _, network = frozen
    sizes, forms = script.sizes, script.FORMS
    other = next(f for n, f in forms.items() if n not in ("default", "own"))
    chosen = {"default": forms["default"], "same": forms["default"], "wrong": forms["own"]}
    chosen["worse"] = other

    def too_wide(form, network):
        factor = 1e3 if form is forms["own"] else 1e4 if form is other else 1.0
        return {n: std * factor for n, std in sizes(forms["default"], network).items()}

    monkeypatch.setattr(script, "sizes", too_wide)
    found = script.score(network, chosen)
    leads = script.leads({"set/0": found, "set/1": found, "other/0": found})
    assert leads["same"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    # where e^2 / 2 s^2 is nothing any more only ln s counts
    step = leads["worse"]["value"] - leads["wrong"]["value"]
    assert step == pytest.approx(-np.log(10), abs=1e-4)
    # ln 1000, less what e^2 / 2 s^2 was: 1/2 where the size is right, more where it is too small
    assert -np.log(1000) < leads["wrong"]["value"] < leads["wrong"]["high"] < -4.9


def test_noise_on_labels_has_its_size_and_leaves_the_structures(benchmark, tmp_path):
    data = benchmark("uncertainty_data")
    frames = lennard_jones(np.random.default_rng(2), 0.1, 200)
    write(tmp_path / "train.xyz", frames, format="extxyz")
    noisy = read(data.write_noisy(tmp_path, 20.0), ":")
    pairs = list(zip(read(tmp_path / "train.xyz", ":"), noisy, strict=True))
    assert all((a.positions == b.positions).all() for a, b in pairs)
    forces = np.concatenate([a.get_forces() - b.get_forces() for a, b in pairs])
    energies = np.array([a.get_potential_energy() - b.get_potential_energy() for a, b in pairs])
    # 2400 components and 200 energies: relative errors 1.4 % and 5 %, four times
    assert forces.std() == pytest.approx(0.02, rel=0.06)
    assert energies.std() == pytest.approx(0.02, rel=0.2)
