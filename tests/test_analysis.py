"""Analysis of a synthetic trajectory in the layout of fix hlgauss/h5md, with known answers."""

import csv
import json

import h5py
import numpy as np
import pytest
from ase.build import bulk

from lmp_hl import analysis, analysis_report
from lmp_hl.h5md import Frame

UNITS = {"entropy": "nat", "force_std": "eV Angstrom-1", "distance": "1", "position": "Angstrom"}
VACUUM = 10.0


def write_h5md(path, frames, card=None, periodic=(True, True, True)):
    """Frames: dicts with step, time, cell, origin and per-atom columns."""
    with h5py.File(path, "w") as file:
        file.create_group("h5md").attrs["version"] = [1, 1]
        group = file.create_group("particles/trajectory")
        box = group.create_group("box")
        box.attrs["boundary"] = ["periodic" if p else "none" for p in periodic]
        for name, key in (("step", "step"), ("time", "time"), ("value", "cell")):
            box[f"edges/{name}"] = np.array([f[key] for f in frames])
        box["edges/time"].attrs["unit"] = "ps"
        box["edges/value"].attrs["unit"] = "Angstrom"
        box["origin/value"] = np.array([f["origin"] for f in frames])
        for name in set(frames[0]) - {"step", "time", "cell", "origin"}:
            value = group.create_dataset(f"{name}/value", data=np.array([f[name] for f in frames]))
            group[f"{name}/step"], group[f"{name}/time"] = box["edges/step"], box["edges/time"]
            if name in UNITS:
                value.attrs["unit"] = UNITS[name]
        file.create_group("parameters").attrs["unit_style"] = "metal"
        run = file.create_group("parameters/runs/0")
        run["model_card"] = np.bytes_(json.dumps(card or {}))
    return path


def slab_frames(num_frames=6, repeat=3, seed=0):
    """Silicon with two free surfaces; uncertain where atoms are near one, more so over time."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Si", cubic=True) * (repeat, repeat, repeat)
    cell = np.diag(atoms.cell.lengths() + np.array([0, 0, 2 * VACUUM]))
    frames = []
    for k in range(num_frames):
        position = atoms.positions + rng.normal(0, 0.05, (len(atoms), 3)) + [0, 0, VACUUM]
        position[:, 2] += 1.0
        z = position[:, 2]
        depth = np.minimum(z - z.min(), z.max() - z)
        surface = np.exp(-depth / 2.0)
        std = 0.05 * np.exp(rng.normal(0, 0.1, len(atoms))) * (1 + (2 + k) * surface)
        frames.append(
            {
                "step": 100 * k, "time": 0.1 * k, "cell": cell, "origin": [0.0, 0.0, 1.0],
                "id": np.arange(1, len(atoms) + 1), "species": atoms.numbers, "position": position,
                "entropy": 1.9 + surface + 0.05 * rng.normal(size=len(atoms)), "force_std": std,
            }
        )  # fmt: skip
    return frames


@pytest.fixture(scope="module")
def frames():
    return slab_frames()


@pytest.fixture(scope="module")
def card():
    return {"calibration": {"ranking": {"entropy": 0.41, "force_std": 0.62}, "size_ratio": 1.0}}


@pytest.fixture(scope="module")
def trajectory(frames, card, tmp_path_factory):
    return write_h5md(tmp_path_factory.mktemp("trajectory") / "traj.h5md", frames, card)


@pytest.fixture(scope="module")
def result(trajectory):
    return analysis.analyze(trajectory)


def test_rows_hold_what_numpy_says_about_each_frame(result, frames):
    assert [row["step"] for row in result.rows] == [0, 100, 200, 300, 400, 500]
    std = frames[3]["force_std"]
    row = result.rows[3]
    assert row["time"] == pytest.approx(0.3)
    assert row["force_std_mean"] == pytest.approx(std.mean())
    assert row["force_std_max"] == pytest.approx(std.max())
    assert row["force_std_q95"] == pytest.approx(np.quantile(std, 0.95))
    assert row["force_std_ids"] == (np.argsort(-std)[:5] + 1).tolist()


def test_threshold_is_the_given_one_or_lies_above_the_bulk(trajectory, result, frames):
    first = frames[0]["force_std"]
    bulk_atoms = first < np.quantile(first, 0.5)
    assert result.thresholds["force_std"] > first[bulk_atoms].max()
    given = analysis.analyze(trajectory, thresholds={"force_std": 0.1})
    assert given.thresholds["force_std"] == 0.1
    assert given.rows[0]["force_std_above"] == pytest.approx((first > 0.1).mean())


def test_threshold_is_that_of_the_model_card_where_it_has_one(frames, tmp_path, capsys):
    """The first frame of a run may be a perfect crystal, which says nothing of what is usual."""
    crystal = [frames[0] | {"force_std": np.full(len(frames[0]["id"]), 1e-3)}, *frames[1:]]
    limit = float(frames[3]["force_std"].max())
    card = {"calibration": {"largest": {"force_std": limit, "gone": 1.0}, "largest_coverage": 0.9}}
    path = write_h5md(tmp_path / "t.h5md", crystal, card)
    result = analysis.analyze(path)
    assert result.thresholds["force_std"] == limit and result.usual == ["force_std"]
    assert result.thresholds["entropy"] == analysis.default_threshold(frames[0]["entropy"])
    analysis_report.print_summary(result, [tmp_path / "nothing"])
    assert (
        "threshold of force_std: above the largest value in 90% of frames"
        in capsys.readouterr().out
    )
    given = analysis.analyze(path, thresholds={"force_std": 0.1})
    assert given.thresholds["force_std"] == 0.1 and given.usual == []


def test_distributions_count_every_atom(result, frames):
    for counts in result.counts.values():
        assert counts.sum(axis=1).tolist() == [len(f["id"]) for f in frames]


def test_the_field_that_ranked_best_on_validation_is_named(result):
    assert result.fields == ["entropy", "force_std"]
    assert result.best == "force_std"
    assert "force_std 0.62, entropy 0.41" in result.remark


def test_without_a_ranking_nothing_is_claimed(frames, tmp_path):
    bare = analysis.analyze(write_h5md(tmp_path / "bare.h5md", frames[:1]))
    assert bare.as_dict()["best_field"] is None
    assert "not known" in bare.remark


def test_profile_is_high_at_the_surfaces_and_empty_in_the_vacuum(result, frames):
    mean = result.profile.fields["force_std"]["mean"]
    z = result.profile.groups
    position = np.concatenate([f["position"][:, 2] for f in frames[3:]])
    inside = (z > position.min()) & (z < position.max())
    assert np.isnan(mean[(z < position.min() - 2) | (z > position.max() + 2)]).all()
    filled = np.flatnonzero(np.isfinite(mean))
    middle = mean[np.abs(z - position.mean()) < 2].mean()
    assert mean[filled[0]] > 2 * middle and mean[filled[-1]] > 2 * middle
    # atoms over volume of the slices sum up to the atoms
    volume = frames[0]["cell"][0, 0] ** 2 * (z[1] - z[0])
    assert (result.density * volume).sum() == pytest.approx(len(frames[0]["id"]))
    assert inside.sum() > 5


def test_less_coordinated_atoms_are_more_uncertain(result):
    by = result.neighborhoods.coordination
    mean = dict(zip(by.groups.astype(int), by.fields["force_std"]["mean"], strict=True))
    assert mean[2] > 1.5 * mean[4]
    assert by.count.sum() == len(result.region_steps) * 216


def ideal_gas(num_atoms, cell, periodic, seed=0):
    rng = np.random.default_rng(seed)
    return Frame(
        step=0, time=0.0, cell=np.asarray(cell, float), origin=np.zeros(3),
        periodic=np.asarray(periodic), arrays={
            "position": rng.random((num_atoms, 3)) @ np.asarray(cell, float),
            "species": np.full(num_atoms, 18), "entropy": rng.random(num_atoms),
        },
    )  # fmt: skip


def test_rdf_of_an_ideal_gas_is_one_in_a_triclinic_cell():
    cell = [[20, 0, 0], [4, 18, 0], [-3, 5, 16]]
    gas = [ideal_gas(1500, cell, [True] * 3, seed) for seed in range(2)]
    near = analysis.neighborhoods(gas, ["entropy"], "entropy")
    far = near.distance > 3
    # pairs per bin above 3 Å: 2 frames * 1500 atoms * over 1.4 neighbours, half of them independent
    assert np.abs(near.rdf["all atoms"][far] - 1).max() < 5 / np.sqrt(2 * 1500 * 1.4 / 2)


def test_rdf_equals_mdanalysis():
    import MDAnalysis as mda
    from MDAnalysis.analysis.rdf import InterRDF

    atoms = bulk("Cu", cubic=True) * (4, 4, 4)
    atoms.rattle(0.1, seed=1)
    frame = ideal_gas(len(atoms), atoms.cell[:], [True] * 3)
    frame.arrays["position"] = atoms.positions
    near = analysis.neighborhoods([frame], ["entropy"], "entropy")
    universe = mda.Universe.empty(len(atoms), trajectory=True)
    universe.atoms.positions = atoms.positions
    universe.dimensions = [*atoms.cell.lengths(), 90, 90, 90]
    theirs = InterRDF(
        universe.atoms, universe.atoms, len(near.distance), (0, 7.0), exclusion_block=(1, 1)
    ).run()
    # single precision moves a few pairs to the next bin: compare running sums of pairs
    ours = np.cumsum(near.rdf["all atoms"] * near.distance**2)
    # theirs divides by the N - 1 others, ours by the mean density N / V
    sums = np.cumsum(theirs.results.rdf * near.distance**2) * (len(atoms) - 1) / len(atoms)
    np.testing.assert_allclose(ours, sums, atol=2e-3 * sums[-1])


def test_heights_in_a_tilted_cell_are_those_over_its_face():
    gas = ideal_gas(200, [[20, 0, 0], [4, 18, 0], [-3, 5, 16]], [True] * 3)
    height, area = analysis.along_axis(gas, 2)
    np.testing.assert_allclose(height, gas["position"][:, 2], atol=1e-9)
    assert area == pytest.approx(360)


def test_run_writes_tables_and_figures(trajectory, tmp_path, capsys):
    analysis_report.run(trajectory, tmp_path / "out", progress=False)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "analysis.json", "frames.csv", "entropy_over_time.png", "force_std_over_time.png",
        "time_series.png", "profile_z.png", "rdf.png", "coordination.png", "atoms_entropy.png",
        "atoms_force_std.png",
    }  # fmt: skip
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert numbers["best_field"] == "force_std"
    with open(tmp_path / "out" / "frames.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[2]["entropy_ids"].count(" ") == 4
    assert "6 frames, 216 atoms, steps 0 to 500" in capsys.readouterr().out


def test_first_crossing_is_the_first_frame_and_its_worst_atom(trajectory, frames):
    limit = 1.01 * frames[2]["force_std"].max()
    k = next(k for k in range(6) if frames[k]["force_std"].max() > limit)
    found = analysis.analyze(trajectory, thresholds={"force_std": limit, "entropy": 99.0})
    first = found.crossings["force_std"]
    worst = frames[k]["force_std"].argmax()
    assert (first.step, first.id, first.element) == (100 * k, worst + 1, "Si")
    np.testing.assert_allclose(first.position, frames[k]["position"][worst])
    assert first.value == pytest.approx(frames[k]["force_std"].max())
    assert "entropy" not in found.crossings
    assert found.as_dict()["first_crossing"]["force_std"]["step"] == 100 * k


@pytest.mark.parametrize("column", ["extrapolating", "distance"])
def test_share_of_atoms_extrapolating(frames, tmp_path, capsys, column):
    card = {"conformal": {"coverage": 0.9, "extrapolating_beyond_distance": 2.0}}
    distance = [f["force_std"] / 0.05 for f in frames]
    values = [d > 2.0 for d in distance] if column == "extrapolating" else distance
    made = [f | {column: np.asarray(v, float)} for f, v in zip(frames, values, strict=True)]
    result = analysis.analyze(write_h5md(tmp_path / "t.h5md", made, card))
    expected = [(d > 2.0).mean() for d in distance]
    np.testing.assert_allclose(result.column("extrapolating"), expected)
    assert "extrapolating" not in result.fields  # a flag has no threshold or distribution
    analysis_report.print_summary(result, [tmp_path / "nothing"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{expected[0]:.1%} → {expected[-1]:.1%}; at most 10%" in text


def test_one_frame_is_enough(frames, card, tmp_path):
    only = [f | {"extrapolating": f["entropy"] > 2.5} for f in frames[:1]]
    path = write_h5md(tmp_path / "one.h5md", only, card, periodic=(True, True, False))
    analysis_report.run(path, progress=False)
    assert (tmp_path / "one-analysis" / "extrapolating.png").stat().st_size > 5_000
    assert (tmp_path / "one-analysis" / "atoms_entropy.png").stat().st_size > 10_000


def test_wrong_trajectories_are_refused(frames, tmp_path):
    plain = [{k: v for k, v in f.items() if k not in ("entropy", "force_std")} for f in frames]
    with pytest.raises(ValueError, match="no uncertainty field"):
        analysis.analyze(write_h5md(tmp_path / "plain.h5md", plain))
    unplaced = [{k: v for k, v in f.items() if k != "position"} for f in frames]
    with pytest.raises(ValueError, match="no positions"):
        analysis.analyze(write_h5md(tmp_path / "unplaced.h5md", unplaced))
    path = write_h5md(tmp_path / "good.h5md", frames[:1])
    with pytest.raises(ValueError, match="threshold for distance"):
        analysis.analyze(path, thresholds={"distance": 1.0})
    broken = [f | {"entropy": f["entropy"] * np.nan} for f in frames[:1]]
    with pytest.raises(ValueError, match="step 0: 216 values of entropy are not finite"):
        analysis.analyze(write_h5md(tmp_path / "broken.h5md", broken))
    with pytest.raises(FileNotFoundError):
        analysis.analyze(tmp_path / "none.h5md")
