"""Every figure in one style: functions take arrays and a path, write a PNG and return the path.

Nothing is read here. Units are Å, eV, ps and nat unless a label says otherwise.
"""

from .atoms import atoms_3d
from .evaluation import parity, rankings, uncertainty_error
from .style import field_label
from .training import learning_curves
from .trajectory import by_coordination, distribution_over_time, profile, rdf, time_series

__all__ = [
    "atoms_3d",
    "by_coordination",
    "distribution_over_time",
    "field_label",
    "learning_curves",
    "parity",
    "profile",
    "rankings",
    "rdf",
    "time_series",
    "uncertainty_error",
]
