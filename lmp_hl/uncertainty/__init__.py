"""Ways to know when a potential is wrong: one file each, behind one interface (base.py).

`model.uncertainty` in a training configuration names those that a potential carries. They see the
features of an atom and the output of its energy head, are fitted after training on frozen features
(some are trained with the network), travel in the model file and return per-atom fields to Python
and LAMMPS alike.
"""

from collections.abc import Sequence

from torch import nn

from .base import Atoms, Loss, Method, Sizes
from .density import LatentDensity
from .evidential import Evidential
from .grade import ExtrapolationGrade
from .llpr import LastLayerRigidity
from .mean_variance import MeanVariance
from .scales import Scales
from .spherical import SphericalLogits
from .xyz import CartesianHistograms

METHODS: dict[str, type[Method]] = {
    "scales": Scales,
    "mean_variance": MeanVariance,
    "evidential": Evidential,
    "density": LatentDensity,
    "grade": ExtrapolationGrade,
    "llpr": LastLayerRigidity,
    "spherical": SphericalLogits,
    "xyz": CartesianHistograms,
}
DEFAULT = ("scales",)

__all__ = ["DEFAULT", "METHODS", "Atoms", "Loss", "Method", "Sizes", "make_methods"]


def make_methods(names: Sequence[str], sizes: Sizes) -> nn.ModuleDict:
    """Unfitted methods by name.

    Raises:
        ValueError: a name that there is none of.
    """
    for name in names:
        if name not in METHODS:
            raise ValueError(f"model.uncertainty: no method '{name}'; known: {', '.join(METHODS)}")
    return nn.ModuleDict({name: METHODS[name](sizes) for name in names})
