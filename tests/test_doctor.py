"""lmp-hl doctor passes a good installation, and names the cause in a broken copy of it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from lmp_hl import doctor, lammps

BUILD = "hlgauss_build.txt"


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """A copy of the plugin's folder that doctor and every LAMMPS it starts use."""
    folder = tmp_path / "plugin"
    shutil.copytree(lammps.plugin_path(), folder)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import lmp_hl.lammps\nlmp_hl.lammps.plugin_path = lambda: {str(folder)!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setattr(lammps, "plugin_path", lambda: str(folder))
    return folder


def rename_needed(library: Path, name: str) -> None:
    """Make a library need NAME.sX instead of NAME.so."""
    content, changes = re.subn(rb"(%s\w*)\.so" % name.encode(), rb"\1.sX", library.read_bytes())
    assert changes
    library.write_bytes(content)


def test_good_installation_passes_every_check(monkeypatch, capsys):
    monkeypatch.delenv("HLGAUSS_DISABLE", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "problem" not in {line.split()[0] for line in lines}
    assert lines[-1].startswith("0 problems") and lines[-1].endswith("lmp-hl works")
    text = "\n".join(lines)
    for name in ("plugin in LAMMPS", "run on 1 rank", "run on 2 ranks", "trajectory"):
        assert f"ok       {name}" in text


def test_missing_torch_part_is_named_and_does_not_stop_the_other_checks(plugin, capsys):
    (plugin / "libhlgauss_torch.so").unlink()
    found = doctor.examine(["plugin files", "plugin in LAMMPS", "run on 1 rank"])
    assert [f.level for f in found.values()] == ["problem", "ok", "problem"]
    assert found["plugin files"].text.startswith("libhlgauss_torch.so missing")
    assert "reinstall" in found["plugin files"].cure
    assert "cannot open" in found["run on 1 rank"].text
    assert "what to do: reinstall" in capsys.readouterr().out


def test_missing_plugin_is_named_where_lammps_only_knows_no_keyword(plugin):
    (plugin / lammps.PLUGIN_NAME).unlink()
    found = doctor.examine(["plugin files", "plugin in LAMMPS", "run on 1 rank"])
    assert found["plugin files"].text.startswith("hlgaussplugin.so missing")
    assert found["plugin in LAMMPS"].level == "problem"
    assert "LAMMPS did not load the plugin" in found["run on 1 rank"].text


@pytest.mark.parametrize(
    ("library", "needed", "cure"),
    [
        ("libhlgauss_torch.so", "libtorch_cpu", "reinstall"),
        ("libhlgauss_h5md.so", "libhdf5", "libhdf5-dev"),
        ("hlgaussplugin.so", "libm", "reinstall"),
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


def test_stale_build_is_named(plugin):
    assert doctor.examine(["built against"])["built against"].level == "ok"
    (plugin / BUILD).write_text("torch 2.1.0+cpu\nlammps 20230802\n")
    finding = doctor.examine(["built against"])["built against"]
    assert finding.level == "problem"
    assert "torch 2.1.0+cpu, but" in finding.text and "lammps 20230802, but" in finding.text


def test_switched_off_plugin_is_named(monkeypatch):
    monkeypatch.setenv("HLGAUSS_DISABLE", "1")
    found = doctor.examine(["settings", "plugin in LAMMPS"])
    assert found["settings"].text.startswith("HLGAUSS_DISABLE=1")
    assert found["plugin in LAMMPS"].level == "problem"
    assert "HLGAUSS_DISABLE=1" in found["plugin in LAMMPS"].text


def test_second_plugin_on_the_plugin_path_is_named(plugin, tmp_path, monkeypatch):
    shutil.copytree(plugin, tmp_path / "older")
    monkeypatch.setenv("LAMMPS_PLUGIN_PATH", str(tmp_path / "older"))
    finding = doctor.examine(["settings"])["settings"]
    assert finding.level == "warning" and "second lmp-hl plugin" in finding.text


def test_launcher_of_another_mpi_is_named(tmp_path, monkeypatch):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    mpirun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = doctor.examine(["MPI"])["MPI"]
    assert finding.level == "warning"
    assert f"{mpirun}, first on PATH, is of Open MPI" in finding.text
    assert str(lammps.program("mpirun")) in finding.cure


def test_processes_that_do_not_find_each_other_are_named(monkeypatch):
    # as under a launcher of Slurm whose protocol LAMMPS's MPI does not speak
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    finding = doctor.examine(["launcher"])["launcher"]
    assert finding.level == "problem" and "2 processes, and LAMMPS sees 1 rank" in finding.text
