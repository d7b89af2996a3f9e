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
from typing import Any, NamedTuple

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
from lmp_hl.uncertainty.committee import CommitteeEnergy
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
        about its fit; of every field what _judge says.
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
    summary.update(_judge(fields, working.field_names(), held.errors, held.frame))
    return summary


def recalibrate(
    model_path: str | Path, data_path: str | Path, out: str | Path | None = None, **label_keys: str
) -> dict[str, Any]:
    """Fit the uncertainty of an `hl.pt` to labelled frames that it was not trained on.

    Whatever has a size is fitted anew (Method.calibrate, of every member of an ensemble, then the
    members' disagreement); the network, the energy and the statistics of the training frames stay,
    so energies and forces are the same bit for bit.

    Args:
        model_path: `hl.pt`.
        data_path: frames with energy and forces, as for evaluate.
        out: file to write, whole or not at all; None: `model_path` itself.
        label_keys: energy_key, forces_key where they differ from "energy", "forces".

    Returns:
        The new card: "calibration", of an ensemble that of its first member and the ranking of the
        whole; of an ensemble also "ensemble".

    Raises:
        ValueError: a compiled file; too few frames or frames that the model does not know; a file
            whose methods are not those of this lmp-hl, or that has nothing to calibrate.
    """
    model = load(model_path)
    if model.build is not None:
        raise ValueError(
            f"{model_path}: compiled code cannot be changed; calibrate the hl.pt of the same "
            "checkpoint (lmp-hl export model.ckpt hl.pt), then compile it (lmp-hl export --runtime "
            "aoti hl.pt hl.pt2)"
        )
    if model.module.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{model_path}: model format {model.module.format_version}, this lmp-hl calibrates "
            f"format {FORMAT_VERSION}; export it again with lmp-hl export model.ckpt hl.pt"
        )
    ensemble = model.module.stages.ensemble
    members = list(ensemble.members.children())
    frames = evaluate.read(data_path, model.elements, **label_keys)
    needed = MIN_FRAMES if len(members) > 1 else conformal.MIN_FRAMES
    if len(frames) < needed:
        raise ValueError(
            f"{data_path}: {len(frames)} frames; calibration needs at least {needed}, to tell the "
            "size of the errors from that of a single frame"
        )
    fitted = [_calibrate_member(model, member, frames) for member in members]
    if len(members) == 1 and not fitted[0].offered:
        raise ValueError(f"{model_path}: carries no uncertainty method (model.uncertainty)")
    names = _field_names(model.fields, [found.offered for found in fitted])
    summary, card = fitted[0].summary, {**model.card, **fitted[0].card}
    # the energies of an ensemble include those of its members' references
    graphs = _graphs(model, frames, [0.0] * len(model.elements))
    if len(members) > 1:
        about = {"file": Path(data_path).name, **calibrate_ensemble(ensemble, graphs)}
        card["ensemble"] = {**card.get("ensemble", {}), "calibration": about}
    try:
        summary.update(judge_fields(ensemble, graphs, names))
    except ValueError as error:
        raise ValueError(f"{data_path}: calibrated on these frames {error}") from None
    summary["recalibrated"] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": Path(data_path).name,
        "sha256": hashlib.sha256(Path(data_path).read_bytes()).hexdigest(),
        "of_model": model.hash,
        "lmp_hl": __version__,
    }
    card["calibration"] = summary
    content = _rewritten(model, names, card)
    replace_file(Path(model_path if out is None else out), content, check=load)
    return card


class _Fitted(NamedTuple):
    """What is known of one potential of a model file that has been calibrated in place."""

    offered: dict[str, bool]  # fields that were fitted anew -> whether it can answer for them
    summary: dict[str, Any]
    card: dict[str, Any]


def _calibrate_member(
    model: Model, member: torch.jit.ScriptModule, frames: Sequence[fr.Frame]
) -> _Fitted:
    held = collect_atoms(member, _graphs(model, frames, member.reference_energies.tolist()))
    held = held.double()
    fitted = _Fitted({}, _describe(held), {})
    for name, scripted in dict(member.methods.named_children()).items():
        method = _copy(model, member, name, scripted)
        fitted.summary.update(method.calibrate(held))
        _set(scripted, method)
        available = method.available_fields()
        fitted.offered.update({field: field in available for field in method.FIELDS})
        fitted.card.update(method.card())
    if "centers" in member.energy_head.state_dict():
        committee = _copy_committee(member.energy_head)
        fitted.summary.update(committee.calibrate(held))
        member.energy_head.factor.copy_(committee.factor)
        fitted.offered.update(dict.fromkeys(committee.FIELDS, True))
    return fitted


@torch.no_grad()
def _set(scripted: torch.jit.ScriptModule, method: Method) -> None:
    fitted = method.state_dict()
    for key, value in scripted.state_dict().items():
        value.copy_(fitted.get(key, value))


def _graphs(
    model: Model, frames: Sequence[fr.Frame], reference_energies: Sequence[float]
) -> fr.GraphDataset:
    references = dict(zip(model.elements, reference_energies, strict=True))
    return fr.GraphDataset(
        frames, model.elements, references, model.cutoff, model.num_layers, model.dtype
    )


def _copy(model: Model, member: Any, name: str, scripted: torch.jit.ScriptModule) -> Method:
    """A method of a model file as one that can be fitted, in float64."""
    backbone, head = member.backbone, member.energy_head.state_dict()
    l_max = math.isqrt(backbone.num_components) - 1
    bins = len(head["offsets"]) if "offsets" in head else 0
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


def _copy_committee(scripted: torch.jit.ScriptModule) -> CommitteeEnergy:
    """A committee that can be calibrated, in float64; its heads' weights do not matter for that."""
    state = scripted.state_dict()
    num_elements, num_members = state["centers"].shape
    num_bins = len(state["heads.0.offsets"])
    committee = CommitteeEnergy(num_members, 1, num_elements, num_bins, sigma=1.0).double()
    for name in ("centers", "factor", "bin_width"):
        committee.get_buffer(name).copy_(state[name])
    return committee


def _field_names(before: Sequence[str], offered: Sequence[Mapping[str, bool]]) -> list[str]:
    """Of the file: as before but for those fitted anew, which all members have to answer for."""
    anew = {name for of_one in offered for name in of_one}
    answered = [name for name in offered[0] if all(of_one.get(name) for of_one in offered)]
    kept = [name for name in before if name not in anew or name in answered]
    return kept + [name for name in answered if name not in kept]


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


def calibrate_ensemble(
    ensemble: Ensemble | torch.jit.ScriptModule, held: fr.GraphDataset
) -> dict[str, Any]:
    """Set in place what an ensemble learns from frames that no member was trained on.

    The members' mean energies of an atom of each element, and the factor of ensemble_force_std,
    which makes its mean square that of the errors of a force component.

    Args:
        ensemble: of trained members.
        held: at least MIN_FRAMES frames, their energies with the elements' references.

    Returns:
        For the card: factor, number of frames and atoms, force RMSE in eV/Å of the ensemble.

    Raises:
        ValueError: too few frames, or members that do not disagree on them.
    """
    if len(held) < MIN_FRAMES:
        raise ValueError(f"wanted at least {MIN_FRAMES} frames to calibrate on, got {len(held)}")
    found, species, errors = _evaluate(ensemble, held)
    std, energies = found[keys.ENSEMBLE_FORCE_STD], found[keys.MEMBERS]
    rmse = errors.square().mean().sqrt()
    if not std.max() > 1e-9 * rmse:
        raise ValueError("the members of the ensemble do not disagree on the frames given")
    factor = rmse / (std / ensemble.force_factor).square().mean().sqrt()
    ensemble.force_factor.copy_(factor)
    for z in species.unique():
        ensemble.energy_means[:, z] = energies[species == z].mean(0)
    return {
        "force_factor": float(factor),
        "frames": len(held),
        "atoms": len(species),
        "force_rmse": float(rmse),
    }


def judge_fields(
    ensemble: Ensemble | torch.jit.ScriptModule, held: fr.GraphDataset, names: Sequence[str]
) -> dict[str, Any]:
    """What a card says of fields (_judge), of frames that no member was trained on.

    Raises:
        ValueError: a field that is not finite.
    """
    found, _, errors = _evaluate(ensemble, held)
    for name in names:
        if name in found and not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"{name} is not finite")
    sizes = torch.tensor([int(graph[fr.NUM_ATOMS]) for graph in held])
    return _judge(found, names, errors, torch.arange(len(sizes)).repeat_interleave(sizes))


def _evaluate(
    ensemble: Ensemble | torch.jit.ScriptModule, graphs: fr.GraphDataset
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Fields of all atoms and `members`; species; errors of the forces (num_atoms, 3), eV/Å."""
    dtype = next(ensemble.parameters()).dtype
    outputs, species, errors = [], [], []
    for graph in graphs:
        inputs = {**graph, keys.EDGE_VECTORS: graph[keys.EDGE_VECTORS].to(dtype)}
        found = {k: v.detach() for k, v in ensemble(inputs, True, False).items()}
        gradients = found.pop(keys.EDGE_GRADIENTS).double()
        forces = edge_forces(graph[keys.EDGE_INDEX], gradients, int(graph[fr.NUM_ATOMS]))
        del found[keys.ENERGY]
        outputs.append(found)
        species.append(graph[keys.SPECIES])
        errors.append(graph[fr.TARGET_FORCES].double() - forces)
    names = [name for name in outputs[0] if not name.startswith(keys.OF_FRAME)]
    fields = {name: torch.cat([of_one[name] for of_one in outputs]) for name in names}
    return fields, torch.cat(species), torch.cat(errors)


def _judge(
    fields: Mapping[str, Tensor], names: Sequence[str], errors: Tensor, frame: Tensor
) -> dict[str, Any]:
    """What fields, but for those that are the same anywhere, say of the frames they are given on.

    Returns:
        "ranking": Spearman correlation with |dF|, pooled; with enough frames "largest_coverage",
        and "largest": what the largest value of a frame like these stays below with that
        probability (conformal.py, one score for each frame).
    """
    size = errors.norm(dim=1).numpy()
    values = {name: fields[name].double().numpy() for name in names if name in fields}
    values = {name: v for name, v in values.items() if np.ptp(v) > 0}
    found: dict[str, Any] = {
        "ranking": {name: float(spearmanr(v, size).statistic) for name, v in values.items()}
    }
    frames = frame.unique().numpy()
    coverage = conformal.attainable_coverage(len(frames))
    if coverage > 0:
        found["largest_coverage"], found["largest"] = coverage, {}
        for name, v in values.items():
            if name == keys.EXTRAPOLATING:  # a flag has no size
                continue
            largest = np.full(int(frames.max()) + 1, -np.inf)
            np.maximum.at(largest, frame.numpy(), v)
            limit = conformal.pooled_quantile(largest[frames], frames, coverage)
            found["largest"][name] = limit
    return found
