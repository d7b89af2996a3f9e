"""A finished training run as one file: weights, configuration and what a model card needs."""

import copy
import dataclasses
import importlib.metadata
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lmp_hl import keys
from lmp_hl.ensemble import Ensemble, split_committee
from lmp_hl.export import TOLERANCE, export_potential
from lmp_hl.model_file import load
from lmp_hl.potential import Potential
from lmp_hl.uncertainty import METHODS

from . import frames as fr
from .calibrate import calibrate_ensemble, judge_fields
from .config import DataConfig, ModelConfig, TrainConfig, model_config, to_yaml
from .module import build_potential
from .notebook import read_metrics

CHECKPOINT_FORMAT = 1


def save_checkpoint(
    path: Path,
    potential: Potential,
    config: TrainConfig,
    splits: fr.Splits,
    calibration: dict[str, Any],
    seconds: float,
) -> None:
    """Write weights, configuration and what a model card needs; readable with weights_only."""
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
    _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    # torch's own writer aborts the process on a full disk
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(buffer.getbuffer())
    os.replace(temporary, path)


def load_checkpoint(
    path: str | Path, dtype: str | None = None
) -> tuple[Potential, list[str], dict[str, Any]]:
    """Read what save_checkpoint wrote.

    Args:
        path: model.ckpt of a finished run.
        dtype: "float32" or "float64" to cast the network to; None: as it was trained.

    Returns:
        potential, elements, card.

    Raises:
        ValueError: no such file, not a finished model, made by a newer version, or weights that do
            not fit the architecture stored with them.
    """
    path = Path(path)
    content = _read(path)
    config = ModelConfig(**content["model"])
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    potential = build_potential(config, len(content["elements"]))
    try:
        potential.load_state_dict(content["state"])
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its weights do not fit its own architecture; made by another version of "
            f"lmp-hl? ({str(error).splitlines()[1].strip()})"
        ) from None
    return potential.eval(), content["elements"], content["card"]


def load_network(path: Path, config: ModelConfig, elements: Sequence[str]) -> Potential:
    """A new potential that starts from the network of a finished run.

    Uncertainty methods that are fitted after training start anew and may be others.

    Args:
        path: model.ckpt.
        config: of the new potential.
        elements: of the new potential.

    Raises:
        ValueError: see load_checkpoint; a network of another kind, or for other elements.
    """
    content = _read(path)
    if content["elements"] != list(elements):
        raise ValueError(
            f"{path}: for the elements {' '.join(content['elements'])}, but this run is for "
            f"{' '.join(elements)}; set data.elements: [{', '.join(content['elements'])}]"
        )
    before, after = _traits(ModelConfig(**content["model"])), _traits(config)
    for name, value in after.items():
        if value != before[name]:
            raise ValueError(
                f"{path}: has model.{name} {before[name]}, but this run {value}; a run starts from "
                f"a network like its own"
            )
    potential = build_potential(config, len(elements))
    state = potential.state_dict()
    fresh = {f"methods.{name}." for name in config.uncertainty if not METHODS[name].trained}
    for name in state:
        if not any(name.startswith(prefix) for prefix in fresh):
            state[name] = content["state"][name]
    potential.load_state_dict(state)
    return potential


def _traits(config: ModelConfig) -> dict[str, Any]:
    """What a network must have in common with one that starts from it."""
    traits = dataclasses.asdict(config)
    del traits["dtype"], traits["bin_width"]
    names = config.uncertainty
    return {**traits, "uncertainty": [name for name in names if METHODS[name].trained]}


def _read(path: Path) -> dict[str, Any]:
    """Content of what save_checkpoint wrote, see load_checkpoint."""
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
    return content


def load_model_file(
    path: str | Path, dtype: str | None = None
) -> tuple[Ensemble, list[str], dict[str, Any]]:
    """Read an `hl.pt` back into the network it was made from, with what it was calibrated to since.

    Args:
        path: `hl.pt`.
        dtype: see load_checkpoint.

    Returns:
        ensemble (of one, if it is none), elements, card.

    Raises:
        ValueError: no such file, a compiled one, or one that this lmp-hl evaluates differently.
    """
    model = load(path)
    if model.build is not None:
        raise ValueError(
            f"{path}: compiled already; give the hl.pt or checkpoints it was made from"
        )
    again = "export it again from its checkpoints"
    dtype = dtype or model.dtype
    about = model.card.get("ensemble")
    parts = about["members"] if about else [model.card["config"]]
    try:
        configs = [model_config(part.get("model")) for part in parts]
        ensemble = Ensemble(
            [
                build_potential(dataclasses.replace(config, dtype=dtype), len(model.elements))
                for config in configs
            ]
        )
        state = model.module.stages.ensemble.state_dict()
        missing = ensemble.load_state_dict(state, strict=False).missing_keys
    except (ValueError, RuntimeError) as error:
        line = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: made by another version of lmp-hl ({line}); {again}") from None
    if missing:
        raise ValueError(f"{path}: made by another version of lmp-hl (no {missing[0]}); {again}")
    ensemble = ensemble.eval().requires_grad_(False)
    inputs = dict(model.module.selftest_inputs)
    inputs[keys.EDGE_VECTORS] = inputs[keys.EDGE_VECTORS].to(getattr(torch, dtype))
    outputs = ensemble(inputs, True)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[model.dtype])
    for name, expected in model.module.selftest_outputs.items():
        error = (outputs[name].double() - expected.double()).abs().max()
        if not error <= tolerance * max(1.0, float(expected.abs().max())):
            raise ValueError(f"{path}: this version of lmp-hl gives another {name}; {again}")
    return ensemble, model.elements, model.card


def export_checkpoint(
    checkpoints: str | Path | Sequence[str | Path],
    path: str | Path,
    runtime: str = "torchscript",
    dtype: str | None = None,
    device: str = "cpu",
    cpu_isa: str = "native",
    valid: str | Path | None = None,
) -> Path:
    """Export the model.ckpt of finished training runs as `hl.pt` or `hl.pt2`.

    Args:
        checkpoints: written by save_checkpoint; several become the members of one ensemble. Or one
            `hl.pt`, to be compiled or cast.
        path: file to write.
        runtime: "torchscript" (`hl.pt`, any device) or "aoti" (`hl.pt2`, compiled).
        dtype: "float32" or "float64"; None: as it was trained.
        device: of a compiled model, "cpu" or "cuda".
        cpu_isa: of a compiled model, see export_compiled.
        valid: frames that no member was trained on, to calibrate an ensemble's disagreement.

    Raises:
        ValueError: see load_checkpoint, load_model_file, export_compiled, Ensemble and
            calibrate_ensemble; a single potential and `valid`; members for different elements.
    """
    potential: Potential | Ensemble
    single = isinstance(checkpoints, str | Path)
    paths = [Path(p) for p in ([checkpoints] if single else checkpoints)]
    if paths[0].suffix == ".pt" and len(paths) == 1:
        if valid is not None:
            raise ValueError(f"{paths[0]}: a model file is calibrated with lmp-hl calibrate")
        potential, elements, card = load_model_file(paths[0], dtype)
    elif len(paths) > 1:
        potential, elements, card = load_ensemble(paths, dtype, valid)
    else:
        potential, elements, card = load_checkpoint(paths[0], dtype)
        if valid is not None:
            raise ValueError(
                f"{valid}: frames to calibrate the disagreement of several checkpoints, but only "
                f"{paths[0]} is given; a single potential was calibrated when it was trained"
            )
    if runtime == "aoti":
        from lmp_hl.compile import export_compiled

        return export_compiled(potential, elements, card, path, device, cpu_isa)
    return export_potential(potential, elements, card, path)


def load_ensemble(
    paths: Sequence[Path], dtype: str | None = None, valid: str | Path | None = None
) -> tuple[Ensemble, list[str], dict[str, Any]]:
    """Several checkpoints as one potential.

    Args:
        paths: of checkpoints of runs that differ in their seed, or in more.
        dtype: see load_checkpoint.
        valid: frames, with labels under the keys of the first run, to calibrate the disagreement.

    Returns:
        ensemble, elements, card: the first member's, and "ensemble" with what is about all.

    Raises:
        ValueError: see export_checkpoint.
    """
    members, elements, cards = zip(*(load_checkpoint(path, dtype) for path in paths), strict=True)
    for path, found in zip(paths, elements, strict=True):
        if found != elements[0]:
            raise ValueError(
                f"{path}: for the elements {' '.join(found)}, but {paths[0]} is for "
                f"{' '.join(elements[0])}; members of an ensemble must have the same"
            )
    ensemble = Ensemble(members)
    card = dict(cards[0])
    about: dict[str, Any] = {
        "members": [
            {
                "name": c.get("name"),
                "model": c.get("config", {}).get("model"),
                **c.get("training", {}),
            }
            for c in cards
        ]
    }
    if valid is not None:
        labels = ("energy_key", "forces_key", "stress_key")
        of_run = card.get("config", {}).get("data", {})
        config = DataConfig(train=(Path(valid),), **{k: of_run[k] for k in labels if k in of_run})
        backbone = members[0].backbone
        graphs = fr.GraphDataset(
            fr.read_frames(valid, config, "valid", elements[0]),
            elements[0],
            dict.fromkeys(elements[0], 0.0),
            float(backbone.radial.cutoff),
            1 + len(backbone.message_layers),
            "float64",
        )
        about["calibration"] = {"file": str(valid), **calibrate_ensemble(ensemble, graphs)}
        judged = judge_fields(ensemble, graphs, ensemble.field_names())
        card["calibration"] = {**card.get("calibration", {}), **judged}
    return ensemble, elements[0], {**card, "ensemble": about}


def split_checkpoint(path: str | Path, folder: str | Path | None = None) -> list[Path]:
    """Write each head of a committee's checkpoint as a checkpoint of its own.

    Exported together they are the ensemble that ensemble.split_committee speaks of.

    Args:
        path: of a potential with head "committee" or "svd_committee".
        folder: where to; None: beside `path`.

    Returns:
        Their paths, <name>-head1.ckpt, <name>-head2.ckpt, ...

    Raises:
        ValueError: see load_checkpoint and split_committee.
    """
    path = Path(path)
    potential, elements, card = load_checkpoint(path)
    try:
        members = split_committee(potential)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    content = torch.load(path, map_location="cpu", weights_only=True)
    folder = path.parent if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, member in enumerate(members, 1):
        of_member = copy.deepcopy(card)
        of_member["name"] = f"{card.get('name', path.stem)}, head {number} of {len(members)}"
        calibration = of_member.get("calibration", {})
        for judged in (calibration.get("ranking", {}), calibration.get("largest", {})):
            for field in set(judged) - set(member.field_names()):
                del judged[field]
        written.append(folder / f"{path.stem}-head{number}.ckpt")
        _write(
            written[-1],
            {
                "lmp_hl_checkpoint": CHECKPOINT_FORMAT,
                "state": member.state_dict(),
                "model": {**content["model"], "head": "hlgauss"},
                "elements": elements,
                "card": of_member,
            },
        )
    return written


def _last_metrics(path: Path) -> dict[str, float]:
    rows = read_metrics(path) if path.is_file() else []
    return rows[-1] if rows else {}
