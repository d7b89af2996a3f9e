"""fix hlgauss/h5md: the file survives kills, full disks, halts and restarts."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from crystal import BIN, CONTINUE, crystal, error_line, lmp

from lmp_hl.h5md import open_trajectory


def test_existing_file_is_left_alone_without_append_or_overwrite(tmp_path):
    precious = tmp_path / "traj.h5md"
    precious.write_bytes(b"results of last year")
    fix = "fix traj all hlgauss/h5md 5 traj.h5md id x\nrun 5\n"
    assert "add 'append' or 'overwrite'" in error_line(lmp(tmp_path, crystal() + fix, 2, ok=False))
    assert precious.read_bytes() == b"results of last year"
    message = error_line(lmp(tmp_path, crystal() + fix.replace(" x", " x append"), ok=False))
    assert "no HDF5 file or it is damaged" in message
    assert precious.read_bytes() == b"results of last year"

    lmp(tmp_path, crystal() + fix.replace(" x", " x overwrite"))
    with open_trajectory(precious) as trajectory:
        assert trajectory.steps.tolist() == [0, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.lmp", "traj.h5md"]


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory):
    """A run that wrote a restart file at step 12 and frames every 5 steps up to step 20."""
    folder = tmp_path_factory.mktemp("interrupted")
    lmp(
        folder,
        crystal()
        + "fix nve all nve\nfix traj all hlgauss/h5md 5 traj.h5md id type x v c_pe\n"
        + "run 12\nwrite_restart at.restart\nrun 8\n",
    )
    return folder


def test_append_after_restart_cuts_the_frames_beyond_it(tmp_path, interrupted_run):
    for name in ("traj.h5md", "at.restart"):
        (tmp_path / name).write_bytes((interrupted_run / name).read_bytes())
    output = lmp(
        tmp_path,
        CONTINUE + "fix traj all hlgauss/h5md 5 traj.h5md id type x v c_pe append\nrun 13\n",
        ranks=2,
    )
    assert "continues after 3 frames; 2 frames beyond step 12 were removed" in output
    with (
        open_trajectory(tmp_path / "traj.h5md") as trajectory,
        open_trajectory(interrupted_run / "traj.h5md") as before,
    ):
        assert trajectory.steps.tolist() == [0, 5, 10, 15, 20, 25]
        np.testing.assert_allclose(trajectory.times, trajectory.steps * 1e-3, rtol=1e-12)
        for i in range(3):
            np.testing.assert_array_equal(trajectory[i]["position"], before[i]["position"])
        # the same physics to rounding: few steps after a restart with new neighbour lists
        np.testing.assert_allclose(trajectory[4]["position"], before[4]["position"], atol=1e-4)
        first, second = trajectory.runs
        assert (first["from_restart"], second["from_restart"]) == (0, 1)
        assert second["start_step"] == 12 and second["num_ranks"] == "2"
        assert (second["first_frame"], second["frames_removed"]) == (3, 2)


@pytest.mark.parametrize(
    ("columns", "change", "expected"),
    [
        ("id type x c_pe", "", "it has the columns"),
        ("id type x v c_pe precision double", "", "another number type"),
        ("id type x v c_pe", "start over", "would remove them"),
    ],
)
def test_append_refuses_what_does_not_fit(tmp_path, interrupted_run, columns, change, expected):
    for name in ("traj.h5md", "at.restart"):
        (tmp_path / name).write_bytes((interrupted_run / name).read_bytes())
    start = crystal() if change else CONTINUE
    fix = f"fix traj all hlgauss/h5md 5 traj.h5md {columns} append\nrun 5\n"
    assert expected in error_line(lmp(tmp_path, start + fix, ok=False))
    assert (tmp_path / "traj.h5md").read_bytes() == (interrupted_run / "traj.h5md").read_bytes()


def limit_file_size():
    # MPICH needs a few MB for its own shared memory
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000_000, 12_000_000))


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk_ends_the_run_and_leaves_a_readable_file(tmp_path, ranks):
    script = (
        crystal("block 0 12 0 12 0 12")
        + "fix nve all nve\nvariable now atom step\n"
        + "fix traj all hlgauss/h5md 1 traj.h5md id type x v f v_now precision double {}\nrun 40\n"
    )
    output = lmp(tmp_path, script.format(""), ranks, ok=False, preexec_fn=limit_file_size)
    message = error_line(output)
    assert "no room for the frame at step" in message and "ulimit -f" in message
    reached = int(message.split("at step ")[1].split()[0])
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == list(range(reached)) and reached > 5
        for frame in trajectory:
            assert (frame["v_now"] == frame.step).all() and np.isfinite(frame["force"]).all()

    before = (tmp_path / "traj.h5md").read_bytes()
    limited = script.format("append").replace("run 40", "reset_timestep 100\nrun 40")
    assert "no room" in error_line(
        lmp(tmp_path, limited, ranks, ok=False, preexec_fn=limit_file_size)
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == list(range(reached))
    if ranks == 1:
        lmp(tmp_path, limited.replace("run 40", "run 2"))
        with open_trajectory(tmp_path / "traj.h5md") as trajectory:
            assert trajectory.steps.tolist() == [*range(reached), 100, 101, 102]
        assert len(before) < (tmp_path / "traj.h5md").stat().st_size


def test_folder_that_cannot_be_written(tmp_path):
    fix = "fix traj all hlgauss/h5md 5 {}/traj.h5md id x\nrun 5\n"
    message = error_line(lmp(tmp_path, crystal() + fix.format("nowhere"), 2, ok=False))
    assert "cannot create nowhere/traj.h5md" in message and "No such file" in message
    message = error_line(lmp(tmp_path, crystal() + fix.format("/proc"), 2, ok=False))
    assert "cannot create /proc/traj.h5md" in message
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        message = error_line(lmp(tmp_path, crystal() + fix.format("locked"), 2, ok=False))
        assert "Permission denied" in message


ENDLESS = (
    crystal()
    + "fix nve all nve\nvariable now atom step\n"
    + "fix traj all hlgauss/h5md 1 traj.h5md id type x v_now overwrite\nrun 1000000\n"
)


def start_endless(folder):
    """LAMMPS writing a frame every step, in a process group of its own, with some frames done."""
    (folder / "in.lmp").write_text(ENDLESS)
    process = subprocess.Popen(
        [str(BIN / "lmp"), "-in", "in.lmp", "-log", "none"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    path = folder / "traj.h5md"
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 300_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)  # `lmp` is a wrapper: its child is LAMMPS
    process.wait()


def mtime(path):
    return path.stat().st_mtime_ns if path.exists() else None


def check_every_frame(path):
    with open_trajectory(path) as trajectory:
        steps = trajectory.steps
        np.testing.assert_array_equal(steps, np.arange(len(steps)))
        now = trajectory.values("v_now")
        position = trajectory.values("position")
    assert (now == steps[:, None]).all() and np.isfinite(position).all()
    return len(steps)


def test_kill_minus_nine_loses_no_finished_frame(tmp_path):
    random.seed(5)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = start_endless(folder)
        try:
            time.sleep(random.uniform(0.0, 0.2))
            with open_trajectory(folder / "traj.h5md") as trajectory:
                seen = trajectory.num_frames
        finally:
            kill(process)
        assert check_every_frame(folder / "traj.h5md") >= seen > 0


@pytest.mark.slow
def test_sixty_kills_at_random_moments_of_runs_that_append(tmp_path):
    """Kills while LAMMPS starts, while frames are cut, and in any moment of writing."""
    rng = random.Random(11)
    path = tmp_path / "traj.h5md"
    kept, last, killed_writing = 0, None, 0
    for attempt in range(60):
        # each run starts some steps before the end of the file, as one from a restart file would
        start = max(kept - 1 - rng.choice([0, 0, 3, 40]), 1)
        if kept > 2000:
            start = rng.randrange(1, 200)
        script = ENDLESS.replace("overwrite", f"append compress gzip {1 + attempt % 2}")
        if kept:
            script = script.replace("fix traj", f"reset_timestep {start}\nfix traj")
        (tmp_path / "in.lmp").write_text(script)
        process = subprocess.Popen(
            [str(BIN / "lmp"), "-in", "in.lmp", "-log", "none"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            if attempt % 5 == 0:  # any moment, also before the file is touched
                time.sleep(rng.uniform(0.0, 1.5))
            else:  # from the moment the file is made or cut
                while mtime(path) == last:
                    assert process.poll() is None
                    time.sleep(0.002)
                time.sleep(rng.choice([0.0, 0.005, 0.05, 0.5]) * rng.random())
                killed_writing += 1
            seen = 0
            if mtime(path) != last:
                with open_trajectory(path) as trajectory:
                    seen = int(trajectory.steps[-1]) if len(trajectory) else -1
        finally:
            kill(process)
        if not path.exists():
            continue
        frames = check_every_frame(path)
        # what was there stays, but for frames beyond the start, and so does what was seen
        assert frames >= min(kept, start + 1)
        assert frames > seen or frames >= start + 1, "a reader may see frames that are then cut"
        kept, last = frames, mtime(path)
    assert killed_writing >= 48


WRITE_COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stddef.h>
#include <sys/types.h>
#include <unistd.h>
long writes_left = -1;
static void count(void) { if (writes_left >= 0 && writes_left-- == 0) kill(getpid(), SIGKILL); }
ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset)
{
  static ssize_t (*real)(int, const void *, size_t, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "pwrite");
  count();
  return real(fd, buffer, size, offset);
}
ssize_t pwrite64(int fd, const void *buffer, size_t size, off_t offset)
{
  static ssize_t (*real)(int, const void *, size_t, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
  count();
  return real(fd, buffer, size, offset);
}
int ftruncate(int fd, off_t size)
{
  static int (*real)(int, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "ftruncate");
  count();
  return real(fd, size);
}
"""

# drives libhlgauss_h5md.so as the fix does: frames of 5 atoms, the step as the value of each
DIE_AT_EVERY_WRITE = """
import ctypes as c, os, shutil, sys
from pathlib import Path
import h5py, numpy as np
from lmp_hl.h5md import open_trajectory
from lmp_hl.lammps import plugin_path

Text = c.c_char_p
class Column(c.Structure):
    _fields_ = [(n, Text) for n in ("name", "unit", "note", "ase_origin", "lammps_unit")] + [
        ("factor", c.c_double), ("width", c.c_int), ("type", c.c_int), ("observable", c.c_int)]
class Settings(c.Structure):
    _fields_ = [("path", Text), ("mode", c.c_int), ("creator_version", Text), ("unit_style", Text),
        ("time_unit", Text), ("length_unit", Text), ("periodic", c.c_int * 3),
        ("start_step", c.c_int64), ("from_restart", c.c_int), ("num_atoms", c.c_int64),
        ("compress", c.c_int), ("num_columns", c.c_int), ("columns", c.POINTER(Column)),
        ("num_texts", c.c_int), ("texts", c.c_void_p)]

library = c.CDLL(str(Path(plugin_path()) / "libhlgauss_h5md.so"), mode=os.RTLD_LOCAL)
assert library.hlgauss_h5md_interface() == 1
library.hlgauss_h5md_open.restype = c.c_void_p
counter = c.CDLL(os.environ["LD_PRELOAD"])
writes_left = c.c_long.in_dll(counter, "writes_left")
error = c.create_string_buffer(2048)
N = 5

def checked(failed):
    assert not failed, error.value

def write(path, start, stop, report):
    '''Append the frames after step `start`; `report` the last finished step.'''
    columns = (Column * 2)(
        Column(b"id", b"", b"", b"", b"", 1.0, 1, 1, 0),
        Column(b"position", b"Angstrom", b"", b"", b"", 1.0, 3, 3, 0))
    settings = Settings(str(path).encode(), 1, b"1", b"metal", b"ps", b"Angstrom", (1, 1, 1), start,
        1, N, 0, 2, columns, 0, None)
    found = (c.c_int64 * 3)()
    file = library.hlgauss_h5md_open(c.byref(settings), found, error, len(error))
    assert file, error.value
    ids = (c.c_int32 * N)(*range(N))
    edges, origin = (c.c_double * 9)(*[1.0] * 9), (c.c_double * 3)()
    for step in range(start + 1 if found[0] else start, stop):
        checked(library.hlgauss_h5md_begin_frame(c.c_void_p(file), c.c_int64(step),
            c.c_double(step), c.c_int64(N), edges, origin, error, len(error)))
        values = (c.c_float * (3 * N))(*[step] * 3 * N)
        for k, data in enumerate((ids, values)):
            checked(library.hlgauss_h5md_write_column(c.c_void_p(file), k, data, error, len(error)))
        checked(library.hlgauss_h5md_end_frame(c.c_void_p(file), error, len(error)))
        report(step)
    checked(library.hlgauss_h5md_close(c.c_void_p(file), error, len(error)))

def child(path, start, stop, limit):
    '''Last step that a process finished which died at its write number `limit`; how it ended.'''
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        writes_left.value = limit
        try:
            write(path, start, stop, lambda step: os.write(writer, step.to_bytes(4, "little")))
            os._exit(0)
        except BaseException as problem:
            print(problem, flush=True)
            os._exit(3)
    os.close(writer)
    told = os.fdopen(reader, "rb").read()
    _, status = os.waitpid(pid, 0)
    assert status in (0, 9), status
    return int.from_bytes(told[-4:], "little") if told else -1, status == 9

def check(path, least, case):
    with open_trajectory(path) as trajectory:
        steps = trajectory.steps
        assert steps.tolist() == list(range(len(steps))), (case, steps)
        assert len(steps) > least, (case, len(steps), least)
        assert (trajectory.values("position") == steps[:, None, None]).all(), case
        assert (trajectory.values("id") == range(N)).all() and (trajectory.times == steps).all()
        return len(steps)

def every_death(old, start, stop, least):
    '''Die at write 0, 1, 2, ... until a run finishes; after each, check and append once more.

    Returns the number of deaths and how many frames they left.'''
    limit, kinds = 0, set()
    while True:
        path = Path("try.h5md")
        path.unlink(missing_ok=True)
        if old:
            shutil.copyfile(old, path)
        last, died = child(path, start, stop, limit)
        if path.exists():
            kinds.add(check(path, max(last, least), (limit, last)))
            child(path, min(start, 2), 9, -1)
            assert check(path, 7, (limit, "again")) == 9
        for litter in Path().glob("try.h5md.new*"):
            litter.unlink()
        if not died:
            return limit, *sorted(kinds)
        limit += 1

print("new", *every_death(None, 0, 4, -1))
write("old.h5md", 0, 252, lambda step: None)
check("old.h5md", 251 - 1, "old")
print("cut", *every_death("old.h5md", 230, 232, 230))
print("cut_deep", *every_death("old.h5md", 3, 5, 3))
print("append", *every_death("old.h5md", 251, 260, 251))  # over a chunk of steps, an index node
"""


def test_death_at_every_single_write_loses_nothing(tmp_path):
    """Not at random moments but at all of them: making a file, appending to it, cutting it."""
    (tmp_path / "counter.c").write_text(WRITE_COUNTER)
    compile_it = ["cc", "-shared", "-fPIC", "-o", "counter.so", "counter.c", "-ldl"]
    subprocess.run(compile_it, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", DIE_AT_EVERY_WRITE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "counter.so")},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    deaths = {name: int(count) for name, count, *_ in map(str.split, done.stdout.splitlines())}
    assert set(deaths) == {"new", "cut", "cut_deep", "append"} and min(deaths.values()) > 20
    assert "252" in done.stdout.splitlines()[1], "some died before the cut"


def test_reading_while_it_is_written_and_keeping_a_second_writer_out(tmp_path):
    process = start_endless(tmp_path)
    try:
        with open_trajectory(tmp_path / "traj.h5md") as trajectory:
            first = trajectory.num_frames
            assert (trajectory[first - 1]["v_now"] == trajectory[first - 1].step).all()
            with h5py.File(tmp_path / "traj.h5md") as file:  # as any other program would
                assert len(file["particles/trajectory/id/value"]) >= first
            deadline = time.monotonic() + 60
            while trajectory.refresh() < first + 5:
                assert time.monotonic() < deadline
            last = trajectory.num_frames - 1
            assert (trajectory[last]["v_now"] == trajectory.steps[last]).all()
        for mode in ("append", "overwrite"):
            other = ENDLESS.replace("overwrite", mode).replace("run 1", "reset_timestep 9\nrun 1")
            other = other.replace("reset_timestep 9\n", "")
            assert "is being written by another run" in error_line(
                lmp(tmp_path, other.replace("1000000", "1"), ok=False)
            )
    finally:
        kill(process)
    check_every_frame(tmp_path / "traj.h5md")


@pytest.mark.parametrize("order", ["fix before halt", "halt before fix"])
@pytest.mark.parametrize("after", ["soft", "continue"])
def test_frame_that_triggered_fix_halt_is_in_the_file(tmp_path, order, after):
    fixes = [
        "fix traj all hlgauss/h5md 1000 traj.h5md id x c_pe v_twice",
        f"fix stop all halt 3 v_late > 10 error {after} message no",
    ]
    if order == "halt before fix":
        fixes.reverse()
    lmp(
        tmp_path,
        crystal()
        + "fix nve all nve\nvariable late equal step\nvariable twice atom 2*c_pe\n"
        + "\n".join(fixes)
        + "\nrun 100\n",
        ranks=2 if after == "soft" else 1,
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0, 12]
        energies = trajectory[1]["c_pe"]
        assert np.isfinite(energies).all() and np.ptp(energies) > 0
        np.testing.assert_allclose(trajectory[1]["v_twice"], 2 * energies, rtol=1e-6)


def test_hard_halt_leaves_the_frames_that_were_due(tmp_path):
    lmp(
        tmp_path,
        crystal()
        + "fix nve all nve\nvariable late equal step\n"
        + "fix traj all hlgauss/h5md 4 traj.h5md id x c_pe\n"
        + "fix stop all halt 4 v_late > 10 error hard\nrun 100\n",
        ok=False,
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0, 4, 8, 12], "written before the halt was asked"
        assert np.ptp(trajectory[-1]["c_pe"]) > 0


def test_values_that_do_not_exist_when_a_timeout_ends_the_run_are_missing(tmp_path):
    output = lmp(
        tmp_path,
        crystal()
        + "fix nve all nve\ntimer timeout 0:00:01 every 7\n"
        + "fix traj all hlgauss/h5md 1000000 traj.h5md id x c_pe c_n\nthermo 1000000\n"
        + "run 1000000\n",
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert len(trajectory) == 2 and 0 < trajectory.steps[1] < 1000000
        assert np.isfinite(trajectory[1]["position"]).all()
        assert np.isfinite(trajectory[1]["c_n"]).all(), "needs no energies"
        assert np.isnan(trajectory[1]["c_pe"]).all()
    assert "LAMMPS has no values of 'c_pe'" in output
