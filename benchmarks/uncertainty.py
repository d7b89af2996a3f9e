"""Every uncertainty method on the same splits and seeds: one resumable command, one table.

    python benchmarks/uncertainty.py --data DIR                  # everything, one at a time
    python benchmarks/uncertainty.py --data DIR --rows 3bpa/default --jobs 2
    python benchmarks/uncertainty.py --list
    python benchmarks/uncertainty.py --data DIR --score-only     # score again, train nothing

A row is dataset/method/seed (uncertainty_rows.py). What it needs and is not there is trained, each
network in its own process and folder under --out (an interrupted training is resumed); methods that
are fitted after training share a trained network. Then every field of the row is scored on test
frames like the training frames (ID) and on others (OOD): one JSON a row, and
benchmarks/results/uncertainty_*.{md,json,png} from all there are. A row that cannot be had stands
in the table with the reason.
"""

import argparse
import fnmatch
import json
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from uncertainty_rows import METHODS, ROWS, TRAININGS, Method, Row, start_of
from uncertainty_tables import write_results
from uncertainty_training import cost_of, train, trained

from lmp_hl import evaluate, keys, metrics, uncertainty
from lmp_hl.ensemble import split_committee
from lmp_hl.potential import Potential
from lmp_hl.predictions import Predictions, predict
from lmp_hl.report import report
from lmp_hl.training import frames as fr
from lmp_hl.training.calibrate import calibrate
from lmp_hl.training.checkpoint import load_checkpoint
from lmp_hl.training.config import ModelConfig, TrainConfig
from lmp_hl.training.module import build_potential
from lmp_hl.training.train import baseline_energies

HERE = Path(__file__).resolve().parent
TIMED_ATOMS = 1000  # in the batch that inference is timed on
TIMED_REPEATS = 15


class Eager:
    """A potential that was not exported, as lmp_hl.predictions wants a model."""

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


@dataclass(frozen=True)
class Network:
    """A trained network, what its uncertainty was fitted with and what that took."""

    config: TrainConfig
    model: Eager
    calibration: dict[str, Any]
    fit_seconds: float  # of the processor


def unfitted(config: TrainConfig, methods: tuple[str, ...], name: str = "model.ckpt") -> Eager:
    """A trained network with new methods; those it was trained with may have changed since."""
    content = torch.load(config.output_dir / name, map_location="cpu", weights_only=True)
    settings = replace(config.model, uncertainty=methods)
    potential = build_potential(settings, len(content["elements"]))
    fresh = {k: v for k, v in potential.state_dict().items() if k.startswith("methods.")}
    network = {k: v for k, v in content["state"].items() if not k.startswith("methods.")}
    potential.load_state_dict({**network, **fresh})
    potential.methods.requires_grad_(False)
    return Eager(potential, content["elements"], settings)


def load_network(config: TrainConfig, methods: tuple[str, ...]) -> Network:
    """The trained network with `methods` fitted anew; () leaves those it was trained with."""
    if not methods:
        trained, elements, card = load_checkpoint(config.output_dir / "model.ckpt")
        return Network(config, Eager(trained, elements, config.model), card["calibration"], 0.0)
    model = unfitted(config, methods)
    settings = replace(config.model, uncertainty=methods)
    splits = fr.load_splits(config.data, config.seed)
    baseline = baseline_energies(splits)
    train_set, valid_set = (
        fr.GraphDataset(
            part, splits.elements, baseline, settings.cutoff, settings.layers, settings.dtype
        )
        for part in (splits.train, splits.valid)
    )
    start = time.process_time()
    summary = calibrate(model.potential, train_set, valid_set)
    return Network(config, model, summary, time.process_time() - start)


def members_of(method: Method, configs: Sequence[TrainConfig]) -> list[Network]:
    """The networks whose spread is the uncertainty, without methods of their own."""
    if method.split:
        committee = unfitted(configs[0], ())
        heads = split_committee(committee.potential)
        models = [Eager(head, committee.elements, configs[0].model) for head in heads]
    elif method.sampled:
        names = [f"member_{k}.ckpt" for k in range(method.members)]
        models = [unfitted(configs[-1], (), name) for name in names]
    else:
        models = [unfitted(config, ()) for config in configs]
    return [Network(configs[-1], model, {}, 0.0) for model in models]


def predictions_of(network: Network) -> dict[str, Predictions]:
    """Of the validation frames ("valid") and of every test file."""
    data, model = network.config.data, network.model
    found = {}
    for name, path in {"valid": data.valid, **data.test}.items():
        if path is None:
            continue
        frames = fr.read_frames(path, data, name, model.elements)
        found[name] = predict(model, frames, name)
    return found


def ensemble(members: Sequence[dict[str, Predictions]]) -> dict[str, Predictions]:
    """Mean of the members, and their spread as an uncertainty.

    ensemble_raw_std is sqrt(tr Cov / 3) with Cov the unbiased covariance of an atom's force over
    the members; ensemble_force_std is that times the one factor that makes it right on the
    validation frames. Its ensemble_energy_std is of the frames' energies, as the members give it.
    """
    out = {}
    factor = 1.0
    for name in ("valid", *(n for n in members[0] if n != "valid")):
        parts = [member[name] for member in members]
        first = parts[0]
        forces, energies = (np.stack([getattr(p, n) for p in parts]) for n in ("forces", "energy"))
        raw = np.sqrt(forces.var(axis=0, ddof=1).mean(axis=1))
        mean = replace(
            first,
            energy=energies.mean(axis=0),
            forces=forces.mean(axis=0),
            stress=np.mean([p.stress for p in parts], axis=0),
            controls={
                **first.controls,
                "force_norm": np.linalg.norm(forces.mean(axis=0), axis=1),
                "atom_energy": np.mean([p.controls["atom_energy"] for p in parts], axis=0),
            },
        )
        if name == "valid":
            factor = 1.0 / metrics.size_ratio(raw, mean.error)
        fields = {
            "ensemble_force_std": (factor * raw, "eV/Angstrom"),
            "ensemble_raw_std": (raw, "eV/Angstrom"),
        }
        out[name] = replace(
            mean,
            fields={n: values for n, (values, _) in fields.items()},
            field_units={n: unit for n, (_, unit) in fields.items()},
            energy_std={keys.ENSEMBLE_ENERGY_STD: energies.std(axis=0, ddof=1)},
        )
    return out


def inference_cost(models: Sequence[Eager], twin: Eager, config: TrainConfig) -> float:
    """Processor time of energies, forces and fields over that of the twin's energies and forces.

    Both are timed in turns on the same batch of frames, on one thread, without a compiler; the
    median ratio of the pairs. An ensemble evaluates every member, without fields.
    """
    path = next(iter(config.data.test.values()))
    frames = fr.read_frames(path, config.data, "timing", twin.elements)
    baseline = dict.fromkeys(twin.elements, 0.0)
    graphs, num_atoms = [], 0
    dataset = fr.GraphDataset(
        frames, twin.elements, baseline, twin.cutoff, twin.num_layers, twin.dtype
    )
    for graph in dataset:
        graphs.append(graph)
        num_atoms += int(graph[fr.NUM_ATOMS])
        if num_atoms >= TIMED_ATOMS:
            break
    batch = fr.collate_graphs(graphs)

    def seconds(chosen: Sequence[Eager], with_fields: bool) -> float:
        start = time.process_time()
        for model in chosen:
            model.potential(batch, with_fields)
        return time.process_time() - start

    ratios = [
        seconds(models, len(models) == 1) / seconds([twin], False) for _ in range(TIMED_REPEATS + 3)
    ]
    return float(np.median(ratios[3:]))  # the first calls warm up


def score(row: Row, data: Path, out: Path, num_resamples: int) -> dict[str, Any]:
    """Everything the tables say about one row.

    Raises:
        ValueError: a network is not trained, or this version does not know the method.
    """
    method = METHODS[row.method]
    unknown = [name for name in method.fit if name not in uncertainty.METHODS]
    if unknown:
        raise ValueError(f"no uncertainty method '{unknown[0]}' in this version")
    configs = [trained(training, data, out) for training in row.trainings()]
    if method.members > 1 or method.split:
        networks = members_of(method, configs)
    else:
        networks = [load_network(configs[0], method.fit)]
    found = [predictions_of(network) for network in networks]
    sets = ensemble(found) if len(networks) > 1 else found[0]
    numbers = (
        report(sets["OOD"], sets["ID"], num_resamples)
        if "OOD" in sets
        else report(sets["ID"], None, num_resamples)
    )
    try:
        twin_config = trained((row.dataset, "scalar", row.seed), data, out)
    except ValueError:  # not trained yet
        inference = twin_seconds = float("nan")
    else:
        models, twin = [n.model for n in networks], unfitted(twin_config, ())
        inference = inference_cost(models, twin, twin_config)
        twin_seconds = cost_of(twin_config, out)
    config = configs[-1]
    seconds = sum(cost_of(c, out) for c in configs) + sum(n.fit_seconds for n in networks)
    return {
        "row": row.name, "dataset": row.dataset, "method": row.method, "seed": row.seed,
        "about": method.about, "head": config.model.head,
        "loss": {n: getattr(config.loss, n) for n in ("energy", "forces", "stress")},
        "settings": {
            "channels": config.model.channels, "cutoff": config.model.cutoff,
            **{n: getattr(config.training, n) for n in
               ("epochs", "warmup_epochs", "batch_size", "learning_rate", "weight_decay")},
        },
        "changes": TRAININGS[method.training],
        "cost": {
            "seconds": seconds, "fit_seconds": sum(n.fit_seconds for n in networks),
            "training_over_twin": seconds / twin_seconds, "inference_over_twin": inference,
        },
        "calibration": [n.calibration for n in networks],
        "report": numbers,
        "made": provenance(),
    }  # fmt: skip


def score_or_say_why(row: Row, data: Path, out: Path, num_resamples: int) -> dict[str, Any]:
    """The row's numbers, or {"failed": reason}: one bad row does not stop the others."""
    try:
        return score(row, data, out, num_resamples)
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        return {
            "row": row.name, "dataset": row.dataset, "method": row.method, "seed": row.seed,
            "failed": str(error) if isinstance(error, ValueError) else reason,
        }  # fmt: skip


def _path(row: Row, out: Path) -> Path:
    return out / "rows" / f"{row.name.replace('/', '-')}.json"


def stored(row: Row, out: Path) -> dict[str, Any]:
    """The row's numbers, or {"failed": why there are none}."""
    path = _path(row, out)
    if not path.is_file():
        return {"row": row.name, "method": row.method, "failed": "not trained"}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def run(
    rows: Sequence[Row],
    data: Path,
    out: Path,
    jobs: int = 1,
    score_only: bool = False,
    num_resamples: int = 400,
) -> dict[str, dict[str, Any]]:
    """Train what is missing, score what has no score (or everything again), store and return all.

    Returns:
        row name -> its numbers or the reason why there are none.
    """
    (out / "rows").mkdir(parents=True, exist_ok=True)
    wanted = [row for row in rows if score_only or "failed" in stored(row, out)]
    failed: dict[tuple[str, str, int], str] = {}
    if not score_only:
        trainings = list(dict.fromkeys(t for row in wanted for t in row.trainings()))
        with ThreadPoolExecutor(jobs) as pool:
            futures: dict[tuple[str, str, int] | None, Future[None]] = {}
            for t in trainings:  # a training stands after the one that it starts from
                futures[t] = pool.submit(train, t, data, out, futures.get(start_of(t)))
        failed = {t: str(futures[t].exception()) for t in trainings if futures[t].exception()}
    for row in wanted:
        why = next((failed[t] for t in row.trainings() if t in failed), None)
        numbers = score_or_say_why(row, data, out, num_resamples)
        if "failed" in numbers and why is not None:
            numbers["failed"] = why
        evaluate.write_json(_path(row, out), numbers)
        print(f"{row.name}: {numbers.get('failed', 'scored')}", flush=True)
    return {row.name: stored(row, out) for row in rows}


def main() -> None:
    """Train, score and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data sets (uncertainty_data.py)")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="patterns of dataset/method/seed (default all)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="name the rows and what is there")
    parser.add_argument("--score-only", action="store_true", help="score again, train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/uncertainty"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    out = args.out.resolve()
    rows = [r for r in ROWS if any(fnmatch.fnmatch(r.name, f"*{p}*") for p in args.rows)]
    if not rows:
        parser.error(f"no row matches {' or '.join(args.rows)}; --list names them all")
    if args.list:
        for row in rows:
            trained = [(out / "-".join(map(str, t)) / "model.ckpt") for t in row.trainings()]
            count = sum(path.is_file() for path in trained)
            scored = "" if "failed" in stored(row, out) else ", scored"
            print(f"{row.name:28} {count}/{len(trained)} trained{scored}")
        return
    if args.data is None:
        parser.error("--data is needed to train and to score")
    torch.set_num_threads(1)
    run(rows, args.data.resolve(), out, args.jobs, args.score_only)
    datasets: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        datasets.setdefault(row.dataset, []).append(stored(row, out))
    for path in write_results(datasets, args.results):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
