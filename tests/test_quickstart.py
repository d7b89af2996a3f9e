"""The whole example, small: train, export, LAMMPS on two ranks, analyse, evaluate, then nothing."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml

from lmp_hl.h5md import open_trajectory
from lmp_hl.model_file import load

SILICON = Path(__file__).resolve().parents[1] / "examples" / "silicon"
CELLS, STEPS = 3, 20
STEPS_OF_THE_JOB = 5


def quickstart(folder):
    """Run the example at its smallest into `folder`; returns what it printed."""
    config = folder / "small.yaml"
    if not config.exists():
        data = {"train": "train.xyz", "valid": "valid.xyz"}
        content = {
            "name": "small",
            "data": {split: str(SILICON / file) for split, file in data.items()},
            "model": {"cutoff": 4.0, "channels": 4, "num_bins": 32},
            "training": {"epochs": 3, "warmup_epochs": 1, "batch_size": 4},
        }
        content["data"]["max_frames"] = 8
        config.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [
            *(sys.executable, str(SILICON / "quickstart.py")),
            *("--out", str(folder / "out"), "--config", str(config)),
            *("--cells", str(CELLS), "--steps", str(STEPS), "--ranks", "2"),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of the results, what was printed) of a whole run."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder / "out", quickstart(folder)


def test_summary_names_what_was_made_and_where(finished):
    out, printed = finished
    summary = printed.split("quickstart finished in ")[1]
    made = [line.split()[0] for line in summary.splitlines()[1:] if line.startswith("  out/")]
    assert {"out/hl.pt", "out/traj.h5md", "out/analysis/analysis.json"} <= set(made)
    for name in made:
        assert (out.parent / name).stat().st_size > 0
    figures = {str(path.relative_to(out.parent)) for path in out.rglob("*.png")}
    assert figures <= set(made)
    assert {path.parent.name for path in out.rglob("*.png")} == {"train", "analysis", "evaluation"}
    for number in range(1, STEPS_OF_THE_JOB + 1):
        assert f"[{number}/{STEPS_OF_THE_JOB}] " in printed
    assert "up to date" not in printed


def test_model_and_trajectory_are_of_one_run(finished):
    out, printed = finished
    model = load(out / "hl.pt")
    assert model.elements == ["Si"] and model.card["training"]["train_frames"] == 8
    columns = "Step Temp PotEng TotEng Press entropy_mean entropy_max fstd_mean fstd_max"
    assert columns.split() in [line.split() for line in printed.splitlines()]
    with open_trajectory(out / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0, STEPS]
        assert trajectory.num_atoms == 8 * CELLS**3
        sizes = {"entropy", "force_std", "force_entropy", "distance"}
        assert set(trajectory.fields) == {*sizes, "extrapolating"}
        assert np.isin(trajectory.values("extrapolating"), [0, 1]).all()
        for name in sizes:
            values = trajectory.values(name)
            assert np.isfinite(values).all() and values.min() >= 0 and np.ptp(values) > 0
        assert json.loads(trajectory.runs[-1]["model_card"]) == model.card


def test_tables_hold_numbers_of_the_trajectory_and_of_both_sets(finished):
    out, _ = finished
    analysis = json.loads((out / "analysis" / "analysis.json").read_text())
    with (out / "analysis" / "frames.csv").open() as file:
        frames = list(csv.DictReader(file))
    assert [int(row["step"]) for row in frames] == [0, STEPS]
    with open_trajectory(out / "traj.h5md") as trajectory:
        mean = trajectory.values("force_std", 1).mean()
    assert float(frames[1]["force_std_mean"]) == pytest.approx(mean, rel=1e-5)
    assert [row["step"] for row in analysis["frames"]] == [0, STEPS]
    assert analysis["frames"][1]["force_std_mean"] == pytest.approx(mean, rel=1e-5)
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert set(evaluation["sets"]) == set(evaluation["ranking"]) == {"held out", "seen"}
    with (out / "evaluation" / "atoms.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, file in (("held out", "heldout.xyz"), ("seen", "test.xyz")):
        number = sum(len(atoms) for atoms in ase.io.iread(SILICON / file))
        values = [float(row["force_std"]) for row in rows if row["set"] == name]
        assert len(values) == number and np.isfinite(values).all() and min(values) > 0


def test_second_call_runs_no_step(finished):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    printed = quickstart(out.parent)
    assert printed.count("up to date: ") == STEPS_OF_THE_JOB
    assert "  $ " not in printed, "a command was run again"
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    assert "quickstart finished" in printed
