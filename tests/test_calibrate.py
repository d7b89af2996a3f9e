"""Calibration of a model file on new frames, and what conformal bounds promise."""

import json
import zipfile

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import ELEMENTS, make_card, make_potential, make_structure
from scipy.stats import spearmanr
from test_compile import write_checkpoint

from lmp_hl import HLCalculator, cli, keys, model_file
from lmp_hl.ensemble import Ensemble
from lmp_hl.export import export_potential
from lmp_hl.training.calibrate import recalibrate
from lmp_hl.training.checkpoint import export_checkpoint
from lmp_hl.training.config import ModelConfig, to_yaml
from lmp_hl.uncertainty import conformal

NOISE = 0.3  # eV/Å


def labelled(model, num_frames, noise=NOISE, seed=100, energy_noise=0.0):
    """Structures with the model's own labels and Gaussian noise on forces and energies."""
    rng = np.random.default_rng(seed)
    calculator = HLCalculator(model)
    frames = []
    for k in range(num_frames):
        atoms = make_structure(ELEMENTS[:2], 12, seed=seed + k)
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        forces = forces + noise * rng.normal(size=forces.shape)
        if energy_noise:
            energy += energy_noise * rng.normal()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    return frames


def errors_of(model, frames):
    """Force error of every atom, and the model's results on every frame."""
    calculator, errors, results = HLCalculator(model), [], []
    for atoms in frames:
        moved = atoms.copy()
        moved.calc = calculator
        difference = moved.get_forces() - atoms.get_forces()
        errors.append(np.sqrt((difference**2).mean(1)))
        results.append(dict(calculator.results))
    return np.concatenate(errors), results


@pytest.fixture(scope="module")
def data(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "new.xyz"
    ase.io.write(path, labelled(tiny_model, 30))
    return path


@pytest.fixture(scope="module")
def new(tiny_model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("new") / "new.pt"
    recalibrate(tiny_model, data, out)
    return out


# calibrate ---------------------------------------------------------------------------------------
def test_energies_and_forces_stay_and_the_uncertainty_does_not(tiny_model, new, silicon):
    results = []
    for path in (tiny_model, new):
        atoms = silicon.copy()
        atoms.calc = HLCalculator(path)
        atoms.get_forces()
        results.append(atoms.calc.results)
    before, after = results
    for name in ("energies", "forces", "stress", "entropy"):
        assert np.array_equal(before[name], after[name]), name
    for name in ("force_std", "force_bound", "force_entropy", "distance"):
        assert np.abs(after[name] / before[name] - 1).max() > 0.05, name


def test_the_sizes_are_those_of_frames_it_has_not_seen(tiny_model, new):
    fresh = labelled(tiny_model, 40, seed=900)
    error, results = errors_of(new, fresh)
    std = np.concatenate([r["force_std"] for r in results])
    bound = np.concatenate([r["force_bound"] for r in results])
    # 1,440 components; the noise knows nothing of the distance, whose outliers weigh most here
    assert np.sqrt((std**2).mean()) == pytest.approx(NOISE, rel=0.25)
    assert np.sqrt((error**2).mean()) == pytest.approx(NOISE, rel=0.06)
    # coverage given these calibration frames scatters by sqrt(0.95 * 0.05 / 30) around the promise
    assert 0.95 - 0.08 < (error <= bound).mean() < 1.0
    flagged = np.concatenate([r["extrapolating"] for r in results])
    assert 0.0 < flagged.mean() < 0.05 + 0.08
    assert set(flagged) == {0.0, 1.0}
    distance = np.concatenate([r["distance"] for r in results])
    assert np.median(distance) == pytest.approx(1.0, rel=0.1)


def test_the_card_says_what_when_and_on_what(tiny_model, new, data, capsys):
    model = model_file.load(new)
    found = model.card["calibration"]
    assert (found["validation_frames"], found["validation_atoms"]) == (30, 360)
    assert found["force_rmse"] == pytest.approx(NOISE, rel=0.06)
    assert found["recalibrated"]["data"] == "new.xyz"
    assert found["recalibrated"]["of_model"] == model_file.load(tiny_model).hash
    assert found["recalibrated"]["date"].startswith("20")
    fields = set(model.fields) - {keys.ENERGY}
    assert set(found["ranking"]) <= fields and keys.FORCE_STD in found["ranking"]
    promise = model.card["conformal"]
    assert promise["coverage"] == 0.95
    # the part that LAMMPS and zip tools read says the same
    with zipfile.ZipFile(new) as archive:
        name = next(n for n in archive.namelist() if n.endswith("extra/card.json"))
        assert json.loads(archive.read(name)) == model.card
    assert cli.main(["info", str(new)]) == 0
    text = capsys.readouterr().out
    assert "on new.xyz" in text and "95 %" in text


def test_the_new_ranking_is_that_of_the_data(new, data):
    error, results = errors_of(new, ase.io.read(data, ":"))
    std = np.concatenate([r["force_std"] for r in results])
    ranking = model_file.load(new).card["calibration"]["ranking"]
    assert ranking["force_std"] == pytest.approx(spearmanr(std, error).statistic, abs=1e-6)


def test_the_card_has_what_the_largest_value_of_a_frame_stays_below(new, data):
    _, results = errors_of(new, ase.io.read(data, ":"))
    calibration = model_file.load(new).card["calibration"]
    coverage = calibration["largest_coverage"]
    assert coverage == 0.95 and len(results) >= 19
    for name in ("force_std", "distance", "entropy"):
        largest = np.sort([r[name].max() for r in results])
        # of k frames and a new one ceil((k + 1) 0.95) lie below
        expected = largest[int(np.ceil((len(largest) + 1) * coverage - 1e-9)) - 1]
        assert calibration["largest"][name] == pytest.approx(expected, rel=1e-6)


def test_without_out_the_file_itself_is_replaced(tiny_model, data, tmp_path, capsys):
    path = tmp_path / "hl.pt"
    path.write_bytes(tiny_model.read_bytes())
    part = tmp_path / "part.xyz"
    ase.io.write(part, ase.io.read(data, ":6"))
    assert cli.main(["calibrate", str(path), str(part)]) == 0
    assert "6 frames, 72 atoms: force error" in capsys.readouterr().out
    card = model_file.load(path).card
    assert card["calibration"]["validation_frames"] == 6
    assert card["conformal"]["coverage"] == 0.8
    assert {p.name for p in tmp_path.iterdir()} == {"hl.pt", "part.xyz"}


@pytest.mark.parametrize(
    "head, methods, force_fields, energy_fields",
    [
        ("scalar", ("mean_variance",), ["mean_variance_force_std"], ["mean_variance_energy_std"]),
        ("hlgauss", ("evidential",), ["evidential_force_std"], []),
        ("committee", (), [], ["committee_energy_std"]),
    ],
)
def test_trained_methods_and_committees_get_the_size_of_the_errors(
    head, methods, force_fields, energy_fields, tmp_path, capsys
):
    potential = make_potential("local", head, num_elements=2, dtype="float32", methods=methods)
    path = export_potential(potential, ELEMENTS[:2], make_card(head), tmp_path / "hl.pt")
    frames = labelled(path, 8, energy_noise=0.5)
    ase.io.write(tmp_path / "new.xyz", frames)
    words = ["calibrate", str(path), str(tmp_path / "new.xyz"), "--out", str(tmp_path / "new.pt")]
    assert cli.main(words) == 0
    assert "8 frames, 96 atoms: force error" in capsys.readouterr().out
    error, results = errors_of(tmp_path / "new.pt", frames)
    _, before = errors_of(path, frames)
    for k, atoms in enumerate(frames):
        for name in ("energies", "forces"):
            assert np.array_equal(before[k][name], results[k][name])
        atoms.info["error"] = atoms.get_potential_energy() - results[k]["energy"]
    for name in force_fields:
        std = np.concatenate([r[name] for r in results])
        assert np.sqrt((std**2).mean()) == pytest.approx(np.sqrt((error**2).mean()), rel=1e-3)
    for name in energy_fields:
        # of one file all atomic sizes change by the same factor
        ratio = np.concatenate([r[name] / b[name] for r, b in zip(results, before, strict=True)])
        assert ratio.std() < 1e-4 * abs(ratio.mean()) and abs(ratio.mean() - 1) > 0.01
    if name == "mean_variance_energy_std":
        total = sum((r[name] ** 2).sum() for r in results)
        truth = sum(atoms.info["error"] ** 2 for atoms in frames)
        assert total == pytest.approx(truth, rel=1e-2)
    card = model_file.load(tmp_path / "new.pt").card
    assert set(force_fields + energy_fields) <= set(card["calibration"]["ranking"])


def test_members_of_an_ensemble_are_calibrated_one_by_one_and_then_their_disagreement(
    tmp_path, capsys
):
    members = [
        make_potential(num_elements=2),
        make_potential("local", "scalar", num_elements=2, seed=1, methods=("scales", "density")),
    ]
    paths = [tmp_path / f"{name}.pt" for name in ("whole", "first", "second")]
    whole = paths[0]
    for potential, path in zip([Ensemble(members), *members], paths, strict=True):
        card = {**make_card(), "ensemble": {"members": [{}, {}]}} if path == whole else make_card()
        export_potential(potential, ELEMENTS[:2], card, path)
    frames = labelled(whole, 6, energy_noise=0.1)
    ase.io.write(tmp_path / "new.xyz", frames)
    for path in paths:
        out = path.with_suffix(".new.pt")
        words = ["calibrate", str(path), str(tmp_path / "new.xyz"), "--out", str(out)]
        assert cli.main(words) == 0
    assert "ensemble_force_std times" in capsys.readouterr().out
    of_whole, *of_members = (errors_of(path.with_suffix(".new.pt"), frames) for path in paths)
    error, results = of_whole
    _, before = errors_of(whole, frames)
    for k, result in enumerate(results):
        for name in ("energies", "forces", "members"):
            assert np.array_equal(before[k][name], result[name]), name
        # a field of an ensemble is the mean of its members' fields
        for name in ("force_std", "force_bound", "distance", "force_entropy"):
            mean = np.mean([found[k][name] for _, found in of_members], axis=0)
            np.testing.assert_allclose(result[name], mean, rtol=1e-9)
        assert "density_force_std" not in result
    std = np.concatenate([r["ensemble_force_std"] for r in results])
    assert np.sqrt((std**2).mean()) == pytest.approx(np.sqrt((error**2).mean()), rel=1e-6)
    ranks = spearmanr(np.concatenate([r["ensemble_energy_std"] for r in results]), error).statistic
    model = model_file.load(whole.with_suffix(".new.pt"))
    assert model.card["calibration"]["ranking"]["ensemble_energy_std"] == pytest.approx(ranks)
    assert set(model.fields) >= {"force_bound", "ensemble_force_std"}
    assert model.card["ensemble"]["calibration"]["frames"] == 6
    assert model_file.describe(whole.with_suffix(".new.pt")).count("new.xyz") == 2

    few = tmp_path / "few.xyz"
    ase.io.write(few, frames[:4])
    refused(whole, few, "4 frames; calibration needs at least 5", capsys)


def refused(path, data, match, capsys):
    before, files = path.read_bytes(), set(path.parent.iterdir())
    assert cli.main(["calibrate", str(path), str(data)]) == 2
    message = capsys.readouterr().err
    assert match in message and message.count("\n") == 1, message
    assert path.read_bytes() == before
    assert set(path.parent.iterdir()) == files


def test_bad_input_is_refused_and_nothing_written(tiny_model, data, tmp_path, capsys):
    path = tmp_path / "hl.pt"
    path.write_bytes(tiny_model.read_bytes())
    frames = ase.io.read(data, ":")

    few = tmp_path / "few.xyz"
    ase.io.write(few, frames[:3])
    refused(path, few, "3 frames; calibration needs at least 4", capsys)

    strange = tmp_path / "strange.xyz"
    other = frames[1].copy()
    other.symbols[0] = "Cu"
    other.calc = frames[1].calc
    ase.io.write(strange, [frames[0], other, *frames[2:]])
    refused(path, strange, "Cu", capsys)

    own = tmp_path / "own.xyz"
    ase.io.write(own, labelled(tiny_model, 4, noise=0.0))
    refused(path, own, "labels are its own", capsys)
    refused(path, tmp_path / "none.xyz", "none.xyz", capsys)


def altered(path, out, change):
    """A copy of a model file after `change` of its ensemble."""
    module = torch.jit.load(str(path))
    change(module.stages.ensemble)
    outputs = module(dict(module.selftest_inputs), True, False)
    module.selftest_outputs = {k: outputs[k].detach() for k in module.selftest_outputs}
    out.parent.mkdir(exist_ok=True)
    torch.jit.save(module, str(out))
    return out


def test_files_without_statistics_are_refused(tiny_model, data, tmp_path, capsys):
    def forget(ensemble):
        getattr(ensemble.members, "0").methods.scales.distance.whiten.zero_()

    singular = altered(tiny_model, tmp_path / "singular" / "hl.pt", forget)
    refused(singular, data, "their covariance is singular", capsys)

    # a file whose methods hold other tensors than ours, as one of another version
    older = make_potential(num_elements=2)
    force = older.methods["scales"].force_distribution
    kept = force._buffers["bin_width"]
    try:
        force._buffers["bin_width"] = kept.repeat(3).reshape(3, 1)[:1]
        path = tmp_path / "older" / "hl.pt"
        export_potential(older, ELEMENTS[:2], make_card(), path)
    finally:
        force._buffers["bin_width"] = kept
    refused(path, data, "the statistics of its uncertainty method 'scales' are not those", capsys)


def test_a_compiled_file_is_refused_with_the_cure(compiled_models, data, tmp_path, capsys):
    path = tmp_path / "hl.pt2"
    path.write_bytes(compiled_models["mp"].read_bytes())
    refused(path, data, "calibrate the hl.pt of the same checkpoint", capsys)


def test_calibrated_files_are_read_back_to_be_compiled(tmp_path):
    paths = []
    for k, head in enumerate(("hlgauss", "scalar")):
        paths.append(write_checkpoint(tmp_path / f"{k}.ckpt", seed=k, head=head))
        content = torch.load(paths[k], weights_only=True)
        model = yaml.safe_load(to_yaml(ModelConfig(**content["model"])))
        card = {"name": "tiny", "config": {"model": model}}
        torch.save({**content, "card": card}, paths[k])
    for name, checkpoints in (("one", paths[0]), ("two", paths)):
        exported = export_checkpoint(checkpoints, tmp_path / f"{name}.pt")

        def calibrated(ensemble):
            for member in ensemble.members.children():
                member.methods.scales.bound_factor.fill_(7.0)
                member.methods.scales.coverage.fill_(0.9)
            ensemble.force_factor.fill_(1.7)

        changed = altered(exported, tmp_path / f"{name}-changed.pt", calibrated)
        again = tmp_path / f"{name}-again.pt"
        assert cli.main(["export", str(changed), str(again)]) == 0
        inputs = dict(model_file.load(changed).module.selftest_inputs)
        before, after = (model_file.load(p).evaluate(inputs) for p in (changed, again))
        for field in before:
            assert torch.equal(before[field], after[field]), field
        assert "force_bound" in model_file.load(again).fields

    module = torch.jit.load(str(changed))
    card = json.loads(module.card)
    card["ensemble"]["members"][1]["model"]["channels"] = 5
    module.card = json.dumps(card)
    torch.jit.save(module, str(changed))
    with pytest.raises(ValueError, match=r"another version of lmp-hl .*size mismatch"):
        export_checkpoint(changed, tmp_path / "no.pt")


# conformal ---------------------------------------------------------------------------------------
def test_coverage_is_what_so_many_frames_can_promise():
    found = [conformal.attainable_coverage(k) for k in (0, 3, 4, 8, 9, 18, 19, 1000)]
    assert found == [0.0, 0.0, 0.8, 0.8, 0.9, 0.9, 0.95, 0.95]
    for k, coverage in ((4, 0.8), (9, 0.9), (19, 0.95)):
        # the fewest frames: only the largest score of all will do, and one frame less has none
        scores, frame = np.arange(3 * k), np.repeat(np.arange(k), 3)
        assert conformal.pooled_quantile(scores, frame, coverage) == 3 * k - 1
        assert conformal.pooled_quantile(scores[3:], frame[3:], coverage) == np.inf


def test_pooled_quantile_of_frames_of_one_atom_is_split_conformals():
    scores = np.random.default_rng(0).permutation(100)
    # the ceil(0.95 * 101) = 96th smallest
    assert conformal.pooled_quantile(scores, np.arange(100), 0.95) == 95


def test_every_frame_has_the_same_weight():
    # one large quiet frame and 19 small loud ones: atoms pooled without weights would say 0
    scores = np.concatenate([np.zeros(10_000), np.ones(19)])
    frame = np.concatenate([np.zeros(10_000), 1 + np.arange(19)])
    assert conformal.pooled_quantile(scores, frame, 0.8) == 1.0
    assert np.quantile(scores, 0.99) == 0.0


def test_coverage_over_new_frames_is_the_promised_one():
    """Frames with a level of their own, as atoms of one frame share much of their error."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1500):
        level = np.exp(0.5 * rng.normal(size=21))
        sizes = rng.integers(1, 8, 21)
        scores = [s * np.abs(rng.normal(size=n)) for s, n in zip(level, sizes, strict=True)]
        frame = np.repeat(np.arange(20), sizes[:20])
        bound = conformal.pooled_quantile(np.concatenate(scores[:20]), frame, 0.9)
        covered.append((scores[20] <= bound).mean())
    # standard error 0.2 / sqrt(1500) = 0.005; the promise is "at least", and hardly more
    assert 0.9 - 0.015 < np.mean(covered) < 0.96


def test_too_few_frames_leave_the_promises_out(tmp_path):
    potential = make_potential(num_elements=2)
    method = potential.methods["scales"]
    kept = float(method.coverage)
    try:
        method.coverage.fill_(conformal.attainable_coverage(3))
        path = export_potential(potential, ELEMENTS[:2], make_card(), tmp_path / "hl.pt")
    finally:
        method.coverage.fill_(kept)
    model = model_file.load(path)
    assert "force_std" in model.fields
    assert not {"force_bound", "extrapolating"} & set(model.fields)
    assert "conformal" not in model.card
