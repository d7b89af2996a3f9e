"""The rows of benchmarks/uncertainty.py: which methods, trained how, on what, with which seeds."""

from dataclasses import dataclass
from typing import Any, Final

from lmp_hl import uncertainty

ENSEMBLE: Final = 5
NOISE: Final = (20, 100)  # meV/Å, see uncertainty_data.write_noisy


# The table on the method itself is made of shorter trainings: as many frames are seen in each.
SHORT: Final = {"training": {"epochs": 40, "warmup_epochs": 8}}


def _frames(number: int) -> dict[str, Any]:
    epochs = round(40 * 450 / number)
    return {
        "data": {"max_frames": number},
        "training": {"epochs": epochs, "warmup_epochs": epochs // 5},
    }


def _scalar(changes: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "model": {"head": "scalar"}}


def _noise(size: int) -> dict[str, Any]:
    return {"data": {"train": f"train_noise{size}.xyz"}}


# name -> (for the table, what differs from the configuration besides SHORT)
ABLATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "short": ("128 bins, sigma 0.75 w (bin width), 450 frames", {}),
    **{f"bins{n}": (f"{n} bins", {"model": {"num_bins": n}}) for n in (16, 32, 64, 256, 512)},
    **{f"sigma{s:g}": (f"sigma {s:g} w", {"model": {"sigma": s}}) for s in (0.25, 0.5, 1.0, 2.0)},
    "two_hot": ("two-hot targets", {"model": {"target": "two_hot"}}),
    "one_hot": ("one-hot targets", {"model": {"target": "one_hot"}}),
    **{f"frames{n}": (f"{n} training frames", _frames(n)) for n in (50, 100, 200)},
    **{f"noise{n}": (f"{n} meV/Å of noise on the training labels", _noise(n)) for n in NOISE},
    "scalar_short": ("scalar, 450 frames", _scalar({})),
    **{f"scalar_frames{n}": (f"scalar, {n} frames", _scalar(_frames(n))) for n in (50, 100, 200)},
    **{f"scalar_noise{n}": (f"scalar, {n} meV/Å of noise", _scalar(_noise(n))) for n in NOISE},
}  # fmt: skip


# name -> what differs from the settings of the data set, benchmarks/uncertainty_*.yaml
TRAININGS: Final[dict[str, dict[str, Any]]] = {
    "hlgauss": {},
    "scalar": {"model": {"head": "scalar"}},
    # other heads and losses
    "mean_variance": {"model": {"head": "scalar", "uncertainty": ["mean_variance"]}},
    "evidential": {"model": {"head": "scalar", "uncertainty": ["evidential"]}},
    "committee": {"model": {"head": "committee"}},
    "committee_bootstrap": {"model": {"head": "committee"}, "loss": {"member_frames": "bootstrap"}},
    "svd_committee": {"model": {"head": "svd_committee"}},
    # controls of the categorical energy
    "latent": {"loss": {"energy_target": "latent"}},
    "pooled_probs": {"loss": {"energy_target": "pooled_probs"}},
    "pooled_logits": {"loss": {"energy_target": "pooled_logits"}},
    "sum": {"loss": {"energy_target": "sum"}},
    "no_cross_entropy": {"loss": {"cross_entropy": 0.0}},
    # members drawn from a distribution of the weights; SWAG goes on from the scalar twin
    "swag": {
        "model": {"head": "scalar"},
        "training": {
            "init_from": "scalar",
            "epochs": 30,
            "learning_rate": 0.001,
            "posterior": {"method": "swag", "members": ENSEMBLE, "learning_rate": 0.001},
        },
    },
    "ivon": {
        "model": {"head": "scalar"},
        "training": {
            "learning_rate": 0.1,
            "posterior": {"method": "ivon", "members": ENSEMBLE},
        },
    },
    **{name: {**SHORT, **changes} for name, (_, changes) in ABLATIONS.items()},
}


@dataclass(frozen=True)
class Method:
    """How a row gets its uncertainty.

    about: for the table; training: key of TRAININGS; fit: uncertainty methods fitted to the trained
    network, () takes the network with those it was trained with; members: > 1 is the spread of
    that many networks with seeds 0, 1, ..., of those `sampled` by one training, or of the heads of
    a committee that is `split`.
    """

    about: str
    training: str
    fit: tuple[str, ...] = ()
    members: int = 1
    sampled: bool = False
    split: bool = False


METHODS: Final[dict[str, Method]] = {
    "default": Method(
        "HL-Gauss energy and the default uncertainty", "hlgauss", uncertainty.DEFAULT
    ),
    "scalar": Method("scalar twin with the same uncertainty", "scalar", uncertainty.DEFAULT),
    "ensemble": Method(f"spread of {ENSEMBLE} scalar twins", "scalar", members=ENSEMBLE),
    "swag": Method(
        f"spread of {ENSEMBLE} samples of SWAG, scalar", "swag", members=ENSEMBLE, sampled=True
    ),
    "ivon": Method(
        f"spread of {ENSEMBLE} samples of IVON, scalar", "ivon", members=ENSEMBLE, sampled=True
    ),
    "llpr": Method("last-layer rigidity, HL-Gauss energy", "hlgauss", ("llpr",)),
    "llpr_scalar": Method("last-layer rigidity, scalar energy", "scalar", ("llpr",)),
    "mean_variance": Method("joint energy-force likelihood", "mean_variance"),
    "evidential": Method("equivariant evidential forces", "evidential"),
    "committee": Method("committee of heads on one backbone", "committee", uncertainty.DEFAULT),
    "committee_bootstrap": Method(
        "the same, each on frames of its own", "committee_bootstrap", uncertainty.DEFAULT
    ),
    "svd_committee": Method("singular-value ensemble", "svd_committee", uncertainty.DEFAULT),
    "committee_forces": Method("spread of the forces of its heads", "committee", split=True),
    "spherical": Method("control: force error's logits on the sphere", "hlgauss", ("spherical",)),
    "xyz": Method("control: heads on the x, y and z axes", "hlgauss", ("xyz",)),
    "density": Method("mixture density of latent features", "hlgauss", ("density",)),
    "grade": Method("D-optimality grade of latent features", "hlgauss", ("grade",)),
    "latent": Method("latent targets of the atoms' energies", "latent", uncertainty.DEFAULT),
    "pooled_probs": Method("control: mean of probabilities", "pooled_probs", uncertainty.DEFAULT),
    "pooled_logits": Method("control: mean of logits", "pooled_logits", uncertainty.DEFAULT),
    "sum": Method("control: cross-entropy of the sum", "sum", uncertainty.DEFAULT),
    "no_cross_entropy": Method(
        "control: histogram without cross-entropy", "no_cross_entropy", uncertainty.DEFAULT
    ),
    **{name: Method(about, name, uncertainty.DEFAULT) for name, (about, _) in ABLATIONS.items()},
}


@dataclass(frozen=True)
class Row:
    """One line of the tables: dataset/method/seed."""

    dataset: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What --rows matches."""
        return f"{self.dataset}/{self.method}/{self.seed}"

    def trainings(self) -> list[tuple[str, str, int]]:
        """(dataset, training, seed) of every network it needs, after those they start from."""
        method = METHODS[self.method]
        several = method.members > 1 and not method.sampled
        seeds = range(method.members) if several else [self.seed]
        own = [(self.dataset, method.training, seed) for seed in seeds]
        return [before for t in own if (before := start_of(t)) is not None] + own


def start_of(training: tuple[str, str, int]) -> tuple[str, str, int] | None:
    """The training whose network another one starts from."""
    dataset, name, seed = training
    before = TRAININGS[name].get("training", {}).get("init_from")
    return None if before is None else (dataset, before, seed)


SEEDS: Final = (0, 1, 2)
MAIN: Final = ("default", "scalar", "llpr", "mean_variance")
ROWS: Final = (
    *(Row(d, m, seed) for d in ("3bpa", "si") for m in MAIN for seed in SEEDS),
    *(Row(d, "ensemble", 0) for d in ("3bpa", "si")),
    *(Row("3bpa", m, 0) for m in METHODS if m not in (*MAIN, "ensemble")),
    *(
        Row(d, m, 0)
        for d in ("cu", "mo", "nbmotaw", "acac", "water")
        for m in ("default", "ensemble", "llpr")
    ),
)
