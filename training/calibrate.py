"""What is fitted after training on frozen features: the uncertainty methods of a potential.

`calibrate` fits them at the end of a training run, `recalibrate` those of a model file to other
frames. The formulas are the methods' own (lmp_hl/uncertainty), which work on what one forward pass
leaves of every atom, wherever that was made.
"""

import copy
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from lmp_hl import __version__, evaluate, keys
from lmp_hl.ensemble import Ensemble
from lmp_hl.export import replace_file
from lmp_hl.model_file import FORMAT_VERSION, Model, load
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import AtomicEnergy
from lmp_hl.potential import Potential, edge_forces
from lmp_hl.uncertainty import METHODS, Atoms, Method, Sizes, conformal
from lmp_hl.uncertainty.neighbors import neighbor_weights

from . import frames as fr

MIN_FRAMES = 5  # to calibrate an ensemble on


def calibrate(
    potential: Potential, train: fr.GraphDataset, valid: fr.GraphDataset
) -> dict[str, Any]:
    """Fit every uncertainty method in place and say how well they do on validation frames.

    Args:
        potential: trained.
        train: its training frames.
        valid: frames it was not trained on.

    Returns:
        For the card: number of validation frames and atoms, their force RMSE; what each method says
        about its fit; Spearman correlation of every field with the force error.
    """
    # float64 throughout: covariances of correlated features lose float32's digits
    working = copy.deepcopy(potential).cpu().eval().double()
    seen = collect_atoms(working, train)
    held = collect_atoms(working, valid)
    summary = _describe(held)
    summary.update(working.energy_head.fit(seen, held))
    for method in working.uncertainty_methods():
        summary.update(method.fit(seen, held))
    potential.load_state_dict(working.state_dict())
    with torch.no_grad():
        fields = working.fields(
            held.features, held.energy, held.species, held.edge_index, held.edge_weights
        )
    summary["ranking"] = _rank(fields, working.field_names(), held.errors)
    return summary


def recalibrate(
    model_path: str | Path, data_path: str | Path, out: str | Path | None = None, **label_keys: str
) -> dict[str, Any]:
    """Fit the uncertainty methods of an `hl.pt` to labelled frames that it was not trained on.

    Whatever has a size is fitted anew (Method.calibrate); the network, the energy and the
    statistics of the training frames stay, so energies and forces are the same bit for bit.

    Args:
        model_path: `hl.pt`.
        data_path: frames with energy and forces, as for evaluate.
        out: file to write, whole or not at all; None: `model_path` itself.
        label_keys: energy_key, forces_key where they differ from "energy", "forces".

    Returns:
        What the new card says about the calibration.

    Raises:
        ValueError: a compiled file; too few frames or frames that the model does not know; a file
            whose methods are not those of this lmp-hl or cannot be fitted by themselves.
    """
    model = load(model_path)
    if model.build is not None:
        raise ValueError(
            f"{model_path}: compiled code cannot be changed; calibrate the hl.pt of the same "
            "checkpoint (lmp-hl export model.ckpt hl.pt)"
        )
    if model.module.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{model_path}: model format {model.module.format_version}, this lmp-hl calibrates "
            f"format {FORMAT_VERSION}; export it again with lmp-hl export model.ckpt hl.pt"
        )
    frames = evaluate.read(data_path, model.elements, **label_keys)
    if len(frames) < conformal.MIN_FRAMES:
        raise ValueError(
            f"{data_path}: {len(frames)} frames; calibration needs at least "
            f"{conformal.MIN_FRAMES}, because "
            "it holds out a quarter of the frames at a time to see the error of its own fit"
        )
    members = list(model.module.stages.ensemble.members.children())
    if len(members) > 1:
        raise ValueError(
            f"{model_path}: an ensemble of {len(members)} potentials; export it again with "
            f"lmp-hl export --valid {data_path} and its checkpoints"
        )
    potential = members[0]
    scripted = dict(potential.methods.named_children())
    methods = {
        name: _copy(model, potential.backbone, name, module) for name, module in scripted.items()
    }
    if not methods:
        raise ValueError(f"{model_path}: carries no uncertainty method (model.uncertainty)")
    energies = potential.reference_energies.tolist()
    references = dict(zip(model.elements, energies, strict=True))
    graphs = fr.GraphDataset(
        frames, model.elements, references, model.cutoff, model.num_layers, model.dtype
    )
    found = collect_atoms(potential, graphs)
    held = found.double()
    summary = _describe(held)
    for method in methods.values():
        summary.update(method.calibrate(held))
    with torch.no_grad():
        for name, method in methods.items():
            for key, value in scripted[name].state_dict().items():
                value.copy_(method.state_dict().get(key, value))
        fields = potential.fields(
            found.features, found.energy, found.species, found.edge_index, found.edge_weights
        )
    names = _field_names(model.fields, methods.values())
    for name in names:
        if name != keys.ENERGY and not bool(torch.isfinite(fields[name]).all()):
            raise ValueError(f"{data_path}: calibrated on these frames {name} is not finite")
    summary["ranking"] = _rank(fields, names, held.errors)
    summary["recalibrated"] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": Path(data_path).name,
        "sha256": hashlib.sha256(Path(data_path).read_bytes()).hexdigest(),
        "of_model": model.hash,
        "lmp_hl": __version__,
    }
    card = {**model.card, "calibration": summary}
    for method in methods.values():
        card.update(method.card())
    content = _rewritten(model, names, card)
    replace_file(Path(model_path if out is None else out), content, check=load)
    return summary


def _copy(model: Model, backbone: Any, name: str, scripted: torch.jit.ScriptModule) -> Method:
    """A method of a model file as one that can be fitted, in float64."""
    l_max = math.isqrt(backbone.num_components) - 1
    bins = model.card.get("histogram", {}).get("num_bins", 0)
    sizes = Sizes(backbone.num_scalars, backbone.channels, l_max, len(model.elements), bins)
    found = scripted.state_dict()
    if name in METHODS:
        method = METHODS[name](sizes).double()
        wanted = method.state_dict()
        if all(key in found and found[key].shape == wanted[key].shape for key in wanted):
            method.load_state_dict({key: found[key] for key in wanted})
            return method.requires_grad_(False)
    raise ValueError(
        f"{model.path}: the statistics of its uncertainty method '{name}' are not those that this "
        f"lmp-hl ({__version__}) knows; export it again from its checkpoint with lmp-hl export"
    )


def _field_names(before: Sequence[str], methods: Any) -> list[str]:
    of_methods = {name for method in methods for name in method.FIELDS}
    names = [name for name in before if name not in of_methods]
    for method in methods:
        names += [name for name in method.available_fields() if name not in names]
    return names


def _rewritten(model: Model, fields: list[str], card: dict[str, Any]) -> bytes:
    """Content of the file with what it says about itself made true again."""
    module = model.module
    module.card = json.dumps(card, indent=1)
    module.fields = module.stages.fields = fields
    module.field_units = [keys.FIELD_UNITS[name] for name in fields]
    outputs = module(dict(module.selftest_inputs), True, False)
    told = (keys.EDGE_GRADIENTS, *fields)
    module.selftest_outputs = {name: outputs[name].detach() for name in told}
    buffer = io.BytesIO()
    torch.jit.save(module, buffer, _extra_files={"card.json": module.card})
    return buffer.getvalue()


def _describe(held: Atoms) -> dict[str, Any]:
    rmse = float(held.errors.square().mean().sqrt())
    if not rmse > 1e-6:  # text files round to 1e-8
        raise ValueError(
            "the model has no force error on the validation frames: their labels are its own, or "
            "there is no atom in them; calibrate on labelled frames it was not trained on"
        )
    return {
        "validation_frames": held.num_frames,
        "validation_atoms": len(held.species),
        "force_rmse": rmse,
    }


def collect_atoms(potential: Potential | torch.jit.ScriptModule, dataset: fr.GraphDataset) -> Atoms:
    """What one forward pass leaves of every atom of a dataset, in the potential's dtype."""
    dtype = next(potential.parameters()).dtype
    cutoff = float(potential.backbone.radial.cutoff)
    features, energies, species, errors, frame, energy_errors = [], [], [], [], [], []
    edges, weights, before = [], [], 0
    for index, graph in enumerate(dataset):
        inputs = dict(graph)
        vectors = graph[keys.EDGE_VECTORS].to(dtype).requires_grad_(True)
        inputs[keys.EDGE_VECTORS] = vectors
        found, energy = potential.atoms(inputs)
        (gradient,) = torch.autograd.grad([energy.energy.sum()], [vectors])
        num_atoms = int(graph[fr.NUM_ATOMS])
        forces = edge_forces(graph[keys.EDGE_INDEX], gradient, num_atoms)
        features.append([x.detach() for x in found])
        energies.append([x.detach() for x in energy])
        species.append(graph[keys.SPECIES])
        errors.append(graph[fr.TARGET_FORCES].to(dtype) - forces)
        frame.append(torch.full((num_atoms,), index))
        energy_errors.append(float(graph[fr.TARGET_ENERGY] - energy.energy.detach().double().sum()))
        edges.append(graph[keys.EDGE_INDEX] + before)
        weights.append(neighbor_weights(vectors.detach(), cutoff))
        before += num_atoms
    scalars, tensors = zip(*features, strict=True)
    return Atoms(
        Features(torch.cat(scalars), torch.cat(tensors, dim=1)),
        AtomicEnergy(*(torch.cat(parts) for parts in zip(*energies, strict=True))),
        torch.cat(species),
        torch.cat(frame),
        torch.cat(errors),
        torch.tensor(energy_errors, dtype=dtype),
        torch.cat(edges, dim=1),
        torch.cat(weights),
    )


def calibrate_ensemble(ensemble: Ensemble, held: fr.GraphDataset) -> dict[str, Any]:
    """Set in place what an ensemble learns from frames that no member was trained on.

    The members' mean energies of an atom of each element, and the factor of ensemble_force_std,
    which makes its mean square that of the errors of a force component.

    Args:
        ensemble: of trained members.
        held: at least MIN_FRAMES frames.

    Returns:
        For the card: factor, number of frames and atoms, force RMSE in eV/Å of the ensemble,
        Spearman correlation of every field with the force error.

    Raises:
        ValueError: too few frames, or members that do not disagree on them.
    """
    if len(held) < MIN_FRAMES:
        raise ValueError(f"wanted at least {MIN_FRAMES} frames to calibrate on, got {len(held)}")
    working = copy.deepcopy(ensemble).cpu().eval().double()
    outputs, species, errors = [], [], []
    for graph in held:
        inputs = {**graph, keys.EDGE_VECTORS: graph[keys.EDGE_VECTORS].double()}
        outputs.append({k: v.detach() for k, v in working(inputs, True).items()})
        gradients = outputs[-1].pop(keys.EDGE_GRADIENTS)
        forces = edge_forces(graph[keys.EDGE_INDEX], gradients, int(graph[fr.NUM_ATOMS]))
        species.append(graph[keys.SPECIES])
        errors.append(graph[fr.TARGET_FORCES].double() - forces)
        del outputs[-1][keys.ENERGY]
    found = {name: torch.cat([of_one[name] for of_one in outputs]) for name in outputs[0]}
    element, error = torch.cat(species), torch.cat(errors)

    energies = found.pop(keys.MEMBERS)
    std = found[keys.ENSEMBLE_FORCE_STD]
    rmse = error.square().mean().sqrt()
    if not std.max() > 1e-9 * rmse:
        raise ValueError("the members of the ensemble do not disagree on the frames given")
    factor = rmse / (std / working.force_factor).square().mean().sqrt()
    ensemble.force_factor.copy_(factor)
    for z in element.unique():
        ensemble.energy_means[:, z] = energies[element == z].mean(0)
    names = working.field_names()
    return {
        "force_factor": float(factor),
        "frames": len(held),
        "atoms": len(element),
        "force_rmse": float(rmse),
        "ranking": _rank(found, names, error),
    }


def _rank(fields: Mapping[str, Tensor], names: Sequence[str], errors: Tensor) -> dict[str, float]:
    """Spearman correlation of fields with |dF|, pooled; not of those that are the same anywhere."""
    size = errors.norm(dim=1).numpy()
    values = {name: fields[name].double().numpy() for name in names if name in fields}
    return {n: float(spearmanr(v, size).statistic) for n, v in values.items() if np.ptp(v) > 0}
