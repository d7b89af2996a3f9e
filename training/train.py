"""One run of training, from YAML to a calibrated checkpoint."""

import csv
import dataclasses
import importlib.metadata
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from ase.data import atomic_numbers
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lmp_hl.nn.backbone import fit_scales
from lmp_hl.potential import Potential

from . import frames as fr
from .calibrate import calibrate
from .config import ModelConfig, TrainConfig, load_config, to_yaml
from .module import PotentialModule, build_potential

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
# as many atoms as set the scales of the features; more change nothing
SCALE_ATOMS = 4000
COLUMNS = {
    "epoch": "",
    "seconds": "s",
    "learning_rate": "",
    "train_loss": "eV²",
    "train_energy_rmse": "meV/atom",
    "train_forces_rmse": "meV/Å",
    "train_stress_rmse": "meV/Å³",
    "train_outside": "% targets outside the support",
    "train_spread": "predicted/true",
    "valid_loss": "eV²",
    "valid_energy_rmse": "meV/atom",
    "valid_forces_rmse": "meV/Å",
    "valid_stress_rmse": "meV/Å³",
}
SHOWN = {
    "epoch": ("epoch", "", 6, ".0f"),
    "train_energy_rmse": ("E train", "meV/at", 9, ".2f"),
    "train_forces_rmse": ("F train", "meV/Å", 9, ".1f"),
    "valid_energy_rmse": ("E valid", "meV/at", 9, ".2f"),
    "valid_forces_rmse": ("F valid", "meV/Å", 9, ".1f"),
    "train_outside": ("outside", "%", 8, ".2f"),
    "train_spread": ("spread", "p/t", 7, ".2f"),
    "learning_rate": ("lr", "", 9, ".1e"),
    "seconds": ("time", "s", 7, ".0f"),
}


def train(config_path: str | Path, resume: bool = False) -> Path:
    """Train, calibrate and save one potential.

    Args:
        config_path: YAML file, see TrainConfig.
        resume: continue the run in `output_dir` after its last finished epoch; the result is the same as
            that of a run that was never interrupted.

    Returns:
        The checkpoint `output_dir/model.ckpt`, ready for export. Beside it: config.yaml, metrics.csv, checkpoints/,
        tensorboard/.

    Raises:
        ValueError: bad configuration or data; a run is in `output_dir` already and `resume` is off, or it was
            made with another model.
    """
    config = load_config(config_path)
    out = config.output_dir
    last = out / "checkpoints" / "last.ckpt"
    _check_output(config, last, resume)
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    L.seed_everything(config.seed, verbose=False)

    splits = fr.load_splits(config.data, config.seed)
    baseline = baseline_energies(splits)
    graphs = {name: _graphs(config, splits, baseline, name) for name in ("train", "valid")}
    potential = initial_potential(config, splits.elements, baseline, graphs["train"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    module = PotentialModule(potential, config)
    trainer = _trainer(config, out)
    if trainer.is_global_zero:
        _print_start(config, splits, potential)
    start = time.time()
    trainer.fit(
        module,
        _loader(graphs["train"], config, shuffle=True),
        _loader(graphs["valid"], config, shuffle=False),
        ckpt_path=last if resume and last.is_file() else None,
        weights_only=True,
    )
    if trainer.interrupted:
        raise KeyboardInterrupt
    checkpoint = out / "model.ckpt"
    if trainer.is_global_zero:
        print("calibrating the uncertainty on the validation frames", flush=True)
        potential = module.potential.cpu().eval()
        summary = calibrate(potential, graphs["train"], graphs["valid"])
        print(
            f"force error of validation frames {1e3 * summary['force_rmse']:.1f} meV/Å; predicted/true size "
            f"{summary['size_ratio']:.2f} (cross-validated)"
        )
        save_checkpoint(checkpoint, potential, config, splits, summary, time.time() - start)
        print(f"saved {checkpoint}", flush=True)
    trainer.strategy.barrier()
    return checkpoint


def baseline_energies(splits: fr.Splits) -> dict[str, float]:
    """Energy per element that the network starts from: the references plus the mean binding energy.

    The rest after the reference energies is fitted per element by least squares (minimum norm), so that the
    network's own energies scatter around zero.
    """
    references = splits.reference_energies
    rest = [
        dataclasses.replace(
            frame, energy=frame.energy - sum(references[e] * n for e, n in _count(frame, splits.elements))
        )
        for frame in splits.train
    ]
    shift = fr.fit_reference_energies(rest, splits.elements)
    return {element: references[element] + shift[element] for element in splits.elements}


def initial_potential(
    config: TrainConfig, elements: Sequence[str], baseline: dict[str, float], train: fr.GraphDataset
) -> Potential:
    """A potential with random weights and the scales of the training data.

    The energy scale is the root mean square force component times 1 Å; feature scales come from the
    first training frames, in an order drawn by the seed.
    """
    potential = build_potential(config.model, len(elements))
    chosen, count = [], 0
    for k in np.random.default_rng(config.seed).permutation(len(train)):
        chosen.append(train[int(k)])
        count += int(train[int(k)][fr.NUM_ATOMS])
        if count >= SCALE_ATOMS:
            break
    fit_scales(potential.backbone, fr.collate_graphs(chosen))
    forces = torch.cat([graph[fr.TARGET_FORCES] for graph in train])
    potential.energy_head.scale.fill_(float(forces.square().mean().sqrt().clamp(min=1e-3)))
    energies = torch.tensor([baseline[element] for element in elements], dtype=torch.float64)
    potential.reference_energies.copy_(energies)
    return potential


def save_checkpoint(
    path: Path,
    potential: Potential,
    config: TrainConfig,
    splits: fr.Splits,
    calibration: dict[str, Any],
    seconds: float,
) -> None:
    """Write weights, configuration and what a model card needs; readable with weights_only."""
    import yaml

    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning", "ase")}
    content = {
        "lmp_hl_checkpoint": CHECKPOINT_FORMAT,
        "state": potential.state_dict(),
        "model": dataclasses.asdict(config.model),
        "elements": list(splits.elements),
        "card": {
            "name": config.name,
            "config": yaml.safe_load(to_yaml(config)),
            "versions": versions,
            "training": {
                "train_frames": len(splits.train),
                "valid_frames": len(splits.valid),
                "train_atoms": sum(frame.num_atoms for frame in splits.train),
                "seconds": round(seconds, 1),
                "metrics": _last_metrics(path.parent / "metrics.csv"),
            },
            "reference_energies": splits.reference_energies,
            "calibration": calibration,
        },
    }
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: str | Path) -> tuple[Potential, list[str], dict[str, Any]]:
    """Read what save_checkpoint wrote.

    Args:
        path: model.ckpt of a finished run.

    Returns:
        potential, elements, card.

    Raises:
        ValueError: no such file, not a finished model, made by a newer version, or weights that do not fit
            the architecture stored with them.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one with lmp-hl train CONFIG.yaml")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that torch can read ({error!r:.200})") from None
    if not isinstance(content, dict) or "lmp_hl_checkpoint" not in content:
        hint = (
            "it is the state of an unfinished run, finish it with lmp-hl train CONFIG.yaml --resume"
            if isinstance(content, dict) and "pytorch-lightning_version" in content
            else "wanted the model.ckpt of a finished run"
        )
        raise ValueError(f"{path}: not a finished model; {hint}")
    if content["lmp_hl_checkpoint"] > CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {content['lmp_hl_checkpoint']} is newer than this lmp-hl "
            f"(reads up to {CHECKPOINT_FORMAT}); update lmp-hl"
        )
    potential = build_potential(ModelConfig(**content["model"]), len(content["elements"]))
    try:
        potential.load_state_dict(content["state"])
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its weights do not fit its own architecture; made by another version of lmp-hl? "
            f"({str(error).splitlines()[1].strip()})"
        ) from None
    return potential.eval(), content["elements"], content["card"]


class Notebook(L.Callback):
    """One aligned line per epoch on the terminal and one row in metrics.csv, with the same numbers."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.started = 0.0
        self.elapsed = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the rows before the epoch that starts now, and go on after them."""
        self.started = time.time()
        if not trainer.is_global_zero:
            return
        rows = read_metrics(self.path) if self.path.is_file() else []
        rows = [row for row in rows if row["epoch"] < trainer.current_epoch]
        self.elapsed = rows[-1]["seconds"] if rows else 0.0
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({k: _plain_number(v) for k, v in row.items()} for row in rows)
        for line in (0, 1):
            pl_module.print(" ".join(f"{spec[line]:>{spec[2]}}" for spec in SHOWN.values()))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the epoch that ends now."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        metrics["epoch"] = trainer.current_epoch
        metrics["seconds"] = self.elapsed + time.time() - self.started
        metrics["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        if not trainer.is_global_zero:
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writerow({k: _plain_number(v) for k, v in metrics.items()})
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.current_epoch % self.every == 0 or last:
            pl_module.print(
                " ".join(
                    f"{format(metrics[name], spec[3]) if name in metrics else '-':>{spec[2]}}"
                    for name, spec in SHOWN.items()
                )
            )


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv; columns of an epoch that had no value are absent."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _plain_number(value: float) -> str:
    return f"{value:.7g}"


def _last_metrics(path: Path) -> dict[str, float]:
    rows = read_metrics(path) if path.is_file() else []
    return rows[-1] if rows else {}


def _count(frame: fr.Frame, elements: Sequence[str]) -> list[tuple[str, int]]:
    return [(e, int((frame.numbers == atomic_numbers[e]).sum())) for e in elements]


def _graphs(
    config: TrainConfig, splits: fr.Splits, baseline: dict[str, float], name: str
) -> fr.GraphDataset:
    model = config.model
    frames = splits.train if name == "train" else splits.valid
    return fr.GraphDataset(frames, splits.elements, baseline, model.cutoff, model.layers, model.dtype)


def _loader(dataset: fr.GraphDataset, config: TrainConfig, shuffle: bool) -> DataLoader[Any]:
    # the order depends on seed and epoch only, so a resumed run sees what an uninterrupted one would
    sampler = DistributedSampler(
        dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=config.seed, drop_last=False
    )
    return DataLoader(
        dataset,
        batch_size=config.training.batch_size,
        sampler=sampler,
        collate_fn=fr.collate_graphs,
    )


def _trainer(config: TrainConfig, out: Path) -> L.Trainer:
    training = config.training
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*")
    callbacks: list[L.Callback] = [
        Notebook(out / "metrics.csv", training.log_every),
        ModelCheckpoint(
            out / "checkpoints",
            filename="last",
            save_top_k=1,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]
    show_bar = sys.stderr.isatty()  # in a file a bar is noise; the line per epoch stays
    if show_bar:
        callbacks.append(TQDMProgressBar(leave=False))
    if training.ema_decay > 0:
        callbacks.append(EMAWeightAveraging(decay=training.ema_decay, use_buffers=False))
    return L.Trainer(
        accelerator=training.accelerator,
        devices=training.devices,
        max_epochs=training.epochs,
        logger=TensorBoardLogger(out, name="", version="tensorboard"),
        callbacks=callbacks,
        gradient_clip_val=training.gradient_clip or None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=show_bar,
        enable_model_summary=False,
        inference_mode=False,
        default_root_dir=out,
    )


def _check_output(config: TrainConfig, last: Path, resume: bool) -> None:
    out = config.output_dir
    if not resume:
        if last.is_file():
            raise ValueError(
                f"{out} holds a run already; continue it with --resume, remove it, or set another output_dir"
            )
        return
    saved = out / "config.yaml"
    if last.is_file() and saved.is_file():
        before = load_config(saved)
        for part in ("model", "loss", "training", "data", "seed"):
            if getattr(before, part) != getattr(config, part):
                raise ValueError(
                    f"cannot resume: the run in {out} was made with another '{part}' than {config.name}'s "
                    f"configuration now has ({_difference(before, config, part)}); restore it or set "
                    f"another output_dir"
                )


def _difference(before: TrainConfig, now: TrainConfig, part: str) -> str:
    old, new = getattr(before, part), getattr(now, part)
    if not dataclasses.is_dataclass(old):
        return f"{part}: {old} then, {new} now"
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if a != b:
            return f"{field.name}: {a} then, {b} now"
    return part


def _print_start(config: TrainConfig, splits: fr.Splits, potential: Potential) -> None:
    weights = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    print(
        f"{config.name}: {len(splits.train)} training and {len(splits.valid)} validation frames of "
        f"{' '.join(splits.elements)}; {config.model.preset} network, {config.model.head} head, "
        f"{weights} weights, {config.model.dtype}",
        flush=True,
    )
    log.debug("%s", json.dumps(splits.reference_energies))
