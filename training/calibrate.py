"""What is fitted after training on frozen features: the uncertainty methods of a potential."""

import copy
from typing import Any

import torch
from scipy.stats import spearmanr

from lmp_hl import keys
from lmp_hl.ensemble import Ensemble
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import AtomicEnergy
from lmp_hl.potential import Potential, edge_forces
from lmp_hl.uncertainty import Atoms

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
    summary: dict[str, Any] = {
        "validation_frames": held.num_frames,
        "validation_atoms": len(held.species),
        "force_rmse": float(held.errors.square().mean().sqrt()),
    }
    summary.update(working.energy_head.fit(seen, held))
    for method in working.uncertainty_methods():
        summary.update(method.fit(seen, held))
    potential.load_state_dict(working.state_dict())
    summary["ranking"] = _rank_fields(working, held)
    return summary


def collect_atoms(potential: Potential, dataset: fr.GraphDataset) -> Atoms:
    """What one forward pass leaves of every atom of a dataset, in the potential's dtype."""
    dtype = next(potential.parameters()).dtype
    features, energies, species, errors, frame, energy_errors = [], [], [], [], [], []
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
    scalars, tensors = zip(*features, strict=True)
    return Atoms(
        Features(torch.cat(scalars), torch.cat(tensors, dim=1)),
        AtomicEnergy(*(torch.cat(parts) for parts in zip(*energies, strict=True))),
        torch.cat(species),
        torch.cat(frame),
        torch.cat(errors),
        torch.tensor(energy_errors, dtype=dtype),
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
    return {
        "force_factor": float(factor),
        "frames": len(held),
        "atoms": len(element),
        "force_rmse": float(rmse),
        "ranking": _rank(found, error),
    }


@torch.no_grad()
def _rank_fields(potential: Potential, held: Atoms) -> dict[str, float]:
    """Spearman correlation of every field with |dF| on the validation atoms, pooled."""
    return _rank(potential.fields(held.features, held.energy, held.species), held.errors)


def _rank(fields: dict[str, torch.Tensor], errors: torch.Tensor) -> dict[str, float]:
    size = errors.norm(dim=1).numpy()
    return {name: float(spearmanr(value.numpy(), size).statistic) for name, value in fields.items()}
