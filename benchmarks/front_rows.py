"""The rows of benchmarks/front.py: which potentials, how they are made, what evaluates them."""

from dataclasses import dataclass, field
from typing import Any, Final

MINUTES: Final = 20.0  # of one core, for every training
CUTOFF: Final = 5.0  # Å, of everything that is trained here and names no other


@dataclass(frozen=True)
class Crystal:
    """What is timed: about 864 atoms, as many as fit a cuboid of conventional cells."""

    lattice: str  # as LAMMPS calls it
    constant: float  # Å
    cells: tuple[int, int, int]

    @property
    def num_atoms(self) -> int:
        """In the box."""
        basis = {"fcc": 4, "bcc": 2, "diamond": 8}[self.lattice]
        return basis * self.cells[0] * self.cells[1] * self.cells[2]


CRYSTALS: Final = {
    "Cu": Crystal("fcc", 3.62, (6, 6, 6)),
    "Mo": Crystal("bcc", 3.16, (6, 8, 9)),
    "Si": Crystal("diamond", 5.47, (4, 5, 5)),
}


@dataclass(frozen=True)
class Potential:
    """How a potential is made.

    maker: a key of front_peers.MAKERS; about: for the table; runtimes: each is a row, evaluated
    from a file of its own; settings: what the maker wants to know.
    """

    maker: str
    about: str
    runtimes: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def _ours(
    preset: str, channels: int, l_max: int = 3, head: str = "hlgauss", **others: float
) -> Potential:
    words = {"hlgauss": "HL-Gauss", "scalar": "scalar head (control)"}[head]
    said = "".join(f", {key} = {value:g}" for key, value in others.items())
    return Potential(
        "lmp-hl",
        f"{preset}, {channels} channels, l = {l_max}{said}, {words}",
        ("torchscript", "aoti"),
        {"preset": preset, "channels": channels, "l_max": l_max, "head": head, **others},
    )


POTENTIALS: Final[dict[str, Potential]] = {
    "local-16": _ours("local", 16, l_max=2),
    "local-64": _ours("local", 64),
    "local-64-scalar": _ours("local", 64, head="scalar"),
    "mp-8": _ours("mp", 8, l_max=2, cutoff=3.5, hidden=16, message_channels=2, num_bins=64),
    "mp-16": _ours("mp", 16, cutoff=3.5),
    "mp-32": _ours("mp", 32, cutoff=3.5),
    "mp-32-scalar": _ours("mp", 32, head="scalar", cutoff=3.5),
    "mp-32-wide": _ours("mp", 32),
    "snap": Potential("lammps", "SNAP of Zuo et al. 2020, as published", ("lammps",)),
    "qsnap": Potential(
        "lammps", "quadratic SNAP of the same", ("lammps",), {"suffix": ".quadratic"}
    ),
    "deepmd": Potential("deepmd", "DeePMD-kit se_e2_a", ("frozen", "compressed")),
    "mace-64x0e": Potential(
        "mace", "MACE, 2 layers, 64x0e", ("torchscript", "eager"), {"channels": 64}
    ),
    "allegro": Potential("allegro", "Allegro, 2 layers, l = 1, 32 tensor features", ("aoti",)),
}


@dataclass(frozen=True)
class Row:
    """One point of the figure: element/potential/runtime."""

    element: str
    name: str
    runtime: str

    @property
    def full(self) -> str:
        """What --rows matches."""
        return f"{self.element}/{self.name}/{self.runtime}"

    @property
    def potential(self) -> Potential:
        """Its entry in POTENTIALS."""
        return POTENTIALS[self.name]


ROWS: Final = tuple(
    Row(element, name, runtime)
    for element in CRYSTALS
    for name, potential in POTENTIALS.items()
    for runtime in potential.runtimes
)
