"""Labelled frames: what is read and what is refused, splits, reference energies, batches."""

import logging
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from lmp_hl import keys
from lmp_hl.graph import graph_inputs
from lmp_hl.training import frames as fr
from lmp_hl.training.config import DataConfig
from lmp_hl.training.frames import (
    GraphDataset,
    check_energy_outliers,
    collate_graphs,
    fit_reference_energies,
    load_splits,
    read_frames,
    read_reference_energies,
    resolve_reference_energies,
    split_frames,
)

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
STRESS = np.array([[0.1, 0.02, 0.03], [0.02, 0.2, 0.04], [0.03, 0.04, 0.3]])
ATOM_ENERGY = {"H": -13.0, "O": -430.0, "Si": -105.0}


def labelled(atoms, seed=0, stress=None, energy=None):
    """The atoms with random forces and an energy near the sum of their elements' own."""
    rng = np.random.default_rng(seed)
    if energy is None:
        energy = sum(ATOM_ENERGY[s] for s in atoms.symbols) + rng.normal(scale=0.1)
    results = {"energy": energy, "forces": rng.normal(size=(len(atoms), 3))}
    if stress is not None:
        results["stress"] = stress
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def silicon(seed=0, stress=None, energy=None):
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=seed)
    return labelled(atoms, seed, stress, energy)


def water(seed=0):
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=seed)
    return labelled(atoms, seed)


def write(folder, images, name="data.xyz"):
    path = folder / name
    ase.io.write(path, images)
    return path


def config(*files, **keywords):
    return DataConfig(train=files or (Path("unused"),), **keywords)


def read(path, elements=None, **keywords):
    return read_frames(path, config(**keywords), "train", elements)


@pytest.mark.parametrize("suffix", ["xyz", "traj", "json"])
def test_labels_come_back_from_every_format(tmp_path, suffix):
    atoms = silicon(seed=3, stress=STRESS.ravel()[[0, 4, 8, 5, 2, 1]])
    atoms.info["config_type"] = "rattled"
    images = [atoms, silicon(seed=4)]
    if suffix == "json":  # ASE's database keeps no info
        del atoms.info["config_type"]
    path = write(tmp_path, images, f"data.{suffix}")
    first, second = read(path)
    # extended XYZ is written with eight decimals
    np.testing.assert_allclose(first.positions, atoms.positions, atol=1e-8)
    np.testing.assert_allclose(first.forces, atoms.get_forces(), atol=1e-8)
    np.testing.assert_allclose(first.stress, STRESS, atol=1e-8)
    np.testing.assert_allclose(first.cell, atoms.cell.array, atol=1e-8)
    assert first.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert first.numbers.tolist() == [14] * 8 and first.pbc.tolist() == [True] * 3
    assert first.config_type == ("" if suffix == "json" else "rattled")
    assert first.volume == pytest.approx(atoms.get_volume())
    assert second.stress is None
    assert second.source == f"{path}: frame 1"


def test_labels_under_other_names_are_found(tmp_path):
    atoms = silicon()
    atoms.info |= {"REF_energy": -3.0, "REF_stress": STRESS}
    atoms.arrays["REF_forces"] = np.full((8, 3), 0.5)
    path = write(tmp_path, atoms)
    (frame,) = read(path, energy_key="REF_energy", forces_key="REF_forces", stress_key="REF_stress")
    assert frame.energy == -3.0
    assert (frame.forces == 0.5).all()
    np.testing.assert_allclose(frame.stress, STRESS)


def test_stress_is_left_alone_when_not_asked_for(tmp_path):
    path = write(tmp_path, silicon(stress=np.arange(6.0)))
    assert read(path, stress_key=None)[0].stress is None


def test_several_files_are_read_in_order(tmp_path):
    first = write(tmp_path, [silicon(0)], "a.xyz")
    second = write(tmp_path, [silicon(1), silicon(2)], "b.xyz")
    sources = [frame.source for frame in read([first, second])]
    assert sources == [f"{first}: frame 0", f"{second}: frame 0", f"{second}: frame 1"]


def bad_frames():
    """Name -> (frame that must be refused, expected message)."""
    cases = {}

    def case(name, atoms, message, drop=(), change=None):
        kept = {k: v for k, v in atoms.calc.results.items() if k not in drop}
        atoms.calc = SinglePointCalculator(atoms, **{**kept, **(change or {})})
        cases[name] = (atoms, message)

    nan = {"forces": np.zeros((8, 3))}
    nan["forces"][5, 1] = np.nan
    case("no energy", silicon(), r"no energy 'energy' \(found .*forces\); set data", ["energy"])
    case("nan energy", silicon(energy=np.nan), r"energy 'energy' is nan, not one finite number")
    case("inf energy", silicon(energy=np.inf), r"energy 'energy' is inf")
    case("no forces", silicon(), r"no forces 'forces' \(found .*energy\); set data", ["forces"])
    case("nan forces", silicon(), r"of atoms \[5\] \(from 0\) are not finite", (), nan)
    case("nan stress", silicon(), r"not six \(Voigt\) or 3x3 finite", (), {"stress": [np.nan] * 6})
    case("stress, no cell", water(), r"has a stress 'stress' but no", (), {"stress": [1.0] * 6})
    close = silicon()
    close.positions[7] = close.positions[2] + [0.0, 0.29, 0.0]
    case("close atoms", close, r"atom 2 is 0.290 Å from atom 7 \(atoms from 0\)")
    wrapped = silicon()
    wrapped.positions[7] = wrapped.positions[2] + wrapped.cell[0] + [0.2, 0.0, 0.0]
    case("close over the border", wrapped, r"atom 2 is 0.200 Å from atom 7")
    thin = labelled(Atoms("Si", cell=[5.0, 5.0, 0.25], pbc=True))
    case("thin cell", thin, r"atom 0 is 0.250 Å from its own periodic image")
    flat = labelled(Atoms("Si", cell=[[5, 0, 0], [0, 5, 0], [5, 5, 0]], pbc=True))
    case("flat cell", flat, r"periodic cell has no volume")
    case("no cell", labelled(Atoms("Si", pbc=True)), r"periodic cell has no volume")
    torn = labelled(Atoms("Si", cell=[5.0, 5.0, np.nan], pbc=[True, True, False]))
    case("torn cell", torn, r"the cell is not finite")
    lost = silicon()
    lost.positions[3, 2] = np.nan
    case("lost atom", lost, r"positions of atoms \[3\] .* not finite")
    ghost = silicon()
    ghost.numbers[0] = 0
    case("ghost atom", ghost, r"unknown element 'X'")
    return cases


@pytest.mark.parametrize("name", bad_frames())
def test_bad_frames_are_refused_by_name(tmp_path, name):
    atoms, message = bad_frames()[name]
    path = tmp_path / "data.traj"
    with ase.io.Trajectory(path, "w") as trajectory:
        for image in (silicon(), atoms):
            trajectory.write(image, **image.calc.results)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: frame 1")


def test_a_stress_that_is_not_symmetric_is_refused(tmp_path):
    atoms = silicon()
    atoms.info["REF_stress"] = STRESS + np.array([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"frame 0: stress 'REF_stress' is not symmetric"):
        read(write(tmp_path, atoms), stress_key="REF_stress")


def test_rounding_in_a_stress_is_made_symmetric(tmp_path):
    atoms = silicon()
    atoms.info["REF_stress"] = STRESS + np.array([[0, 1e-4, 0], [0, 0, 0], [0, 0, 0]])
    (frame,) = read(write(tmp_path, atoms), stress_key="REF_stress")
    assert (frame.stress == frame.stress.T).all()
    assert frame.stress[0, 1] == pytest.approx(STRESS[0, 1] + 0.5e-4, abs=1e-8)


def test_unknown_elements_are_refused_by_name(tmp_path):
    path = write(tmp_path, [silicon(), water()])
    with pytest.raises(ValueError, match=r"frame 1 \(train\): element H, O is unknown .* knows Si"):
        read(path, elements=["Si"])
    valid = write(tmp_path, [water()], "valid.xyz")
    train = write(tmp_path, [silicon(0), silicon(1)], "train.xyz")
    with pytest.raises(ValueError, match=r"valid.xyz: frame 0 \(valid\): element H, O is unknown"):
        load_splits(config(train, valid=(valid,)), seed=0)
    with pytest.raises(ValueError, match=r"train.xyz: frame 0 \(train\): element Si is unknown"):
        load_splits(config(train, elements=("H",)), seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file \(train\)"),
        ("", r"Empty file"),
        ("hello\n", r"cannot read frame 0"),
        ("1\nProperties=species:S:1:pos:R:3 energy=many\nH 0 0 0\n", r"is not a number: 'many'"),
        ("1\nProperties=species:S:1:pos:R:3:forces:R:2 energy=1\nH 0 0 0 0 0\n", r"shape \(1, 2\)"),
        ("0\nenergy=1.0\n1\nProperties=species:S:1:pos:R:3 energy=1\nH 0 0 0\n", r"frame 0"),
        # the last frame stops in the middle
        ("2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=1\nH 0 0 0 0 0 0\n", r"expected 2"),
    ],
)
def test_files_that_are_not_labelled_frames_are_refused(tmp_path, content, message):
    path = tmp_path / "data.xyz"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")


def test_small_cells_and_isolated_atoms_are_welcome(tmp_path):
    tiny = labelled(bulk("Si"))  # 2.7 Å between planes
    alone = labelled(Atoms("Si"))
    assert len(read(write(tmp_path, [tiny, alone]))) == 2


def test_split_is_seeded_disjoint_and_complete(tmp_path):
    frames = read(write(tmp_path, [silicon(k) for k in range(20)]))
    train, valid = split_frames(frames, 0.25, seed=1)
    assert (len(train), len(valid)) == (15, 5)
    assert sorted(map(id, train + valid)) == sorted(map(id, frames))
    assert [f.source for f in split_frames(frames, 0.25, seed=1)[1]] == [f.source for f in valid]
    assert [f.source for f in split_frames(frames, 0.25, seed=2)[1]] != [f.source for f in valid]
    assert [len(part) for part in split_frames(frames[:2], 0.01, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="cannot be divided"):
        split_frames(frames[:1], 0.5, seed=0)


def test_fitted_reference_energies_recover_the_elements(tmp_path):
    images = [water(), labelled(molecule("OH"))]
    for atoms in images:
        atoms.calc.results["energy"] = sum(ATOM_ENERGY[s] for s in atoms.symbols)
    fitted = fit_reference_energies(read(write(tmp_path, images)), ["O", "H"])
    assert list(fitted) == ["O", "H"]
    assert fitted == pytest.approx({"H": -13.0, "O": -430.0})


def test_undetermined_reference_energies_are_the_smallest_and_said_so(tmp_path, caplog):
    frames = read(write(tmp_path, [water(k) for k in range(4)]))
    with caplog.at_level(logging.WARNING):
        fitted = fit_reference_energies(frames, ["H", "O"])
    assert "determine only 1 of 2 reference energies" in caplog.text
    mean = np.mean([frame.energy for frame in frames])
    # minimum norm of 2 e_H + e_O = mean: along (2, 1)
    assert fitted == pytest.approx({"H": mean * 2 / 5, "O": mean / 5})


def test_reference_energies_from_a_file_of_isolated_atoms(tmp_path):
    path = tmp_path / "iso.xyz"
    ase.io.write(path, [labelled(Atoms(s), energy=e) for s, e in ATOM_ENERGY.items()])
    assert read_reference_energies(path) == pytest.approx(ATOM_ENERGY)
    resolved = resolve_reference_energies(config(reference_energies=path), [], ["Si", "H"])
    assert list(resolved.items()) == [("Si", -105.0), ("H", -13.0)]
    with pytest.raises(ValueError, match=r"iso.xyz: no reference energy for C \(found H, O, Si\)"):
        resolve_reference_energies(config(reference_energies=path), [], ["C", "H"])
    with pytest.raises(ValueError, match=r"data.reference_energies: no reference energy for H"):
        resolve_reference_energies(config(reference_energies={"Si": 1.0}), [], ["Si", "H"])
    ase.io.write(path, [labelled(Atoms("H")), labelled(Atoms("H"))])
    with pytest.raises(ValueError, match=r"iso.xyz: frame 1: a second energy for H"):
        read_reference_energies(path)
    ase.io.write(path, water())
    with pytest.raises(ValueError, match=r"frame 0: has 3 atoms"):
        read_reference_energies(path)


@pytest.mark.parametrize("factor", [1 / 27.211386, 23.06])
def test_energies_in_another_unit_are_named(tmp_path, factor):
    # few frames of two compositions: a least-squares fit would be dragged along by the wrong ones
    images = [water(k) for k in range(8)] + [silicon(k) for k in range(4)]
    for k in (2, 9):
        images[k].calc.results["energy"] *= factor
    frames = read(write(tmp_path, images))
    with pytest.raises(ValueError, match="energy per atom of 2 of 12 frames") as error:
        check_energy_outliers(frames, ["H", "O", "Si"])
    assert f"{frames[2].source} by" in str(error.value)
    assert f"{frames[9].source} by" in str(error.value)
    check_energy_outliers([f for k, f in enumerate(frames) if k not in (2, 9)], ["H", "O", "Si"])


def test_isolated_atoms_among_crystals_are_no_outliers(tmp_path):
    images = [silicon(k) for k in range(20)] + [labelled(Atoms("Si"), energy=-105.0 + 8.9)]
    check_energy_outliers(read(write(tmp_path, images)), ["Si"])


def test_load_splits_reads_a_whole_run(tmp_path):
    images = [silicon(k) for k in range(10)] + [water(k) for k in range(10)]
    train = write(tmp_path, images)
    test = write(tmp_path, [silicon(77)], "hot.xyz")
    splits = load_splits(config(train, valid_fraction=0.2, test={"hot": test}), seed=5)
    assert splits.elements == ("H", "O", "Si")
    assert (len(splits.train), len(splits.valid), len(splits.test["hot"])) == (16, 4, 1)
    assert list(splits.reference_energies) == ["H", "O", "Si"]
    # silicon alone determines its own energy, within the noise of 0.1 eV in a frame of 8 atoms
    assert splits.reference_energies["Si"] == pytest.approx(-105.0, abs=0.05)
    fewer = load_splits(config(train, valid_fraction=0.2, max_frames=12), seed=5)
    assert [f.source for f in fewer.valid] == [f.source for f in splits.valid]
    assert {f.source for f in fewer.train} < {f.source for f in splits.train}
    assert len(fewer.train) == 12
    with pytest.raises(ValueError, match=r"data.max_frames is 17, but there are 16 training"):
        load_splits(config(train, valid_fraction=0.2, max_frames=17), seed=5)


def test_an_element_without_training_frames_is_refused(tmp_path):
    train = write(tmp_path, [silicon(k) for k in range(3)])
    with pytest.raises(ValueError, match=r"no training frame contains Ge"):
        load_splits(config(train, elements=("Si", "Ge")), seed=0)


@pytest.fixture
def dataset(tmp_path):
    """A crystal with stress, a molecule, an isolated atom: edges, no stress, no edges."""
    images = [silicon(1, stress=np.arange(6.0)), water(2), labelled(Atoms("H")), silicon(3)]
    frames = read(write(tmp_path, images))
    return GraphDataset(frames, ["H", "O", "Si"], ATOM_ENERGY, 4.0, 2, "float32")


def test_batch_equals_singles(dataset):
    batch = collate_graphs([dataset[k] for k in range(4)])
    num_atoms = [8, 3, 1, 8]
    assert batch[fr.NUM_ATOMS].tolist() == num_atoms
    assert batch[fr.BATCH].tolist() == np.repeat(range(4), num_atoms).tolist()
    assert batch[keys.LAYER_NODES].tolist() == [20, 20]
    assert batch[keys.LAYER_EDGES].tolist() == [batch[keys.EDGE_VECTORS].shape[0]] * 2
    center, neighbor = batch[keys.EDGE_INDEX]
    assert (center.diff() >= 0).all()
    assert torch.equal(batch[fr.BATCH][center], batch[fr.BATCH][neighbor])
    for k, offset in enumerate(np.cumsum([0, *num_atoms[:-1]])):
        single = graph_inputs(dataset.frames[k], ["H", "O", "Si"], 4.0, 2, "float32")
        nodes, edges = batch[fr.BATCH] == k, batch[fr.BATCH][center] == k
        assert torch.equal(batch[keys.SPECIES][nodes], single[keys.SPECIES])
        assert torch.equal(batch[keys.EDGE_INDEX][:, edges] - offset, single[keys.EDGE_INDEX])
        assert torch.equal(batch[keys.EDGE_VECTORS][edges], single[keys.EDGE_VECTORS])
        forces = torch.tensor(dataset.frames[k].forces, dtype=torch.float32)
        assert torch.equal(batch[fr.TARGET_FORCES][nodes], forces)


def test_targets_are_the_labels_minus_the_references(dataset):
    batch = collate_graphs([dataset[k] for k in range(4)])
    total = batch[fr.TARGET_ENERGY] + batch[fr.REFERENCE_ENERGY]
    assert total.dtype == torch.float64
    assert total.tolist() == pytest.approx([frame.energy for frame in dataset.frames], abs=1e-9)
    assert batch[fr.REFERENCE_ENERGY].tolist() == [-840.0, -456.0, -13.0, -840.0]
    stress = batch[fr.TARGET_STRESS]
    assert stress[0].tolist() == [[0, 5, 4], [5, 1, 3], [4, 3, 2]]
    assert stress[1:].isnan().all()
    volume = float(bulk("Si", cubic=True).get_volume())
    assert batch[fr.VOLUME].tolist() == pytest.approx([volume, np.inf, np.inf, volume], rel=1e-6)
    in_model_dtype = (keys.EDGE_VECTORS, fr.TARGET_FORCES, fr.TARGET_STRESS, fr.VOLUME)
    assert {batch[key].dtype for key in in_model_dtype} == {torch.float32}


def test_collating_one_graph_changes_nothing_and_leaves_items_alone(dataset):
    before = {key: value.clone() for key, value in dataset[1].items()}
    collate_graphs([dataset[0], dataset[1]])
    single = collate_graphs([dataset[1]])
    for key, value in before.items():
        torch.testing.assert_close(dataset[1][key], value, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(single[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"reference data {SHARED} is absent")
def test_reference_sets_are_accepted():
    references = read_reference_energies(SHARED / "3bpa" / "iso_atoms.xyz")
    frames = read(SHARED / "3bpa" / "test_300K.xyz", elements=list(references))
    assert len(frames) == 136
    check_energy_outliers(frames, list(references))
    strained = read(SHARED / "mlearn" / "Si" / "test.xyz")
    assert any(frame.stress is not None for frame in strained)
    assert len(GraphDataset(strained, ["Si"], {"Si": -5.4}, 5.0, 1, "float64")) == 25
