"""Trains the networks of benchmarks/uncertainty.py, each in its own process and folder."""

import copy
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from uncertainty_data import DATASETS, write_noisy, write_split
from uncertainty_rows import TRAININGS, start_of

from lmp_hl.training.config import TrainConfig, load_config

HERE = Path(__file__).resolve().parent


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(copy.deepcopy(base))
    for key, value in changes.items():
        out[key] = _merged(out.get(key, {}), value) if isinstance(value, Mapping) else value
    return out


def write_config(training: tuple[str, str, int], data: Path, out: Path) -> Path:
    """The YAML of one training (dataset, key of TRAININGS, seed), with absolute paths.

    Raises:
        ValueError: it asks for what this version does not know.
    """
    dataset, name, seed = training
    folder = write_split(dataset, data, out)
    settings = HERE / f"uncertainty_{DATASETS[dataset].settings}.yaml"
    base = yaml.safe_load(settings.read_text(encoding="utf-8"))
    content = _merged(base, TRAININGS[name])
    full = f"{dataset}-{name}-{seed}"
    content |= {"name": full, "seed": seed, "output_dir": str(out / full)}
    section = content["data"]
    if section["train"].startswith("train_noise"):
        write_noisy(folder, float(Path(section["train"]).stem.removeprefix("train_noise")))
    for key in ("train", "valid"):
        section[key] = str(folder / section[key])
    tests = {"ID": folder / "id.xyz", "OOD": folder / "ood.xyz"}
    section["test"] = {name: str(path) for name, path in tests.items() if path.is_file()}
    if str(section.get("reference_energies", "")).endswith(".xyz"):
        section["reference_energies"] = str(folder / section["reference_energies"])
    if (before := start_of(training)) is not None:
        folder = out / "-".join(map(str, before))
        content["training"]["init_from"] = str(folder / "model.ckpt")
    path = out / f"{full}.yaml"
    temporary = out / f".{full}.{os.getpid()}.yaml"  # another job may read the file now
    temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)
    try:
        load_config(path)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from None
    return path


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock file; it is free again when its holder ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def train(
    training: tuple[str, str, int], data: Path, out: Path, before: Future[None] | None = None
) -> None:
    """Train one network in its own process, on one thread, unless it is there.

    `before` is the training whose network it starts from, if that runs too.

    Raises:
        ValueError: no such configuration, or the training failed; its output is in <name>.log.
    """
    if before is not None:
        before.result()
    config = write_config(training, data, out)
    name, folder = config.stem, config.with_suffix("")
    if (folder / "model.ckpt").is_file():
        return
    log_path, cost_path = out / f"{name}.log", out / f"{name}.cost.json"
    with _alone(out / f"{name}.lock") as alone:
        if not alone:
            raise ValueError(f"{name} is being trained by another process")
        resume = (folder / "checkpoints" / "last.ckpt").is_file()
        words = [sys.executable, "-m", "lmp_hl.cli", "train", str(config)]
        print(f"training {name}", flush=True)
        start = time.time()
        with open(log_path, "a", encoding="utf-8") as log:
            child = subprocess.Popen(
                [*words, *(["--resume"] if resume else [])],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            # processor time: what else runs on the machine does not count
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        spent = json.loads(cost_path.read_text()) if cost_path.is_file() else {"cpu": 0, "wall": 0}
        spent["cpu"] += usage.ru_utime + usage.ru_stime
        spent["wall"] += time.time() - start
        cost_path.write_text(json.dumps(spent))
        if child.returncode:
            tail = log_path.read_text(encoding="utf-8").strip().splitlines()
            raise ValueError(f"training {name} failed: {tail[-1] if tail else 'no output'}")
        if not (folder / "model.ckpt").is_file():
            raise ValueError(f"training {name} was stopped; the same command resumes it")
        print(f"trained {name} in {spent['cpu']:.0f} s of processor time", flush=True)


def trained(training: tuple[str, str, int], data: Path, out: Path) -> TrainConfig:
    """The configuration of a finished training.

    Raises:
        ValueError: it has not finished.
    """
    config = load_config(write_config(training, data, out))
    if not (config.output_dir / "model.ckpt").is_file():
        raise ValueError(f"{config.name} is not trained")
    return config


def cost_of(config: TrainConfig, out: Path) -> float:
    """Processor seconds of a training; nan if it was not this script that trained it."""
    path = out / f"{config.name}.cost.json"
    return float(json.loads(path.read_text())["cpu"]) if path.is_file() else float("nan")
