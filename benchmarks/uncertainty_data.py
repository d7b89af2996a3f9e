"""Splits of the public data sets: which frames are trained on, validated on and far from both.

Each function takes the folder of the downloaded set and returns name -> frames: "train", "valid",
"id" (test frames like the training frames) and "ood" (others; missing where there are none), and
"isolated" where the set has isolated atoms. The validation frames are drawn once, whatever the seed
of a training, so that all members of an ensemble leave the same frames out.

What is decided about a method is decided on the sets for development. All their frames, "id" and
"ood" too, come from the training files of the others and are no test frames of theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from ase import Atoms
from ase.io import read, write

from lmp_hl.training.config import DataConfig
from lmp_hl.training.frames import read_frames
from lmp_hl.training.stress_labels import stress_offset

Split = dict[str, list[Atoms]]
DEFECTS: Final = ("Vacancy", "Surface")


def _read(path: Path) -> list[Atoms]:
    return list(read(path, ":"))


def _validation(frames: list[Atoms], fraction: float = 0.1) -> Split:
    """Draw a share of each config_type, at least one frame of it."""
    kinds: dict[str, list[int]] = {}
    for k, atoms in enumerate(frames):
        kinds.setdefault(str(atoms.info.get("config_type", "")), []).append(k)
    rng = np.random.default_rng(0)
    valid: set[int] = set()
    for _, members in sorted(kinds.items()):
        count = max(1, round(fraction * len(members)))
        valid.update(int(k) for k in rng.choice(members, count, replace=False))
    return {
        "train": [a for k, a in enumerate(frames) if k not in valid],
        "valid": [a for k, a in enumerate(frames) if k in valid],
    }


def _without(frames: list[Atoms], left_out: tuple[str, ...], wanted: bool) -> list[Atoms]:
    return [a for a in frames if (a.info["config_type"] in left_out) != wanted]


def threebpa(folder: Path) -> Split:
    """Train at 300 K; ID: test frames at 300 K, OOD: at 600 K."""
    return {
        **_validation(_read(folder / "train_300K.xyz")),
        "id": _read(folder / "test_300K.xyz"),
        "ood": _read(folder / "test_600K.xyz"),
        "isolated": _read(folder / "iso_atoms.xyz"),
    }


def _mlearn(folder: Path) -> tuple[list[Atoms], list[Atoms]]:
    """Training and test frames, with the stress that their labels lack where they lack one.

    Copper's stress labels are 15 meV/Å³ (24 kbar) from what its energies of strained cells say,
    Pulay stress; no potential can fit both. Molybdenum's and silicon's agree.
    """
    train, test = (folder / f"{name}.xyz" for name in ("train", "test"))
    labels = read_frames(train, DataConfig(train=(train,)), "train")
    found, sets = stress_offset(labels), (_read(train), _read(test))
    if found is not None and found.explains:
        for atoms in (a for frames in sets for a in frames if "stress" in a.calc.results):
            atoms.calc.results["stress"][:3] += found.value  # Voigt
    return sets


def without_defects(folder: Path) -> Split:
    """One element of mlearn without vacancies and surfaces; OOD: all of those, from both files."""
    train, test = _mlearn(folder)
    return {
        **_validation(_without(train, DEFECTS, True)),
        "id": _without(test, DEFECTS, True),
        "ood": _without([*train, *test], DEFECTS, False),
    }


def _pure(frames: list[Atoms], wanted: bool) -> list[Atoms]:
    elements = ("Nb", "Mo", "Ta", "W")
    return [a for a in frames if (a.info["config_type"].split("_")[0] in elements) == wanted]


def alloys(folder: Path) -> Split:
    """Nb, Mo, Ta, W: train on the elements (every fourth frame); OOD: test frames of binaries."""
    test = _read(folder / "test_elem_binary.xyz")
    return {
        **_validation(_pure(_read(folder / "train_no_multinary.xyz"), True)[::4]),
        "id": _pure(test, True),
        "ood": _pure(test, False),
    }


def acetylacetone(folder: Path) -> Split:
    """Train and test at 300 K."""
    return {
        **_validation(_read(folder / "train_300K.xyz")),
        "id": _read(folder / "test_MD_300K.xyz"),
        "isolated": _read(folder / "isolated_atoms.xyz"),
    }


def water(folder: Path) -> Split:
    """Train on every fourth frame; ID: the validation file, which follows training in time."""
    frames = _read(folder / "train.xyz")
    return {**_validation(frames[::4]), "id": _read(folder / "valid.xyz")}


def metal(folder: Path) -> Split:
    """One element of mlearn as it comes: its test frames are of the kinds that are trained on."""
    train, test = _mlearn(folder)
    return {**_validation(train), "id": test}


# sets for development ---------------------------------------------------------------------------
def _development(near: list[Atoms], far: list[Atoms]) -> Split:
    drawn = _validation(near, 0.2)
    return {**_validation(drawn["train"]), "id": drawn["valid"], "ood": far}


def _cold_and_hot(frames: list[Atoms]) -> tuple[list[Atoms], list[Atoms]]:
    """All but the third with the highest energies per atom, and that third."""
    energy = [a.get_potential_energy() / len(a) for a in frames]
    order = [frames[k] for k in np.argsort(energy, kind="stable")]
    cut = len(frames) - len(frames) // 3
    return order[:cut], order[cut:]


def hot_frames(folder: Path) -> Split:
    """A molecule's training frames at 300 K; OOD: the third with the highest energies."""
    isolated = next(folder.glob("iso*.xyz"))
    return {
        **_development(*_cold_and_hot(_read(folder / "train_300K.xyz"))),
        "isolated": _read(isolated),
    }


def hot_dynamics(folder: Path) -> Split:
    """Training frames of without_defects; OOD: the third of its dynamics with most energy."""
    frames = _without(_read(folder / "train.xyz"), DEFECTS, True)
    dynamics = ("AIMD-NVT",)
    cold, hot = _cold_and_hot(_without(frames, dynamics, False))
    return _development([*_without(frames, dynamics, True), *cold], hot)


def surfaces(folder: Path) -> Split:
    """Training frames of the elements Nb, Mo, Ta, W; OOD: their surfaces."""
    frames = _pure(_read(folder / "train_no_multinary.xyz"), True)
    kinds = [str(a.info["config_type"]).endswith("_Surface") for a in frames]
    near = [a for a, far in zip(frames, kinds, strict=True) if not far]
    return _development(near[::4], [a for a, far in zip(frames, kinds, strict=True) if far])


@dataclass(frozen=True)
class Dataset:
    """Where a set lies below the folder given by --data, its split, and what it is trained with.

    settings: of uncertainty_<settings>.yaml.
    """

    folder: str
    split: Callable[[Path], Split]
    settings: str = ""


DATASETS: Final[dict[str, Dataset]] = {
    "3bpa": Dataset("3bpa", threebpa, "3bpa"),
    "si": Dataset("mlearn/Si", without_defects, "mlearn"),
    "cu": Dataset("mlearn/Cu", without_defects, "mlearn"),
    "mo": Dataset("mlearn/Mo", without_defects, "mlearn"),
    "nbmotaw": Dataset("nbmotaw", alloys, "nbmotaw"),
    "acac": Dataset("acac", acetylacetone, "acac"),
    "water": Dataset("water", water, "water"),
    **{f"mlearn-{element}": Dataset(f"mlearn/{element}", metal) for element in ("Cu", "Mo", "Si")},
    "3bpa-hot": Dataset("3bpa", hot_frames, "3bpa"),
    "acac-hot": Dataset("acac", hot_frames, "acac"),
    "si-hot": Dataset("mlearn/Si", hot_dynamics, "mlearn"),
    "nbmotaw-surfaces": Dataset("nbmotaw", surfaces, "nbmotaw"),
}
DEVELOPMENT: Final = ("3bpa-hot", "acac-hot", "si-hot", "nbmotaw-surfaces")


def write_split(dataset: str, data: Path, out: Path) -> Path:
    """Write the split as extended XYZ into out/data/<dataset> unless it is there; that folder."""
    folder = out / "data" / dataset
    if not (folder / "done").is_file():
        source, split = data / DATASETS[dataset].folder, DATASETS[dataset].split
        if not source.is_dir():
            raise ValueError(f"{source}: no such folder; name the one with the data by --data")
        folder.mkdir(parents=True, exist_ok=True)
        for name, frames in split(source).items():
            write(folder / f"{name}.xyz", frames, format="extxyz")
        (folder / "done").touch()
    return folder


def write_noisy(folder: Path, noise: float) -> Path:
    """The split's training frames with noisy labels, train_noise<meV>.xyz, unless it is there.

    Args:
        folder: from write_split.
        noise: meV/Å, standard deviation added to every force component; the frame's energy gets as
            many meV.
    """
    path = folder / f"train_noise{noise:g}.xyz"
    if not path.is_file():
        rng = np.random.default_rng(0)
        frames = _read(folder / "train.xyz")
        for atoms in frames:
            results = atoms.calc.results
            results["energy"] += rng.normal(0, 1e-3 * noise)
            results["forces"] = results["forces"] + rng.normal(0, 1e-3 * noise, (len(atoms), 3))
        write(path, frames, format="extxyz")
    return path
