"""Selection of configurations to label: uncertain, different, and whole where it matters."""

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from conftest import ELEMENTS, make_structure
from scipy.spatial.transform import Rotation
from test_analysis import write_h5md

from lmp_hl import analysis, analysis_report, cli, model_file, select


def frame(atoms, k, std):
    return {
        "step": 10 * k, "time": 0.01 * k, "cell": atoms.cell[:], "origin": np.zeros(3),
        "id": np.arange(1, len(atoms) + 1), "species": atoms.numbers,
        "position": atoms.positions.copy(), "force_std": std, "force": atoms.positions.copy(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    """Three kinds of defect, each seen in a run of nearly equal frames; the rest is certain."""
    crystal = bulk("Si", cubic=True) * (4, 4, 4)
    rng = np.random.default_rng(0)
    frames = []
    for k in range(12):
        atoms = crystal.copy()
        kind, center = k // 4, 200
        away = atoms.get_distances(center, range(len(atoms)), mic=True)
        near = np.argsort(away)[1:5]
        if kind == 1:  # neighbours pushed out
            atoms.positions[near] += 0.15 * atoms.get_distances(center, near, mic=True, vector=True)
        if kind == 2:  # the atom itself moved
            atoms.positions[center] += [0.5, 0.3, 0.1]
        atoms.positions += 0.003 * rng.normal(size=atoms.positions.shape)
        std = 0.05 + 0.01 * rng.random(len(atoms))
        std[center] = 0.5 + 0.1 * kind + 0.01 * (k % 4)
        std[near] = 0.4
        frames.append(frame(atoms, k, std))
    folder = tmp_path_factory.mktemp("select")
    return write_h5md(folder / "traj.h5md", frames, {"config": {"model": {"cutoff": 4.0}}})


def test_near_duplicates_are_taken_once(trajectory):
    chosen = select.select(trajectory, "force_std", 0.3, 3)
    assert chosen[0].frame == 11  # the most uncertain
    assert {c.frame // 4 for c in chosen} == {0, 1, 2}
    by_value = sorted(range(12), key=lambda k: -(0.5 + 0.1 * (k // 4) + 0.01 * (k % 4)))[:3]
    assert {k // 4 for k in by_value} == {2}  # the largest values alone are all of one kind


def test_only_atoms_above_the_threshold_are_candidates(trajectory):
    assert select.select(trajectory, "force_std", 0.9, 3) == []
    chosen = select.select(trajectory, "force_std", 0.65, 100, whole_frames=False)
    assert {c.frame for c in chosen} <= {8, 9, 10, 11} and {c.id for c in chosen} == {201}
    several = select.select(trajectory, "force_std", 0.3, 100, whole_frames=False)
    assert len(several) == 60  # the atom and its four neighbours, twelve times
    assert len(select.select(trajectory, "force_std", 0.3, 100)) == 12  # one of each frame
    with pytest.raises(ValueError, match="wanted at least 1"):
        select.select(trajectory, "force_std", 0.3, 0)


def test_a_models_features_tell_the_kinds_apart_as_well(trajectory, tiny_model):
    chosen = select.select(trajectory, "force_std", 0.3, 3, model=model_file.load(tiny_model))
    assert {c.frame // 4 for c in chosen} == {0, 1, 2}


def test_fingerprints_are_invariant_and_tell_environments_apart():
    of_frame = select._moments(np.array([8, 14]))
    atoms = make_structure(ELEMENTS[:2], 20, seed=3)
    rotation = -Rotation.random(rng=1).as_matrix()
    moved = atoms.copy()
    moved.set_cell(atoms.cell @ rotation.T, scale_atoms=True)
    before, after = of_frame(atoms, range(20)), of_frame(moved, range(20))
    np.testing.assert_allclose(after, before, atol=1e-10)
    assert (
        np.linalg.norm(before[:, None] - before[None], axis=2)[~np.eye(20, dtype=bool)].min() > 0.1
    )


def test_farthest_points_of_a_line():
    line = np.array([[0.0], [1.0], [2.0], [7.0], [10.0], [10.0]])
    assert select.farthest_points(line, 3, 0) == [0, 4, 2] or select.farthest_points(
        line, 3, 0
    ) == [0, 4, 3]
    # identical points are taken once
    assert sorted(select.farthest_points(line, 99, 0)) == [0, 1, 2, 3, 4]


def test_clusters_are_the_spheres_and_their_core_is_complete(trajectory, tmp_path):
    chosen = select.select(trajectory, "force_std", 0.3, 2)
    out = tmp_path / "selected.xyz"
    select.write(trajectory, chosen, out, radius=9.0, cutoff=4.0)
    for choice, cluster in zip(chosen, ase.io.read(out, ":"), strict=True):
        assert cluster.calc is None  # nothing that could be taken for a label
        assert not cluster.pbc.any() and cluster.info["uncertainty"] == pytest.approx(choice.value)
        with analysis.open_trajectory(trajectory) as file:
            whole = file.to_ase(choice.frame)
        there = whole.get_distances(choice.atom, range(len(whole)), mic=True)
        assert sorted(cluster.arrays["id"]) == (1 + np.flatnonzero(there < 9.0)).tolist()
        center = cluster.info["uncertain_atom"]
        assert cluster.arrays["id"][center] == choice.id
        row = {i: k for k, i in enumerate(cluster.arrays["id"])}
        for k in np.flatnonzero(cluster.arrays["core"]):
            atom = cluster.arrays["id"][k] - 1
            near = whole.get_distances(atom, range(len(whole)), mic=True)
            for neighbor in np.flatnonzero((near > 0) & (near < 4.0)):
                same = cluster.get_distance(k, row[neighbor + 1])
                assert same == pytest.approx(near[neighbor], abs=1e-6)  # text has 8 decimals
        assert cluster.arrays["core"].sum() > 10
        # nothing is closer to the walls than the vacuum
        assert cluster.positions.min() >= 10.0 - 1e-6
    with pytest.raises(ValueError, match="more than that, 8 Å"):
        select.write(trajectory, chosen, out, radius=4.0, cutoff=4.0)
    with pytest.raises(ValueError, match=r"11 Å does not fit into the periodic cell, 21\.7 Å"):
        select.write(trajectory, chosen, out, radius=11.0, cutoff=4.0)


def test_the_verb_writes_frames_without_labels(trajectory, tmp_path, capsys):
    words = ["analyze", str(trajectory), "--out", str(tmp_path), "--select", "3"]
    assert cli.main([*words, "--threshold", "force_std=0.3"]) == 0
    text = capsys.readouterr().out
    assert "3 frames to label" in text and "force_std first above 0.3: step 0" in text
    found = ase.io.read(tmp_path / "selected.xyz", ":")
    assert len(found) == 3 and all(len(a) == 512 and a.calc is None for a in found)
    assert found[0].info["step"] == 110 and "force" not in found[0].arrays
    assert found[0].arrays["force_std"].max() == pytest.approx(0.73)
    # another run that finds nothing leaves no old selection behind
    nothing = analysis.analyze(trajectory, thresholds={"force_std": 0.9})
    analysis_report.select_configurations(nothing, "force_std", tmp_path, 3, None, None)
    assert "nothing to label" in capsys.readouterr().out
    assert not (tmp_path / "selected.xyz").exists()
    assert cli.main([*words[:4], "--environment", "9"]) == 2
    assert "add --select" in capsys.readouterr().err
