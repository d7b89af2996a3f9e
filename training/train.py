"""One run of training, from YAML to a calibrated checkpoint."""

import dataclasses
import importlib
import logging
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
from .checkpoint import load_network, save_checkpoint
from .config import IvonConfig, SwagConfig, TrainConfig, load_config, to_yaml
from .module import PotentialModule, build_potential
from .notebook import Notebook
from .posterior import Posterior, Swag, weights_of, with_weights
from .prediction import need_compilers
from .stress_labels import stress_offset

# as many atoms as set the scales of the features; more change nothing
SCALE_ATOMS = 4000


def train(config_path: str | Path, resume: bool = False) -> Path:
    """Train, calibrate and save one potential.

    Args:
        config_path: YAML file, see TrainConfig.
        resume: continue the run in `output_dir` after its last finished epoch; the result is the
            same as that of a run that was never interrupted.

    Returns:
        The checkpoint `output_dir/model.ckpt`, ready for export. Beside it: config.yaml,
        metrics.csv, checkpoints/, tensorboard/, and with `training.posterior` its samples
        member_0.ckpt, ...

    Raises:
        ValueError: bad configuration or data; no compiler where one is needed; a run is in
            `output_dir` already and `resume` is off, or it was made with another configuration.
        ImportError: IVON is asked for and not installed.
    """
    config = load_config(config_path)
    out = config.output_dir
    last = out / "checkpoints" / "last.ckpt"
    _check_output(config, last, resume)
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    L.seed_everything(config.seed, verbose=False)

    if isinstance(config.training.posterior, IvonConfig):
        importlib.import_module("lmp_hl.training.ivon")  # a missing package is met at the door
    if config.training.compile:
        need_compilers()

    splits = fr.load_splits(config.data, config.seed)
    baseline, start_from = baseline_energies(splits), config.training.init_from
    if start_from is not None:
        potential = load_network(start_from, config.model, splits.elements)
        energies = potential.reference_energies.tolist()
        baseline = dict(zip(splits.elements, energies, strict=True))
    graphs = {name: _graphs(config, splits, baseline, name) for name in ("train", "valid")}
    if start_from is None:
        potential = initial_potential(config, splits.elements, baseline, graphs["train"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    module = PotentialModule(potential, config)
    trainer = _trainer(config, out)
    if trainer.is_global_zero:
        _print_start(config, splits, potential)
        _check_stress(config, splits)
    start = time.time()
    trainer.fit(
        module,
        make_loader(graphs["train"], config, shuffle=True),
        make_loader(graphs["valid"], config, shuffle=False),
        ckpt_path=last if resume and last.is_file() else None,
        weights_only=True,
    )
    if trainer.interrupted:
        raise KeyboardInterrupt
    for callback in [c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]:
        # the averaged weights; Lightning's loop ends so only if it had an epoch left to train
        callback.on_train_end(trainer, module)
    checkpoint = out / "model.ckpt"
    if trainer.is_global_zero:
        potential = module.potential.cpu().eval()
        posterior = _posterior(config, trainer, potential)
        if posterior is not None:
            generator = torch.Generator().manual_seed(config.seed)
            for k in range(config.training.posterior.members):
                print(f"calibrating member {k}", flush=True)
                member = with_weights(potential, posterior.sample(generator))
                summary = calibrate(member, graphs["train"], graphs["valid"])
                named = dataclasses.replace(config, name=f"{config.name}-member{k}")
                path, seconds = out / f"member_{k}.ckpt", time.time() - start
                save_checkpoint(path, member, named, splits, summary, seconds)
            potential = with_weights(potential, posterior.mean)
        print("calibrating the uncertainty on the validation frames", flush=True)
        summary = calibrate(potential, graphs["train"], graphs["valid"])
        size = summary.get("size_ratio")  # of the default method
        print(
            f"force error of validation frames {1e3 * summary['force_rmse']:.1f} meV/Å"
            + (f"; predicted/true size {size:.2f} (cross-validated)" if size else "")
        )
        save_checkpoint(checkpoint, potential, config, splits, summary, time.time() - start)
        print(f"saved {checkpoint}", flush=True)
    trainer.strategy.barrier()
    return checkpoint


def baseline_energies(splits: fr.Splits) -> dict[str, float]:
    """Energy per element that the network starts from: the references plus the mean binding energy.

    The rest after the reference energies is fitted per element by least squares (minimum norm), so
    that the network's own energies scatter around zero.
    """
    references = splits.reference_energies
    rest = [
        dataclasses.replace(
            frame,
            energy=frame.energy - sum(references[e] * n for e, n in _count(frame, splits.elements)),
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
    for head in potential.energy_head.parts():
        head.scale.fill_(float(forces.square().mean().sqrt().clamp(min=1e-3)))
    energies = torch.tensor([baseline[element] for element in elements], dtype=torch.float64)
    potential.reference_energies.copy_(energies)
    return potential


def _posterior(config: TrainConfig, trainer: L.Trainer, potential: Potential) -> Posterior | None:
    """What the run learnt about its weights, if it was asked to."""
    if isinstance(config.training.posterior, SwagConfig):
        (swag,) = [callback for callback in trainer.callbacks if isinstance(callback, Swag)]
        return swag.moments.posterior()
    if isinstance(config.training.posterior, IvonConfig):
        parameters = [p for p in potential.parameters() if p.requires_grad]
        return trainer.optimizers[0].posterior(parameters, weights_of(potential))
    return None


def _count(frame: fr.Frame, elements: Sequence[str]) -> list[tuple[str, int]]:
    return [(e, int((frame.numbers == atomic_numbers[e]).sum())) for e in elements]


def _graphs(
    config: TrainConfig, splits: fr.Splits, baseline: dict[str, float], name: str
) -> fr.GraphDataset:
    model = config.model
    frames = splits.train if name == "train" else splits.valid
    return fr.GraphDataset(
        frames, splits.elements, baseline, model.cutoff, model.layers, model.dtype
    )


def make_loader(dataset: fr.GraphDataset, config: TrainConfig, shuffle: bool) -> DataLoader[Any]:
    """Batches of a data set.

    Their order depends on seed and epoch only, so a resumed run sees what an uninterrupted one
    would. With several processes Lightning puts in a sampler of this kind for each of them.
    """
    alone = config.training.devices == 1
    sampler = (
        DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=config.seed)
        if alone
        else None
    )
    return DataLoader(
        dataset,
        batch_size=config.training.batch_size,
        sampler=sampler,
        shuffle=shuffle if sampler is None else None,
        collate_fn=fr.collate_graphs,
    )


def _trainer(config: TrainConfig, out: Path) -> L.Trainer:
    training = config.training
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # not for us: graphs are in memory, epochs are short, a resumed run's folder is not empty
    advice = ("many workers", "number of training batches", "LeafSpec", "Checkpoint directory")
    for text in advice:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
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
    if isinstance(training.posterior, SwagConfig):
        callbacks.append(Swag(training.posterior))
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
                f"{out} holds a run already; continue it with --resume, remove it, or set "
                f"another output_dir"
            )
        return
    saved = out / "config.yaml"
    if last.is_file() and saved.is_file():
        before = load_config(saved)
        for part in ("model", "loss", "training", "data", "seed"):
            if getattr(before, part) != getattr(config, part):
                raise ValueError(
                    f"cannot resume: the run in {out} was made with another '{part}' than "
                    f"{config.name}'s configuration now has ({_difference(before, config, part)}); "
                    f"restore it or set another output_dir"
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


def _check_stress(config: TrainConfig, splits: fr.Splits) -> None:
    """Warn where stress labels and energies cannot both be fitted."""
    found = stress_offset(splits.train) if config.loss.stress > 0 else None
    if found is not None and found.explains:
        print(
            f"warning: the stress labels do not agree with the energies: between {found.num_pairs} "
            f"pairs of strained frames {1e3 * abs(found.value):.1f} meV/Å³ are missing on the "
            f"diagonal, which looks like Pulay stress. Set data.stress_offset: "
            f"{config.data.stress_offset + found.value:.4f} to add them, or loss.stress: 0",
            flush=True,
        )


def _print_start(config: TrainConfig, splits: fr.Splits, potential: Potential) -> None:
    weights = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    print(
        f"{config.name}: {len(splits.train)} training and {len(splits.valid)} validation frames of "
        f"{' '.join(splits.elements)}; {config.model.preset} network, {config.model.head} head, "
        f"{weights} weights, {config.model.dtype}",
        flush=True,
    )
