"""HL-Gauss potentials: categorical machine-learned potentials for LAMMPS and ASE.

``lmp_hl.load("hl.pt")`` reads a model file, ``lmp_hl.HLCalculator("hl.pt")`` is its ASE calculator,
``lmp_hl.h5md.open_trajectory("traj.h5md")`` opens a trajectory. Importing the package imports none
of them: LAMMPS imports it on every rank to find the plugin.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmp_hl import h5md as h5md
    from lmp_hl.calculator import HLCalculator as HLCalculator
    from lmp_hl.model_file import load as load

__version__ = "0.1.0"
__all__ = ["HLCalculator", "__version__", "h5md", "load"]

_HOME = {"load": "lmp_hl.model_file", "HLCalculator": "lmp_hl.calculator", "h5md": "lmp_hl.h5md"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    module = importlib.import_module(_HOME[name])
    return module if name == "h5md" else getattr(module, name)
