"""LAMMPS as a process: from Python, under mpirun, in partitions, several at once, and failing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from lammps_cases import Atoms, crystal, export, read_dump

from lmp_hl import lammps as lmp_hl_lammps

# two kinds of run, the second of another model at another temperature
KINDS = {"a": ("hl.pt", 300), "b": ("mp.pt", 900)}
RUN = """
units metal
atom_modify map array
box tilt large
processors * 1 1
read_data large.data
pair_style mliap model {model}
pair_coeff * * Si O NULL
velocity all create {temperature} 11
fix nve all nve
timestep 0.001
compute u all hlgauss/atom entropy force_std
compute most all reduce max c_u[2]
thermo 10
thermo_style custom step pe c_most
fix traj all hlgauss/h5md 10 {out}.h5md id c_u[1] c_u[2] precision double overwrite
run 10
"""  # goes on with `run 10`
DUMP = """
write_dump all custom {out}.dump id x y z fx fy fz c_u[1] c_u[2] modify format float %.17g
print "$(pe:%.17g) $(c_most:%.17g)" file {out}.thermo
"""


def script(kind: str, out: str) -> str:
    model, temperature = KINDS[kind]
    return RUN.format(model=model, temperature=temperature, out=out)


# --- what a script does with a LAMMPS object; written beside the data as session.py --------------
SESSION = '''
"""One rank of a LAMMPS run driven from Python."""

import numpy as np
from mpi4py import MPI
from lammps import LMP_STYLE_ATOM, LMP_STYLE_GLOBAL, LMP_TYPE_ARRAY, LMP_TYPE_SCALAR, lammps

world = MPI.COMM_WORLD


def start():
    return lammps(cmdargs=["-screen", "none", "-log", "none"])


def rows(lmp):
    """All atoms' id, x, f and fields, read where they are and put together on rank 0."""
    n = lmp.extract_setting("nlocal")
    fields = lmp.numpy.extract_compute("u", LMP_STYLE_ATOM, LMP_TYPE_ARRAY)
    columns = [lmp.numpy.extract_atom(name)[:n] for name in ("id", "x", "f")]
    local = np.column_stack([*columns, fields[:n]]) if n else np.empty((0, 9))
    parts = world.gather(local)
    if world.rank > 0:
        return None
    table = np.concatenate(parts)
    return table[np.argsort(table[:, 0])]


def results(lmp):
    """rows, the two fields by LAMMPS's own gather, energy and greatest force_std."""
    table = rows(lmp)
    gathered = np.array(lmp.gather("c_u", 1, 2)).reshape(-1, 2)
    most = lmp.extract_compute("most", LMP_STYLE_GLOBAL, LMP_TYPE_SCALAR)
    return table, gathered, np.array([lmp.get_thermo("pe"), most])


def save(name, found):
    if world.rank == 0:
        np.savez(name, *found)
'''

FROM_PYTHON = """
import json, resource, sys
from session import *
lmp = start()
lmp.commands_string(open("in.a").read())
lmp.command("run 10")
save(f"python.{world.size}.npz", results(lmp))

# errors that all ranks meet reach all ranks as exceptions, and the same object works on
cases, messages = json.load(open("cases.json")), {}
for name, (limit, commands) in cases.items():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = ""
    try:
        lmp.command("clear")
        lmp.commands_string(open("in.a").read())
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        for command in commands:
            lmp.command(command)
    except Exception as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    messages[name] = world.gather(said)
lmp.command("clear")
lmp.commands_string(open("in.a").read())
lmp.command("run 10")
save(f"again.{world.size}.npz", results(lmp))
lmp.close()
if world.rank == 0:
    json.dump(messages, open(f"messages.{world.size}.json", "w"))
"""

# name: (limit of file sizes or 0, commands in a running session, words of the message)
ERRORS = {
    "damaged model": (0, ["pair_style mliap model truncated.pt"], "is truncated"),
    "no model": (0, ["pair_style hlgauss model nowhere.pt"], "cannot open model file"),
    "words": (0, ["pair_style mliap model hl.pt device cuda:-1"], "cannot use 'device cuda:-1'"),
    "long word": (
        0,
        ["pair_style hlgauss model hl.pt device " + "9" * 5000],
        "cannot use 'device 999",
    ),
    "element": (0, ["pair_coeff * * Si Xx NULL"], "element Xx (type 2)"),
    "field": (0, ["compute v all hlgauss/atom nothing"], "no field 'nothing'"),
    "number": (0, ["fix g all hlgauss/h5md 1e99 g.h5md id"], "1e99"),
    "column": (0, ["fix g all hlgauss/h5md 1 g.h5md c_u[99999999999999999999]"], "c_u[9999"),
    "folder": (0, ["fix g all hlgauss/h5md 1 no/g.h5md id", "run 1"], "cannot create no/g.h5md"),
    "full disk": (
        300_000,  # of a file; MPICH's own shared memory is there already
        ["fix g all hlgauss/h5md 1 g.h5md id x v f precision double overwrite", "run 100"],
        "no room for the frame",
    ),
}

ALTERNATING = """
import torch
values = torch.linspace(0, 1, 1000, dtype=torch.float64, requires_grad=True)
def gradient():
    return torch.autograd.grad(torch.linalg.norm(torch.outer(values, values).sin()), values)[0]
before = gradient()
from session import *
import h5py
objects = {name: start() for name in "ab"}
torch.set_num_threads(2)  # LAMMPS sets OpenMP's default when it opens; what is set later must stay
for name, lmp in objects.items():
    lmp.commands_string(open(f"in.{name}").read())
for name, lmp in objects.items():
    lmp.command("run 10")
for name, lmp in objects.items():
    save(f"alternating.{name}.npz", results(lmp))
    lmp.close()
for name in objects:
    with h5py.File(f"{name}.h5md") as file:
        assert file["particles/trajectory/entropy/step"][()].tolist() == [0, 10, 20]
assert torch.equal(before, gradient()) and torch.get_num_threads() == 2
"""

# one model of 8 MB and some MB of neighbours; a leak of either shows in one cycle
MEMORY = """
import gc, json
from session import *
resident = []
for cycle in range(12):
    lmp = start()
    lmp.commands_string(open("in.memory").read())
    lmp.close()
    del lmp
    gc.collect()
    with open("/proc/self/statm") as file:  # but for code, which the system drops and reads again
        pages = [int(word) for word in file.read().split()]
    resident.append((pages[1] - pages[2]) * 4096 / 1e6)
import torch
assert torch.arange(11).sum().item() == 55
print(json.dumps(resident))
"""


def python(folder: Path, num_ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python on MPI ranks; a run that hangs fails the test."""
    launcher = [str(lmp_hl_lammps.program("mpirun")), "-np", str(num_ranks)]
    command = [*(launcher if num_ranks > 1 else []), sys.executable, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def lmp(folder: Path, num_ranks: int, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "in.lmp").write_text(text)
    command = lmp_hl_lammps.command(num_ranks, "-in", "in.lmp", "-log", "none", *words)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    good = export(path / "hl.pt", 1)
    export(path / "mp.pt", 2)
    export(path / "heavy.pt", 1, card="x" * 8_000_000)
    (path / "truncated.pt").write_bytes(good.read_bytes()[:-2000])
    crystal(4, triclinic=True, repeat=5).write(path / "large.data")
    for kind in KINDS:
        (path / f"in.{kind}").write_text(script(kind, kind))
    memory = script("a", "memory").replace("hl.pt", "heavy.pt")
    memory = memory.replace("large.data", "large.data\nreplicate 3 3 3").replace("run 10", "run 1")
    (path / "in.memory").write_text(memory)
    (path / "session.py").write_text(SESSION)
    cases = {name: case[:2] for name, case in ERRORS.items()}
    (path / "cases.json").write_text(json.dumps(cases))
    programs = {"python": FROM_PYTHON, "alternating": ALTERNATING, "memory": MEMORY}
    for name, text in programs.items():
        (path / f"{name}.py").write_text(text)
    return path


@pytest.fixture(scope="module")
def scripts(folder: Path) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(kind, ranks) -> (rows, thermo) of LAMMPS reading its input from a file."""
    found = {}
    for ranks in (1, 2):
        text = ""
        for kind in KINDS:
            out = f"{kind}.{ranks}"
            text += "clear\n" + script(kind, out) + "run 10\n" + DUMP.format(out=out)
        done = lmp(folder, ranks, text)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        for kind in KINDS:
            thermo = np.loadtxt(folder / f"{kind}.{ranks}.thermo")
            found[kind, ranks] = (read_dump(folder / f"{kind}.{ranks}.dump"), thermo)
    return found


def check(path: Path, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """The same library on the same ranks with the same commands: every bit is the same."""
    rows, gathered, thermo = np.load(path).values()
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(gathered, expected[0][:, 7:])
    np.testing.assert_array_equal(thermo, expected[1])


def test_results_compared_are_no_zeros_and_differ(scripts) -> None:
    for rows, thermo in scripts.values():
        assert len(rows) == 125 and np.abs(rows[:, 4:7]).max() > 0.1
        assert rows[:, 7:].std(0).min() > 0.01 and thermo[1] == rows[:, 8].max()
    assert np.abs(scripts["a", 1][0] - scripts["b", 1][0]).max() > 0.1


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def driven(request: pytest.FixtureRequest, folder: Path) -> int:
    """Runs LAMMPS from Python on this many ranks: a run, all errors, and the run again."""
    done = python(folder, request.param, "-m", "mpi4py", "python.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return request.param


def test_python_drives_the_same_run_and_reads_the_same_uncertainty(folder, scripts, driven):
    check(folder / f"python.{driven}.npz", scripts["a", driven])


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_an_exception_on_every_rank(folder, driven, name):
    said = json.loads((folder / f"messages.{driven}.json").read_text())[name]
    assert len(said) == driven
    for message in said:
        assert "ERROR" in message and ERRORS[name][2] in message
        assert "c10::" not in message and len(message) < 6000


def test_after_errors_the_same_object_gives_the_same_results(folder, scripts, driven):
    check(folder / f"again.{driven}.npz", scripts["a", driven])


def test_two_objects_in_turn_beside_torch_and_h5py(folder, scripts):
    done = python(folder, 1, "alternating.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for kind in KINDS:
        check(folder / f"alternating.{kind}.npz", scripts[kind, 1])


def test_partitions_with_models_and_temperatures_of_their_own(folder, scripts):
    text = "variable model world hl.pt mp.pt\nvariable temperature world 300 900\n"
    text += "variable out world part.a part.b\n"
    run = RUN.format(model="${model}", temperature="${temperature}", out="${out}")
    text += run + "run 10\n" + DUMP.format(out="${out}")
    words = ("-partition", "2x1", "-plog", "none", "-pscreen", "none")
    done = lmp(folder, 2, text, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for kind in KINDS:
        rows, thermo = scripts[kind, 1]
        np.testing.assert_array_equal(read_dump(folder / f"part.{kind}.dump"), rows)
        np.testing.assert_array_equal(np.loadtxt(folder / f"part.{kind}.thermo"), thermo)
        with h5py.File(folder / f"part.{kind}.h5md") as file:
            written = file["particles/trajectory/entropy/value"][-1]
        np.testing.assert_array_equal(written, rows[:, 7])


def test_opening_and_closing_ten_times_keeps_no_memory(folder, monkeypatch):
    monkeypatch.setenv("MALLOC_PERTURB_", "0")  # filling memory makes it resident
    done = python(folder, 1, "memory.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    resident = json.loads(done.stdout.splitlines()[-1])  # MB after each cycle
    # The first cycle warms up (code, torch's profiling run). A model that stays would add 8 MB or
    # more in each cycle; the allocator keeps up to 20 MB here and there, hence the least of five.
    assert min(resident[-5:]) - min(resident[1:6]) < 8, resident


# --- one rank fails ------------------------------------------------------------------------------
FAIL = """
units metal
processors 2 1 1
read_data {side}.data
pair_style mliap model limited.pt
pair_coeff * * Si O NULL
fix nve all nve
run 5
"""
# what a rank says last may never leave a launcher that is told to abort: so also to a file
PLAIN = """
from session import *
lmp = start()
try:
    lmp.commands_string(open("in.lmp").read())
except Exception as error:
    print(error, file=open("said.txt", "a"), flush=True)
    raise
print("survived", world.rank, flush=True)
"""
ABORTING = """
import traceback
from session import *
lmp = start()
try:
    lmp.commands_string(open("in.lmp").read())
except Exception as error:
    print(error, file=open("said.txt", "a"), flush=True)
    traceback.print_exc()
    world.Abort(1)
"""
KILLED = """
import os, signal
from session import *
lmp = start()
lmp.commands_string(open("in.a").read())
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)  # as when memory is exhausted
lmp.command("run 1000000")
"""


@pytest.fixture(scope="module")
def lopsided(folder: Path) -> Path:
    """Two systems, each with many atoms on one of two ranks and few on the other."""
    whole = crystal(4, repeat=5)
    middle = whole.cell[0, 0] / 2
    left = np.flatnonzero(whole.positions[:, 0] < middle)
    right = np.flatnonzero(whole.positions[:, 0] > middle + 1)[:2]
    keep = np.concatenate([left, right])
    atoms = Atoms(whole.positions[keep], whole.species[keep], whole.cell)
    atoms.write(folder / "rank0.data")
    mirrored = atoms.positions * [-1, 1, 1] + [2 * middle, 0, 0]
    Atoms(mirrored, atoms.species, atoms.cell).write(folder / "rank1.data")
    export(folder / "limited.pt", 1, refused=len(left))
    for name, text in (("plain", PLAIN), ("aborting", ABORTING), ("killed", KILLED)):
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", ["lmp", "python -m mpi4py", "python that calls Abort"])
def test_a_failing_rank_ends_the_run(lopsided, way, rank):
    text, said = FAIL.format(side=f"rank{rank}"), lopsided / "said.txt"
    said.write_text("")
    if way == "lmp":
        done = lmp(lopsided, 2, text)
    else:
        (lopsided / "in.lmp").write_text(text)
        words = ["-m", "mpi4py", "plain.py"] if "mpi4py" in way else ["aborting.py"]
        done = python(lopsided, 2, *words)
    output = done.stdout + done.stderr + said.read_text()
    assert done.returncode != 0 and "survived" not in output
    assert f"ERROR on proc {rank}" in output and f"ERROR on proc {1 - rank}" not in output
    assert "refused" in output


def test_a_killed_rank_ends_the_run(lopsided):
    done = python(lopsided, 2, "-m", "mpi4py", "killed.py")
    assert done.returncode != 0


# --- memory runs out -----------------------------------------------------------------------------
OUT_OF_MEMORY = '''
import resource, sys
from session import *


def said(text, megabytes=0):
    """What LAMMPS complains of, "" if nothing, with so much more address space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if megabytes:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 1_000_000, hard))
    try:
        lmp.commands_string(text)
        return ""
    except Exception as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


BOX = "clear\\nunits metal\\nbox tilt large\\nread_data large.data\\n"
PAIR = "pair_style mliap model {}\\npair_coeff * * Si O NULL\\n"
lmp = start()
assert not said(BOX + PAIR.format("hl.pt") + "run 0")
if sys.argv[1] == "model":
    print(said(PAIR.format("heavy.pt"), 5))
else:
    # a neighbour list of the same size first: LAMMPS itself does not survive when that fails
    assert not said(BOX + "replicate 8 8 8\\npair_style zero 4.0 full\\npair_coeff * *\\nrun 0\\n")
    assert not said(PAIR.format("hl.pt"))
    print(said("run 0", int(sys.argv[1])))
assert not said(BOX + PAIR.format("hl.pt") + "run 0")
print("works on")
'''


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("model", id="model file"),
        pytest.param("35", id="graph"),
        pytest.param("70", id="model"),
    ],
)
def test_memory_that_runs_out_is_an_exception(folder, where):
    (folder / "memory_out.py").write_text(OUT_OF_MEMORY)
    done = python(folder, 1, "memory_out.py", where)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "ERROR" in first and "memory" in first and last == "works on"
