"""Every example runs at small size, with a small random model in place of the trained one."""

import copy
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from conftest import make_card

from lmp_hl.export import export_potential
from lmp_hl.h5md import open_trajectory
from lmp_hl.lammps import program

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.slurm")])
# LAMMPS started under pytest must not think that it is part of another MPI run
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "SLURM"))}
ENVIRONMENT["PATH"] = f"{program('lmp').parent}:{os.environ['PATH']}"


def run(command, folder, **environment):
    """What a command printed; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def thermo(printed, column):
    """Step -> value of a thermo column, of all runs in a log."""
    values = {}
    for block in re.findall(r"^ *Step .*?(?=^Loop time|\Z)", printed, re.M | re.S):
        head, *lines = block.splitlines()
        for line in lines:
            if re.match(r" *\d+ +[-\d.]", line):
                values[int(line.split()[0])] = float(line.split()[head.split().index(column)])
    return values


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_are_correct_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


# melt -------------------------------------------------------------------------------------------
CHECK = 5


@pytest.fixture(scope="module")
def melted(tiny_model, tmp_path_factory):
    """(results, what was printed): the random model makes the crystal collapse, which it notices"""
    out = tmp_path_factory.mktemp("melt")
    small = f"-var cells 2 -var steps 400 -var every 10 -var check {CHECK}".split()
    return out, run(
        ["bash", EXAMPLES / "melt" / "run.sh", tiny_model, *small], out.parent, OUT=str(out)
    )


def test_melt_halts_on_the_first_look_above_the_limit_of_the_validation_frames(melted):
    out, printed = melted
    with (out / "valid.csv").open() as file:
        limit = max(float(row["force_std"]) for row in csv.DictReader(file))
    assert float(re.search(r"limit: force_std (\S+)", printed)[1]) == pytest.approx(limit, rel=1e-5)
    step = int(re.search(r"^halted at step (\d+): force_std", printed, re.M)[1])
    assert 0 < step < 400 and step % CHECK == 0
    with open_trajectory(out / "melt.h5md") as trajectory:
        worst = trajectory.values("force_std").max(axis=1)
        assert trajectory.steps.tolist() == [*range(0, step, 10), step]
        assert worst[-1] > limit and (worst[:-1] <= limit).all()
    assert (out / "analysis" / "force_std_over_time.png").stat().st_size > 0


def test_melt_goes_on_from_the_restart_file_of_the_halt(melted, tiny_model):
    out, printed = melted
    step = int(re.search(r"^halted at step (\d+)", printed, re.M)[1])
    worst = float(re.search(r"^halted at step \d+: force_std (\S+)", printed, re.M)[1])
    (out / "in.again").write_text(f"""
        read_restart melt.restart
        pair_style mliap model {tiny_model}
        pair_coeff * * Si
        compute u all hlgauss/atom force_std
        compute umax all reduce max c_u
        thermo_style custom step c_umax
        run 0
        """)
    again = run([sys.executable, program("lmp"), "-in", "in.again", "-log", "none"], out)
    # the sums over neighbours come in another order
    assert thermo(again, "c_umax") == {step: pytest.approx(worst, rel=1e-5)}


# select -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def selected(tiny_model, tmp_path_factory):
    """(results, what was printed, limit)"""
    out, limit = tmp_path_factory.mktemp("select"), 2.65  # eV/Å, passed on the way
    small = f"-var cells 2 -var steps 40 -var every 2 -var limit {limit}".split()
    printed = run(
        ["bash", EXAMPLES / "select" / "run.sh", tiny_model, *small],
        out.parent,
        OUT=str(out),
        APART="0.005",
    )
    return out, printed, limit


def rows_of_dump(path):
    """Step -> [(id, f_g)] of a dump with columns id element x y z f_g."""
    frames = {}
    for block in path.read_text().split("ITEM: TIMESTEP\n")[1:]:
        lines = block.split("ITEM: ATOMS")[1].splitlines()[1:]
        rows = [line.split() for line in lines if line[:5] != "ITEM:" and len(line.split()) == 6]
        frames[int(block.split()[0])] = [(int(row[0]), float(row[5])) for row in rows]
    return frames


def test_dumps_hold_the_uncertain_atoms_and_the_frames_they_are_in(selected):
    out, printed, limit = selected
    worst = thermo(printed, "fstd_max")
    assert min(worst.values()) < limit < max(worst.values()), "the limit decides nothing here"
    frames = rows_of_dump(out / "uncertain_frames.dump")
    assert set(frames) == {step for step, value in worst.items() if value > limit}
    atoms = rows_of_dump(out / "uncertain_atoms.dump")
    for step, rows in frames.items():
        assert max(value for _, value in rows) == pytest.approx(worst[step], rel=1e-5)
        assert atoms[step] == [row for row in rows if row[1] > limit]
    assert not any(rows for step, rows in atoms.items() if step not in frames)


def test_candidates_are_the_most_uncertain_frames_apart_in_time(selected):
    out, _, _ = selected
    frames = rows_of_dump(out / "uncertain_frames.dump")
    worst = {step: max(value for _, value in rows) for step, rows in frames.items()}
    candidates = ase.io.read(out / "candidates.xyz", ":")
    steps = [atoms.info["step"] for atoms in candidates]
    assert len(steps) > 1 and min(np.diff(steps)) >= 5  # 5 fs are 5 steps
    assert max(worst, key=worst.get) in steps
    for step, value in worst.items():  # what was left out has a neighbour that is worth more
        better = [s for s in steps if abs(s - step) < 5 and worst[s] >= value]
        assert better, f"step {step} is missing"
    for atoms in candidates:
        assert atoms.info["time"] == pytest.approx(1e-3 * atoms.info["step"])
        assert set(atoms.symbols) == {"Si"} and atoms.pbc.all() and len(atoms) == 56
        values = [value for _, value in frames[atoms.info["step"]]]
        np.testing.assert_allclose(atoms.arrays["force_std"], values, rtol=1e-6)


def test_candidates_leave_out_a_torn_frame_and_name_a_missing_column(selected, tmp_path):
    out, _, _ = selected
    text = (out / "uncertain_frames.dump").read_text()
    (tmp_path / "torn.dump").write_text(text[:-30])
    script = EXAMPLES / "select" / "candidates.py"
    printed = run([sys.executable, script, "torn.dump", "c.xyz", "--apart", "0"], tmp_path)
    whole = len(rows_of_dump(out / "uncertain_frames.dump"))
    assert f"{whole - 1} uncertain frames, {whole - 1} candidates" in printed
    assert len(ase.io.read(tmp_path / "c.xyz", ":")) == whole - 1
    (tmp_path / "other.dump").write_text(text.replace("z f_g", "z f_h"))
    done = subprocess.run(
        [sys.executable, str(script), "other.dump", "d.xyz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no column ['f_g'], found ['id', 'element', 'x', 'y', 'z', 'f_h']" in done.stderr


# SLURM: `sbatch` only notes what it was given, mpirun stands for the allocation ------------------
@pytest.fixture
def cluster(tmp_path, potential_factory):
    """A folder with the scripts, a gentle random model, and a stand-in for sbatch on the PATH."""
    for file in (EXAMPLES / "slurm").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    potential = copy.deepcopy(potential_factory(num_elements=1))
    potential.energy_head.scale.mul_(0.01)  # nearly an ideal gas: nothing collapses
    export_potential(potential, ["Si"], make_card(), tmp_path / "gentle.pt")
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "sbatch"
    stub.write_text('#!/bin/bash\necho "$@" >> submitted\n')
    stub.chmod(0o755)
    return tmp_path


def job(cluster, script, ranks, *options, **environment):
    """Starts a job script as SLURM would, in a process of its own."""
    slurm = {
        "SLURM_SUBMIT_DIR": str(cluster),
        "SLURM_NTASKS": str(ranks),
        "SLURM_JOB_ID": "17",
        "PATH": f"{cluster / 'bin'}:{ENVIRONMENT['PATH']}",
        "VENV": sys.prefix,
        "MODEL": "gentle.pt",
        "OUT": "out",
        "LMP_OPTIONS": " ".join(["-var cells 2 -var every 10 -var check 5", *options]),
    }
    return subprocess.Popen(
        ["bash", script],
        cwd=cluster,
        env={**ENVIRONMENT, **slurm, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_chain_of_jobs_survives_the_end_of_its_time(cluster):
    first = job(cluster, "cpu.slurm", 2, "-var steps 100000000 -var limit 1e9")
    log = cluster / "out" / "log.17"
    while first.poll() is None and not (log.exists() and thermo(log.read_text(), "Temp")):
        time.sleep(0.1)
    first.send_signal(signal.SIGUSR1)  # SLURM's warning
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 0, printed[-3000:]
    interrupted = int(re.search(r"^interrupted at step (\d+) of 100000000", printed, re.M)[1])
    assert (cluster / "submitted").read_text() == "cpu.slurm\n"

    end = 10 * (interrupted // 10) + 20
    second = job(cluster, "cpu.slurm", 2, f"-var steps {end} -var limit 1e9")
    printed, _ = second.communicate(timeout=300)
    assert second.returncode == 0, printed[-3000:]
    assert f"chain: finished at step {end} of {end}" in printed
    assert (cluster / "submitted").read_text() == "cpu.slurm\n", "a finished chain was submitted"
    with open_trajectory(cluster / "out" / "production.h5md") as trajectory:
        expected = {*range(0, end + 1, 10), interrupted}
        assert trajectory.steps.tolist() == sorted(expected)
        assert [run["start_step"] for run in trajectory.runs] == [0, interrupted]
        assert np.isfinite(trajectory.values("position")).all()


def test_chain_stops_when_uncertain_and_when_the_launcher_is_of_another_mpi(cluster):
    uncertain = job(cluster, "gpu.slurm", 2, "-var limit 1e-9", DEVICE="cpu")
    printed, _ = uncertain.communicate(timeout=300)
    assert uncertain.returncode == 0, printed[-3000:]
    assert "chain: uncertain at step 5 of 100000" in printed
    # `env` starts one process, as a launcher does that our MPI does not understand
    alone = job(cluster, "gpu.slurm", 2, DEVICE="cpu", LAUNCH="env", OUT="alone")
    printed, _ = alone.communicate(timeout=300)
    assert alone.returncode == 1
    assert "wanted 2 ranks, got 1" in printed and "not submitted again" in printed
    assert not (cluster / "alone" / "production.h5md").exists()
    assert not (cluster / "submitted").exists()
