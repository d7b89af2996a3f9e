"""Splits of the public data sets: which frames are trained on, validated on and far from both.

Each function takes the folder of the downloaded set and returns name -> frames: "train", "valid",
"id" (test frames like the training frames) and "ood" (others; missing where there are none), and
"isolated" where the set has isolated atoms. The validation frames are drawn once, whatever the seed
of a training, so that all members of an ensemble leave the same frames out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from ase import Atoms
from ase.io import read, write

Split = dict[str, list[Atoms]]


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


def silicon(folder: Path) -> Split:
    """Train without vacancies and surfaces; OOD: all of those, from both files."""
    train, test = _read(folder / "train.xyz"), _read(folder / "test.xyz")
    held_out = ("Vacancy", "Surface")
    return {
        **_validation(_without(train, held_out, True)),
        "id": _without(test, held_out, True),
        "ood": _without([*train, *test], held_out, False),
    }


def alloys(folder: Path) -> Split:
    """Nb, Mo, Ta, W: train on the elements (every fourth frame); OOD: test frames of binaries."""
    elements = ("Nb", "Mo", "Ta", "W")

    def pure(frames: list[Atoms], wanted: bool) -> list[Atoms]:
        return [a for a in frames if (a.info["config_type"].split("_")[0] in elements) == wanted]

    test = _read(folder / "test_elem_binary.xyz")
    return {
        **_validation(pure(_read(folder / "train_no_multinary.xyz"), True)[::4]),
        "id": pure(test, True),
        "ood": pure(test, False),
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
    return {**_validation(_read(folder / "train.xyz")), "id": _read(folder / "test.xyz")}


# name -> folder below the one given by --data, split
DATASETS: Final[dict[str, tuple[str, Callable[[Path], Split]]]] = {
    "3bpa": ("3bpa", threebpa),
    "si": ("mlearn/Si", silicon),
    "nbmotaw": ("nbmotaw", alloys),
    "acac": ("acac", acetylacetone),
    "water": ("water", water),
    **{f"mlearn-{element}": (f"mlearn/{element}", metal) for element in ("Cu", "Mo", "Si")},
}


def write_split(dataset: str, data: Path, out: Path) -> Path:
    """Write the split as extended XYZ into out/data/<dataset> unless it is there; that folder."""
    folder = out / "data" / dataset
    if not (folder / "done").is_file():
        source, split = DATASETS[dataset]
        if not (data / source).is_dir():
            raise ValueError(
                f"{data / source}: no such folder; name the one with the data by --data"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, frames in split(data / source).items():
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
