"""Trains what benchmarks/front.py compares, each within the same processor time.

How long a training lasts is said in epochs, because schedules must know their end. How many fit is
measured before: a few short trainings on a part of the frames, in processor time, so that it hardly
matters what else runs.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import front_data
import front_process
from ase import Atoms
from front_peers import HERE, MAKERS, Work, environment
from front_rows import POTENTIALS
from uncertainty_data import write_split

PILOT_SECONDS: Final = 10.0  # of the processor, that the longest pilot takes above the shortest
MOST_PILOT_EPOCHS: Final = 4**6

Training = tuple[str, str]  # element, key of POTENTIALS


def speed(seconds: Callable[[int], float]) -> tuple[float, float]:
    """Start-up time and time per epoch, from trainings that are made longer until they tell.

    The first one compiles; what comes after finds that done, or else its noise would hide epochs.

    Args:
        seconds: epochs -> what a training of so many takes.
    """
    first, once, epochs = seconds(1), seconds(1), 4
    while True:
        gained = seconds(epochs) - once
        per_epoch = max(gained, 1e-3) / (epochs - 1)
        if gained >= PILOT_SECONDS or epochs >= MOST_PILOT_EPOCHS:
            return max(0.0, first - per_epoch), per_epoch
        # a fifth more than should tell; a short pilot may be all noise
        enough = 1 + math.ceil(1.2 * PILOT_SECONDS / per_epoch)
        epochs = min(max(enough, 2 * epochs), 16 * epochs)


def epochs_within(minutes: float, startup: float, per_epoch: float) -> int:
    """As many as fit, at least one; start-up and epochs in seconds."""
    return max(1, int((60 * minutes - startup) / per_epoch))


def name_of(training: Training) -> str:
    """Of its folder."""
    return "-".join(training)


def folder_of(training: Training, out: Path, minutes: float) -> Path:
    """Where a training of so many minutes lies."""
    return out / f"{minutes:g}min" / name_of(training)


def work_of(training: Training, out: Path, minutes: float, epochs: int = 1) -> Work:
    """Of a training, with the maker's environment.

    Raises:
        ValueError: that cannot be installed.
    """
    potential = POTENTIALS[training[1]]
    folder = folder_of(training, out, minutes)
    found = environment(potential.maker, out)
    return Work(found, folder, training[0], potential.settings, epochs)


def recipe(training: Training) -> dict[str, Any]:
    """What a training was made with: when it changes, what is kept is made again."""
    potential = POTENTIALS[training[1]]
    shared = (HERE / "front_mlearn.yaml").read_text("utf-8") if potential.maker == "lmp-hl" else ""
    return {"settings": potential.settings, "shared": shared}


def _kept(path: Path, training: Training) -> dict[str, Any] | None:
    """Content of a file that was made with this recipe."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("recipe") == recipe(training) else None


def _fit(maker: str, work: Work, train: Sequence[Atoms], valid: Sequence[Atoms]) -> float:
    """Train in an empty folder; seconds of the processor."""
    shutil.rmtree(work.folder, ignore_errors=True)
    work.folder.mkdir(parents=True)
    cpu, log = 0.0, work.folder / "train.log"
    for words in MAKERS[maker].train(work, train, valid):
        try:
            done = front_process.run(words, work.folder, work.environment.variables)
        except ValueError as error:
            raise ValueError(f"training failed: {error}") from None
        cpu += done.cpu
        with open(log, "a", encoding="utf-8") as file:
            file.write(done.output)
    return cpu


def _speed_of(training: Training, out: Path, train: list[Atoms], valid: list[Atoms]) -> list[float]:
    """Start-up and time per epoch of all frames, s; measured once."""
    path = out / "pilot" / f"{name_of(training)}.json"
    kept = _kept(path, training)
    if kept is None:
        maker = POTENTIALS[training[1]].maker
        few, few_valid = front_data.pilot(train), front_data.pilot(valid, 100)
        folder, cache = path.with_suffix(""), path.with_suffix(".cache")
        shutil.rmtree(cache, ignore_errors=True)
        atoms = [sum(map(len, frames)) for frames in (train, few)]

        def seconds(epochs: int) -> float:
            work = replace(work_of(training, out, 0.0, epochs), folder=folder)
            variables = {
                **work.environment.variables,
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
                "TORCHINDUCTOR_CACHE_DIR": str(cache),
            }
            work = replace(work, environment=replace(work.environment, variables=variables))
            took = _fit(maker, work, few, few_valid)
            print(f"pilot {name_of(training)}: {epochs} epochs in {took:.1f} s", flush=True)
            return took

        startup, per_epoch = speed(seconds)
        shutil.rmtree(folder)
        shutil.rmtree(cache, ignore_errors=True)
        kept = {
            "recipe": recipe(training),
            "startup": startup,
            "per_epoch": per_epoch * atoms[0] / atoms[1],
        }
        path.write_text(json.dumps(kept))
    return [kept["startup"], kept["per_epoch"]]


def train(training: Training, data: Path, out: Path, minutes: float) -> None:
    """Train within so many minutes of one core unless it is there; 0: only for its speed.

    Raises:
        ValueError: not installed, or the training failed.
    """
    folder = folder_of(training, out, minutes)
    potential = POTENTIALS[training[1]]
    if potential.maker == "lammps" or _kept(folder / "done.json", training) is not None:
        return
    split = write_split(f"mlearn-{training[0]}", data, out)
    frames, valid = (front_data.read_all(split / f"{name}.xyz") for name in ("train", "valid"))
    epochs = 1
    if minutes > 0:
        epochs = epochs_within(minutes, *_speed_of(training, out, frames, valid))
    else:
        frames, valid = frames[:2], valid[:2]  # one step: makers leave out what fills no batch
    work = work_of(training, out, minutes, epochs)
    print(f"training {name_of(training)} for {epochs} epochs", flush=True)
    cpu = _fit(potential.maker, work, frames, valid)
    content = {
        "recipe": recipe(training),
        "epochs": epochs,
        "cpu": cpu,
        "versions": dict(work.environment.versions),
    }
    (folder / "done.json").write_text(json.dumps(content))
    print(f"trained {name_of(training)} in {cpu:.0f} s of processor time", flush=True)


def made(training: Training, out: Path, minutes: float) -> dict[str, Any]:
    """What is known of a finished training.

    Raises:
        ValueError: it has not finished.
    """
    found = _kept(folder_of(training, out, minutes) / "done.json", training)
    if found is None:
        raise ValueError("not trained")
    return found


def export(training: Training, runtime: str, out: Path, minutes: float) -> Path:
    """The file of a runtime, made from the training unless it is there.

    Raises:
        ValueError: it cannot be made.
    """
    maker = MAKERS[POTENTIALS[training[1]].maker]
    work = work_of(training, out, minutes)
    path = work.folder / maker.files[runtime]
    if not path.is_file():
        for words in maker.export(work, runtime):
            try:
                front_process.run(words, work.folder, work.environment.variables)
            except ValueError as error:
                raise ValueError(f"export failed: {error}") from None
    if not path.is_file():
        raise ValueError(f"export left no {path.name}")
    return path
