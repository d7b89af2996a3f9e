"""Every uncertainty method on the same splits and seeds: one resumable command, one table.

    python benchmarks/uncertainty.py --data DIR                  # everything in ROWS, one at a time
    python benchmarks/uncertainty.py --data DIR --rows 3bpa/default --jobs 2
    python benchmarks/uncertainty.py --list
    python benchmarks/uncertainty.py --data DIR --score-only     # again, without any training

A row is dataset/method/seed. What a row needs and is not there is trained, each training in its own
process and folder under --out (an interrupted one is resumed); methods that are fitted after
training share a trained network. Then every field of the row is scored on test frames like the
training frames (ID) and on others (OOD), one JSON a row, and benchmarks/results/uncertainty_*.md
is written from all there are. A row that cannot be had stands in the table with the reason.
"""

import argparse
import copy
import fcntl
import fnmatch
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from uncertainty_data import write_split

from lmp_hl import evaluate, keys, metrics, uncertainty
from lmp_hl.evaluate import Predictions
from lmp_hl.potential import Potential
from lmp_hl.training import frames as fr
from lmp_hl.training.calibrate import calibrate
from lmp_hl.training.checkpoint import load_checkpoint
from lmp_hl.training.config import ModelConfig, TrainConfig, load_config
from lmp_hl.training.module import build_potential
from lmp_hl.training.train import baseline_energies

HERE = Path(__file__).resolve().parent
ENSEMBLE: Final = 5

# name -> what differs from benchmarks/uncertainty_<dataset>.yaml
TRAININGS: Final[dict[str, dict[str, Any]]] = {
    "hlgauss": {},
    "scalar": {"model": {"head": "scalar"}},
}


@dataclass(frozen=True)
class Method:
    """How a row gets its uncertainty.

    training: key of TRAININGS; fit: uncertainty methods fitted to the trained network, () takes the
    network with the methods it was trained with; members: > 1 is the standard deviation over that
    many networks with seeds 0, 1, ...
    """

    training: str
    fit: tuple[str, ...] = ()
    members: int = 1


METHODS: Final[dict[str, Method]] = {
    "default": Method("hlgauss", uncertainty.DEFAULT),
    "scalar": Method("scalar", uncertainty.DEFAULT),
    "ensemble": Method("scalar", members=ENSEMBLE),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: dataset/method/seed."""

    dataset: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What --rows matches."""
        return f"{self.dataset}/{self.method}/{self.seed}"

    def trainings(self) -> list[tuple[str, str, int]]:
        """(dataset, training, seed) of every network it needs."""
        method = METHODS[self.method]
        seeds = range(method.members) if method.members > 1 else [self.seed]
        return [(self.dataset, method.training, seed) for seed in seeds]


MAIN: Final = ("default", "scalar")
ROWS: Final = [
    *(Row(d, m, seed) for d in ("3bpa", "si") for m in MAIN for seed in (0, 1, 2)),
    *(Row(d, "ensemble", 0) for d in ("3bpa", "si")),
]


# training ---------------------------------------------------------------------------------------
def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(copy.deepcopy(base))
    for key, value in changes.items():
        out[key] = _merged(out.get(key, {}), value) if isinstance(value, Mapping) else value
    return out


def write_config(training: tuple[str, str, int], data: Path, out: Path) -> Path:
    """The YAML of one training, with absolute paths; ValueError if it cannot be."""
    dataset, name, seed = training
    folder = write_split(dataset, data, out)
    base = yaml.safe_load((HERE / f"uncertainty_{dataset}.yaml").read_text(encoding="utf-8"))
    content = _merged(base, TRAININGS[name])
    full = f"{dataset}-{name}-{seed}"
    content |= {"name": full, "seed": seed, "output_dir": str(out / full)}
    section = content["data"]
    for key in ("train", "valid"):
        section[key] = str(folder / section[key])
    section["test"] = {key: str(folder / path) for key, path in section["test"].items()}
    if str(section.get("reference_energies", "")).endswith(".xyz"):
        section["reference_energies"] = str(folder / section["reference_energies"])
    path = out / f"{full}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    load_config(path)
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


def train(training: tuple[str, str, int], data: Path, out: Path) -> None:
    """Train one network in its own process, on one thread, unless it is there.

    Raises:
        ValueError: no such configuration, or the training failed; its output is in <name>.log.
    """
    config = write_config(training, data, out)
    folder = config.with_suffix("")
    if (folder / "model.ckpt").is_file():
        return
    with _alone(out / f"{config.stem}.lock") as alone:
        if not alone:
            raise ValueError(f"{config.stem} is being trained by another process")
        last = folder / "checkpoints" / "last.ckpt"
        words = [sys.executable, "-m", "lmp_hl.cli", "train", str(config)]
        print(f"training {config.stem}", flush=True)
        start = time.time()
        with open(out / f"{config.stem}.log", "a", encoding="utf-8") as log:
            child = subprocess.Popen(
                [*words, *(["--resume"] if last.is_file() else [])],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            # processor time: what else runs on the machine does not count
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        cost = out / f"{config.stem}.cost.json"
        spent = json.loads(cost.read_text()) if cost.is_file() else {"cpu": 0.0, "wall": 0.0}
        spent["cpu"] += usage.ru_utime + usage.ru_stime
        spent["wall"] += time.time() - start
        cost.write_text(json.dumps(spent))
        if child.returncode:
            tail = (out / f"{config.stem}.log").read_text(encoding="utf-8").strip().splitlines()
            raise ValueError(f"training {config.stem} failed: {tail[-1] if tail else '?'}")
        print(f"trained {config.stem} in {spent['cpu']:.0f} s", flush=True)


# scoring ----------------------------------------------------------------------------------------
class Eager:
    """A potential that was not exported, as lmp_hl.evaluate wants a model."""

    def __init__(self, potential: Potential, elements: list[str], config: ModelConfig) -> None:
        self.potential = potential.eval()
        self.elements = elements
        self.cutoff, self.num_layers, self.dtype = config.cutoff, config.layers, config.dtype
        self.fields = [keys.ENERGY, *potential.field_names()]
        self.field_units = [keys.FIELD_UNITS[name] for name in self.fields]

    def evaluate(
        self, inputs: dict[str, torch.Tensor], with_fields: bool
    ) -> dict[str, torch.Tensor]:
        """Energies, edge gradients and, when asked, every field (keys.py)."""
        return self.potential(inputs, with_fields)


def fitted(config: TrainConfig, methods: tuple[str, ...]) -> tuple[Eager, dict[str, Any]]:
    """The trained network with `methods` fitted anew; () leaves it as it was trained.

    Returns:
        the model, what its calibration says.
    """
    trained, elements, card = load_checkpoint(config.output_dir / "model.ckpt")
    if not methods:
        return Eager(trained, elements, config.model), card["calibration"]
    model = replace(config.model, uncertainty=methods)
    potential = build_potential(model, len(elements))
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("methods.")}
    fresh = {k: v for k, v in potential.state_dict().items() if k.startswith("methods.")}
    potential.load_state_dict({**state, **fresh})
    potential.methods.requires_grad_(False)
    splits = fr.load_splits(config.data, config.seed)
    baseline = baseline_energies(splits)
    train_set, valid_set = (
        fr.GraphDataset(part, splits.elements, baseline, model.cutoff, model.layers, model.dtype)
        for part in (splits.train, splits.valid)
    )
    return Eager(potential, elements, model), calibrate(potential, train_set, valid_set)


def read_sets(config: TrainConfig, elements: list[str]) -> dict[str, list[fr.Frame]]:
    """Validation and test frames by name."""
    assert config.data.valid is not None
    sets = {"valid": fr.read_frames(config.data.valid, config.data, "valid", elements)}
    for name, path in config.data.test.items():
        sets[name] = fr.read_frames(path, config.data, name, elements)
    return sets


def ensemble(members: list[dict[str, Predictions]]) -> dict[str, Predictions]:
    """Mean of the members; force_std their spread times one factor from the validation frames.

    The spread is sqrt(tr Cov / 3) with Cov the unbiased covariance over the members; of the
    energies, sqrt(Var) per frame.
    """
    out = {}
    factor = 1.0
    for name in ["valid", *(n for n in members[0] if n != "valid")]:
        parts = [member[name] for member in members]
        forces = np.stack([p.forces for p in parts])
        spread = np.sqrt(forces.var(axis=0, ddof=1).mean(axis=1))
        mean = replace(
            parts[0],
            energy=np.mean([p.energy for p in parts], axis=0),
            forces=forces.mean(axis=0),
            stress=np.mean([p.stress for p in parts], axis=0),
            controls={
                **parts[0].controls,
                "force_norm": np.linalg.norm(forces.mean(axis=0), axis=1),
                "atom_energy": np.mean([p.controls["atom_energy"] for p in parts], axis=0),
            },
        )
        if name == "valid":
            factor = 1.0 / metrics.size_ratio(spread, mean.error)
        out[name] = replace(
            mean,
            fields={keys.FORCE_STD: factor * spread, "spread": spread},
            field_units={keys.FORCE_STD: "eV/Angstrom", "spread": "eV/Angstrom"},
        )
    return out


def score(row: Row, data: Path, out: Path, num_resamples: int = 400) -> dict[str, Any]:
    """Everything the table says about one row.

    Raises:
        ValueError: a network is not trained, or its method is not known.
    """
    method = METHODS[row.method]
    unknown = [name for name in method.fit if name not in uncertainty.METHODS]
    if unknown:
        raise ValueError(f"no uncertainty method '{unknown[0]}' yet")
    configs = [load_config(write_config(t, data, out)) for t in row.trainings()]
    for config in configs:
        if not (config.output_dir / "model.ckpt").is_file():
            raise ValueError(f"{config.name} is not trained")
    predictions, summaries = [], []
    for config in configs:
        model, summary = fitted(config, method.fit)
        summaries.append(summary)
        sets = read_sets(config, model.elements)
        predictions.append({n: evaluate.predict(model, f, n) for n, f in sets.items()})
    sets = ensemble(predictions) if method.members > 1 else predictions[0]
    report = evaluate.report(sets["OOD"], sets["ID"], num_resamples)
    return {"row": row.name, "calibration": summaries, "report": report}


def main() -> None:
    """Train, score and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with 3bpa/, mlearn/ ...")
    parser.add_argument("--rows", default="*", help="pattern of dataset/method/seed (default all)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="name the rows and what is there")
    parser.add_argument("--score-only", action="store_true", help="score again, train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/uncertainty"))
    args = parser.parse_args()
    out = args.out.resolve()
    rows = [row for row in ROWS if fnmatch.fnmatch(row.name, f"*{args.rows}*")]
    results = {row: out / "rows" / f"{row.name.replace('/', '-')}.json" for row in rows}
    if args.list:
        for row in rows:
            trained = [
                (out / "-".join(map(str, t)) / "model.ckpt").is_file() for t in row.trainings()
            ]
            state = "scored" if results[row].is_file() else f"{sum(trained)}/{len(trained)} trained"
            print(f"{row.name:32} {state}")
        return
    if args.data is None:
        parser.error("--data is needed to train or score")
    data = args.data.resolve()
    (out / "rows").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    failed: dict[str, str] = {}
    if not args.score_only:
        rows = [row for row in rows if not results[row].is_file()]
        wanted = list(dict.fromkeys(t for row in rows for t in row.trainings()))
        with ThreadPoolExecutor(args.jobs) as pool:
            done = {t: pool.submit(train, t, data, out) for t in wanted}
        for t, future in done.items():
            if future.exception() is not None:
                failed["-".join(map(str, t))] = str(future.exception())
                print(f"{'-'.join(map(str, t))}: {future.exception()}", flush=True)
    for row in rows:
        try:
            evaluate.write_json(results[row], score(row, data, out))
            print(f"scored {row.name}", flush=True)
        except ValueError as error:
            print(f"{row.name}: {error}", flush=True)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
