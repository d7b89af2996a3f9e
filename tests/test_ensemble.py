"""Several potentials in one file: their mean, their disagreement, and what may not be joined."""

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from conftest import (
    CUTOFF,
    ELEMENTS,
    calibrated_ensemble,
    make_card,
    make_potential,
    make_structure,
)
from test_compile import write_checkpoint

from lmp_hl import HLCalculator, cli, keys, model_file, stages
from lmp_hl.ensemble import Ensemble, split_committee
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.potential import edge_forces
from lmp_hl.training.checkpoint import export_checkpoint

SYMBOLS = ELEMENTS[:2]
# the same sums in float64, some in another order
EXACT = 1e-12


def inputs_of(structure, num_layers=1):
    return graph_inputs(structure, SYMBOLS, CUTOFF, num_layers, "float64")


def forces_of(inputs, gradients):
    return edge_forces(inputs[keys.EDGE_INDEX], gradients, len(inputs[keys.SPECIES]))


def of_all_kinds(preset):
    """Members that differ in head and size as well."""
    return Ensemble(
        [
            make_potential(preset, num_elements=2),
            make_potential(preset, "scalar", num_elements=2, seed=1),
            make_potential(preset, num_elements=2, l_max=3, seed=2),
        ]
    )


@pytest.mark.parametrize("preset, num_layers", [("local", 1), ("mp", 2)])
def test_energy_and_forces_are_means_of_the_members(preset, num_layers):
    ensemble = of_all_kinds(preset)
    inputs = inputs_of(make_structure(SYMBOLS, 20), num_layers)
    got = ensemble(inputs)
    each = [potential(inputs) for potential in ensemble.potentials()]
    for key in (keys.ENERGY, keys.EDGE_GRADIENTS):
        mean = sum(of_one[key] for of_one in each) / 3
        torch.testing.assert_close(got[key], mean, rtol=EXACT, atol=EXACT)
    for k, of_one in enumerate(each):
        assert torch.equal(got[keys.MEMBERS][:, k], of_one[keys.ENERGY])


def test_disagreement_is_the_unbiased_deviation_of_forces_and_centred_energies():
    ensemble = calibrated_ensemble("local")
    inputs = inputs_of(make_structure(SYMBOLS, 20))
    got = {k: v.detach() for k, v in ensemble(inputs, True).items()}
    each = [potential(inputs) for potential in ensemble.potentials()]
    forces = np.stack([forces_of(inputs, of_one[keys.EDGE_GRADIENTS]).numpy() for of_one in each])
    variance = forces.var(axis=0, ddof=1).mean(axis=1)
    expected = float(ensemble.force_factor) * np.sqrt(variance)
    np.testing.assert_allclose(got[keys.ENSEMBLE_FORCE_STD], expected, rtol=1e-10)
    energies = np.stack([of_one[keys.ENERGY].detach().numpy() for of_one in each])
    energies -= ensemble.energy_means.numpy()[:, inputs[keys.SPECIES].numpy()]
    expected = energies.std(axis=0, ddof=1)
    np.testing.assert_allclose(got[keys.ENSEMBLE_ENERGY_STD], expected, rtol=1e-10)


def test_other_fields_are_means_of_what_all_members_have():
    ensemble = of_all_kinds("local")
    inputs = inputs_of(make_structure(SYMBOLS, 20))
    got = ensemble(inputs, True)
    assert keys.ENTROPY not in got  # the scalar member has none
    each = [potential(inputs, True) for potential in ensemble.potentials()]
    for field in (keys.FORCE_STD, keys.DISTANCE, keys.FORCE_ENTROPY):
        mean = sum(of_one[field] for of_one in each) / 3
        torch.testing.assert_close(got[field], mean, rtol=EXACT, atol=EXACT)
    histograms = Ensemble([make_potential(num_elements=2, seed=seed) for seed in (0, 1)])
    assert {keys.ENTROPY, keys.EXCESS_ENTROPY} <= set(histograms(inputs, True))


def test_disagreement_ignores_which_energies_the_elements_start_from():
    first, second = (make_potential(num_elements=2, seed=seed) for seed in (0, 1))
    inputs = inputs_of(make_structure(SYMBOLS, 20))
    before = Ensemble([first, second])(inputs, True)
    make_potential.cache_clear()  # a copy of one's own to change
    shifted = make_potential(num_elements=2, seed=1)
    make_potential.cache_clear()
    shifted.reference_energies.add_(torch.tensor([3.0, -7.0]))
    after = Ensemble([first, shifted])(inputs, True)
    assert bool(((after[keys.ENERGY] - before[keys.ENERGY]).abs() > 1.0).any())
    for field in (keys.ENSEMBLE_ENERGY_STD, keys.ENSEMBLE_FORCE_STD):
        torch.testing.assert_close(after[field], before[field], rtol=1e-10, atol=1e-10)


def test_disagreement_does_not_depend_on_orientation():
    ensemble = calibrated_ensemble("mp")
    structure = make_structure(SYMBOLS, 20)
    turned = structure.copy()
    turned.rotate(67.0, (1, -2, 3), rotate_cell=True)
    before, after = (ensemble(inputs_of(atoms, 2), True) for atoms in (structure, turned))
    for field in (keys.ENSEMBLE_ENERGY_STD, keys.ENSEMBLE_FORCE_STD):
        torch.testing.assert_close(after[field], before[field], rtol=1e-9, atol=1e-9)


def test_ensemble_of_one_is_the_potential():
    potential = make_potential("mp", num_elements=2)
    inputs = inputs_of(make_structure(SYMBOLS, 20), 2)
    got, expected = Ensemble([potential])(inputs, True), potential(inputs, True)
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert torch.equal(got[key], value)


@pytest.mark.parametrize("preset, num_layers", [("local", 1), ("mp", 2)])
def test_stages_of_several_members_give_what_one_pass_gives(preset, num_layers):
    ensemble = of_all_kinds(preset)
    runtime = torch.jit.script(stages.Stages(ensemble))
    for num_atoms, with_fields in ((20, True), (20, False), (1, True), (0, True)):
        structure = make_structure(SYMBOLS, max(1, num_atoms), pbc=num_atoms > 1)[:num_atoms]
        inputs = inputs_of(structure, num_layers)
        got = stages.evaluate(runtime, inputs, with_fields)
        expected = ensemble(inputs, with_fields)
        assert set(got) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value.detach(), rtol=EXACT, atol=EXACT)


def test_disagreement_can_be_differentiated_also_where_there_is_none(tmp_path):
    ensemble = Ensemble([make_potential(num_elements=2, seed=seed) for seed in (0, 1)])
    path = export_potential(ensemble, SYMBOLS, {}, tmp_path / "hl.pt")
    alone = make_structure(SYMBOLS, 3, pbc=False)
    alone.positions[2] += 50.0  # no neighbours: no forces, in no member
    inputs = inputs_of(alone)
    inputs[keys.EDGE_VECTORS].requires_grad_(True)
    outputs = torch.jit.load(str(path))(inputs, True, True)
    assert float(outputs[keys.ENSEMBLE_FORCE_STD][2].detach()) == 0.0
    for field in (keys.ENSEMBLE_FORCE_STD, keys.ENSEMBLE_ENERGY_STD):
        (gradient,) = torch.autograd.grad(
            [outputs[field].sum()], [inputs[keys.EDGE_VECTORS]], retain_graph=True
        )
        assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0


def test_calculator_knows_the_energy_of_each_member(tmp_path):
    ensemble = calibrated_ensemble("local")
    path = export_potential(ensemble, SYMBOLS, {}, tmp_path / "hl.pt")
    atoms = make_structure(SYMBOLS, 20)
    atoms.calc = HLCalculator(path)
    energy = atoms.get_potential_energy()
    members = atoms.calc.results[keys.MEMBERS].sum(axis=0)
    assert members.shape == (3,) and members.mean() == pytest.approx(energy, rel=1e-12)
    for k, potential in enumerate(ensemble.potentials()):
        alone = float(potential(inputs_of(atoms))[keys.ENERGY].sum())
        assert members[k] == pytest.approx(alone, rel=1e-12)
    assert atoms.calc.results[keys.ENSEMBLE_FORCE_STD].shape == (20,)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_elements": 1}, "the same number of elements, got 2, 1"),
        ({"cutoff": 5.0}, "the same cutoff, got 4 Å, 5 Å"),
        ({"preset": "mp"}, "the same number of layers, got 1, 2"),
        ({"dtype": "float32"}, "the same dtype, got float64, float32"),
        ({"seed": 0}, "members 1 and 2 .* are the same potential"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_members_that_do_not_fit_are_refused(other, message):
    second = make_potential(**{"num_elements": 2, "seed": 1, **other})
    with pytest.raises(ValueError, match=message):
        Ensemble([make_potential(num_elements=2), second])


# heads of a committee -----------------------------------------------------------------------------
COMMITTEES = ("committee", "svd_committee")


@pytest.mark.parametrize("preset, num_layers", [("local", 1), ("mp", 2)])
@pytest.mark.parametrize("head", COMMITTEES)
def test_members_of_a_committee_have_its_energy_and_forces_as_their_mean(head, preset, num_layers):
    committee = make_potential(preset, head, num_elements=2)
    members = split_committee(committee)
    assert len(members) == 4 and all(m.backbone is committee.backbone for m in members)
    inputs = inputs_of(make_structure(SYMBOLS, 20), num_layers)
    got, expected = Ensemble(members)(inputs), committee(inputs)
    for key in (keys.ENERGY, keys.EDGE_GRADIENTS):
        torch.testing.assert_close(got[key], expected[key], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("head", COMMITTEES)
def test_forces_of_a_committee_disagree_as_differences_of_its_heads_energies_do(head):
    committee = make_potential(head=head, num_elements=2)
    structure, step = make_structure(SYMBOLS, 6), 1e-4

    def energies(positions):
        """Of every head, without what is under test."""
        moved = structure.copy()
        moved.positions = positions
        inputs = inputs_of(moved)
        scalars = committee.backbone(inputs).scalars
        heads = committee.energy_head.members(scalars, inputs[keys.SPECIES])
        return np.array([float(of_one.energy.sum()) for of_one in heads])

    forces = np.zeros((4, 6, 3))
    for atom, axis in np.ndindex(6, 3):
        for sign in (1, -1):
            moved = structure.positions.copy()
            moved[atom, axis] += sign * step
            forces[:, atom, axis] -= sign * energies(moved) / (2 * step)
    expected = np.sqrt(forces.var(axis=0, ddof=1).mean(axis=1))
    got = Ensemble(split_committee(committee))(inputs_of(structure), True)
    assert expected.max() > 1e-3
    # differences: step^2 and rounding of energies over the step
    np.testing.assert_allclose(got[keys.ENSEMBLE_FORCE_STD].detach(), expected, rtol=1e-5)


def test_only_a_committee_can_be_split():
    with pytest.raises(ValueError, match=r"model.head: committee or svd_.*, got HistogramEnergy"):
        split_committee(make_potential(num_elements=2))


@pytest.mark.parametrize("head", COMMITTEES)
def test_checkpoint_of_a_committee_becomes_an_ensemble(head, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "model.ckpt", "float64", head=head, num_members=3)
    content = torch.load(path, weights_only=True)
    ranking = {keys.MUTUAL_INFORMATION: 0.3, keys.FORCE_STD: 0.5}
    content["card"] = {"name": "run", "calibration": {"ranking": ranking}}
    torch.save(content, path)
    assert cli.main(["split", str(path)]) == 0
    heads = [tmp_path / f"model-head{k}.ckpt" for k in (1, 2, 3)]
    assert capsys.readouterr().out == "".join(f"wrote {head}\n" for head in heads)
    assert cli.main(["export", *map(str, heads), str(tmp_path / "all.pt")]) == 0
    model = model_file.load(tmp_path / "all.pt")
    assert model.card["calibration"]["ranking"] == {keys.FORCE_STD: 0.5}
    names = [of_one["name"] for of_one in model.card["ensemble"]["members"]]
    assert names == [f"run, head {k} of 3" for k in (1, 2, 3)]
    inputs = inputs_of(make_structure(SYMBOLS, 20))
    got = model.evaluate(inputs)
    expected = model_file.load(export_checkpoint(path, tmp_path / "hl.pt")).evaluate(inputs)
    torch.testing.assert_close(got[keys.ENERGY], expected[keys.ENERGY], rtol=EXACT, atol=EXACT)
    assert float(got[keys.ENSEMBLE_FORCE_STD].max()) > 0

    assert cli.main(["split", str(heads[0]), "--out", str(tmp_path / "none")]) == 2
    assert "model-head1.ckpt: only a committee of heads can be split" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# from checkpoints to a file -----------------------------------------------------------------------
CARD = {"name": "one of several", "training": {"train_frames": 5, "seconds": 1.0}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three runs of random weights, the second with a scalar head."""
    folder = tmp_path_factory.mktemp("checkpoints")
    heads = ("hlgauss", "scalar", "hlgauss")
    paths = [
        write_checkpoint(folder / f"{k}.ckpt", "float64", k, head=head)
        for k, head in enumerate(heads)
    ]
    for path in paths:
        torch.save({**torch.load(path, weights_only=True), "card": CARD}, path)
    return paths


@pytest.fixture(scope="module")
def labelled(checkpoints, tmp_path_factory):
    """Frames whose forces differ from those of the ensemble by 0.2 eV/Å or so."""
    folder = tmp_path_factory.mktemp("labelled")
    calculator = HLCalculator(export_checkpoint(checkpoints, folder / "hl.pt"))
    rng = np.random.default_rng(5)
    frames = []
    for seed in range(6):
        atoms = make_structure(SYMBOLS, 9, seed=seed)
        calculator.calculate(atoms)
        forces = calculator.results["forces"] + rng.normal(0, 0.2, (9, 3))
        energy = calculator.results["energy"]
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    write(folder / "valid.xyz", frames)
    return folder / "valid.xyz"


def test_validation_frames_give_the_disagreement_the_size_of_the_error(
    checkpoints, labelled, tmp_path, capsys
):
    words = ["export", *map(str, checkpoints), "--valid", str(labelled)]
    assert cli.main([*words[:4], str(tmp_path / "plain.pt")]) == 0
    assert cli.main([words[0], *words[4:], *words[1:4], str(tmp_path / "hl.pt")]) == 0
    plain, model = (model_file.load(tmp_path / name) for name in ("plain.pt", "hl.pt"))
    frames = read(labelled, ":")
    std, errors, energies, species = [], [], [], []
    for atoms in frames:
        inputs = inputs_of(atoms)
        outputs = model.evaluate(inputs)
        std.append(outputs[keys.ENSEMBLE_FORCE_STD])
        forces = forces_of(inputs, outputs[keys.EDGE_GRADIENTS])
        errors.append(torch.from_numpy(atoms.get_forces()) - forces)
        energies.append(outputs[keys.MEMBERS])
        species.append(inputs[keys.SPECIES])
        factor = outputs[keys.ENSEMBLE_FORCE_STD] / plain.evaluate(inputs)[keys.ENSEMBLE_FORCE_STD]
        found = model.card["ensemble"]["calibration"]
        np.testing.assert_allclose(factor, found["force_factor"], rtol=1e-9)
    rmse = float(torch.cat(errors).square().mean().sqrt())
    assert float(torch.cat(std).square().mean().sqrt()) == pytest.approx(rmse, rel=1e-9)
    assert rmse == pytest.approx(0.2, rel=0.2)
    means = model.module.stages.ensemble.energy_means
    for z in (0, 1):
        expected = torch.cat(energies)[torch.cat(species) == z].mean(0)
        torch.testing.assert_close(means[:, z], expected, rtol=1e-12, atol=1e-9)

    assert (found["frames"], found["atoms"], found["file"]) == (6, 54, str(labelled))
    for judged, without in (("ranking", []), ("largest", [keys.EXTRAPOLATING])):
        expected = {*model.fields} - {keys.ENERGY, *without}
        assert set(model.card["calibration"][judged]) == expected
    assert [member["name"] for member in model.card["ensemble"]["members"]] == [CARD["name"]] * 3
    assert "calibration" not in plain.card["ensemble"]


def test_frames_of_a_single_potential_or_too_few_are_refused(checkpoints, labelled, tmp_path):
    with pytest.raises(ValueError, match=r"to calibrate the disagreement of several checkpoints"):
        export_checkpoint(checkpoints[:1], tmp_path / "hl.pt", valid=labelled)
    write(tmp_path / "few.xyz", read(labelled, ":4"))
    with pytest.raises(ValueError, match="at least 5 frames to calibrate on, got 4"):
        export_checkpoint(checkpoints, tmp_path / "hl.pt", valid=tmp_path / "few.xyz")
    assert not (tmp_path / "hl.pt").exists()


def test_members_for_other_elements_are_refused(checkpoints, tmp_path):
    content = torch.load(checkpoints[0], weights_only=True)
    content["elements"] = ["O", "Si"]
    other = tmp_path / "other.ckpt"
    torch.save(content, other)
    with pytest.raises(ValueError, match=r"other.ckpt: for the elements O Si, but .* is for Si O"):
        export_checkpoint([checkpoints[1], other], tmp_path / "hl.pt")


def test_forgotten_name_of_the_file_spares_the_last_checkpoint(checkpoints, capsys):
    before = checkpoints[2].read_bytes()
    assert cli.main(["export", *map(str, checkpoints)]) == 2
    assert "the last word is the file to write, such as hl.pt" in capsys.readouterr().err
    assert checkpoints[2].read_bytes() == before


def test_info_says_how_many_members_there_are(tmp_path):
    about = {"members": [{}, {}]}
    assert "not calibrated (export with --valid)" in model_file._ensemble(about)
    about["calibration"] = {"force_factor": 1.25, "frames": 6, "atoms": 54, "file": "valid.xyz"}
    ensemble = Ensemble([make_potential(seed=seed) for seed in (0, 1)])
    card = {**make_card(), "ensemble": about}
    text = model_file.describe(export_potential(ensemble, ["Si"], card, tmp_path / "hl.pt"))
    assert "2 members" in text and "times 1.25, on 6 frames (54 atoms) of valid.xyz" in text
