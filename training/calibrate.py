"""What is fitted after training, on frozen features: feature distance and force distribution.

The distance comes from the training frames' features; everything with a size (its median, the force
distribution, the bins of force_entropy) from the validation frames, not trained on.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import GroupKFold
from torch import Tensor

from lmp_hl import keys
from lmp_hl.nn.backbone import Features
from lmp_hl.potential import Potential, edge_forces

from . import frames as fr

FOLDS = 4
# on the weights of the force distribution's location; the largest makes it constant per element
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 1e6)


class Atoms(NamedTuple):
    """Frozen features of all atoms of a set and the errors of their forces.

    features: of num_atoms atoms; species, frame: (num_atoms,); errors: (num_atoms, 3), eV/Å.
    """

    features: Features
    species: Tensor
    frame: Tensor
    errors: Tensor


def calibrate(
    potential: Potential, train: fr.GraphDataset, valid: fr.GraphDataset
) -> dict[str, Any]:
    """Fit distance and force distribution in place and say how well they do on validation frames.

    Args:
        potential: trained.
        train: its training frames.
        valid: frames it was not trained on.

    Returns:
        For the card: number of validation frames and atoms, cross-validated ratio predicted/true
        force error and log density (nats per atom), Spearman rank correlation of every field with
        the force error.
    """
    # float64 throughout: covariances of correlated features lose float32's digits
    working = _copy(potential).double()
    seen = collect_atoms(working, train)
    held = collect_atoms(working, valid)
    fit_distance(working, seen, held)
    summary = fit_force_distribution(working, held)
    potential.load_state_dict(working.state_dict())
    summary["ranking"] = _rank_fields(working, held)
    return summary


def _copy(potential: Potential) -> Potential:
    import copy

    return copy.deepcopy(potential).cpu().eval()


def collect_atoms(potential: Potential, dataset: fr.GraphDataset) -> Atoms:
    """Features and force errors of every atom of a dataset, in the potential's dtype."""
    dtype = next(potential.parameters()).dtype
    scalars, tensors, species, errors, frame = [], [], [], [], []
    for index, graph in enumerate(dataset):
        inputs = dict(graph)
        vectors = graph[keys.EDGE_VECTORS].to(dtype).requires_grad_(True)
        inputs[keys.EDGE_VECTORS] = vectors
        features, energy = potential.atoms(inputs)
        (gradient,) = torch.autograd.grad([energy.energy.sum()], [vectors])
        num_atoms = int(graph[fr.NUM_ATOMS])
        forces = edge_forces(graph[keys.EDGE_INDEX], gradient, num_atoms)
        scalars.append(features.scalars.detach())
        tensors.append(features.tensors.detach())
        species.append(graph[keys.SPECIES])
        errors.append(graph[fr.TARGET_FORCES].to(dtype) - forces)
        frame.append(torch.full((num_atoms,), index))
    return Atoms(
        Features(torch.cat(scalars), torch.cat(tensors, dim=1)),
        torch.cat(species),
        torch.cat(frame),
        torch.cat(errors),
    )


def fit_distance(potential: Potential, seen: Atoms, held: Atoms) -> None:
    """Mean and inverse covariance of the features per element, median of the distance.

    Features are divided by their standard deviations, and the covariance is shrunk towards the
    identity as Ledoit & Wolf (2004) find optimal, so that an element with few atoms still has a
    finite distance.
    """
    distance = potential.distance
    x = distance.describe(seen.features)
    for element in range(distance.mean.shape[0]):
        rows = x[seen.species == element].numpy()
        std = rows.std(0)
        std = np.where(std > 1e-6 * std.max(), std, max(std.max(), 1e-12))
        covariance = LedoitWolf(assume_centered=True).fit((rows - rows.mean(0)) / std).covariance_
        whiten = np.linalg.cholesky(np.linalg.inv(covariance)) / std[:, None]
        distance.mean[element] = torch.from_numpy(rows.mean(0))
        distance.whiten[element] = torch.from_numpy(whiten)
    distance.median.fill_(1.0)
    distance.median.copy_(distance(held.features, held.species).median())


def fit_force_distribution(potential: Potential, held: Atoms) -> dict[str, Any]:
    """Maximum likelihood of the validation frames' force errors, penalty by cross-validation."""
    head = potential.force_distribution
    x = held.features.scalars
    head.feature_mean.copy_(x.mean(0))
    std = x.std(0)
    head.feature_std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))
    head.tensor_rms.copy_(held.features.tensors[4:9].square().mean().sqrt())
    factor = potential.distance(held.features, held.species)

    start = {k: v.clone() for k, v in head.state_dict().items()}
    num_frames = int(held.frame.max()) + 1
    scores: dict[float, tuple[float, Tensor]] = {}
    if num_frames >= 2:
        folds = GroupKFold(min(FOLDS, num_frames))
        for penalty in PENALTIES:
            score = 0.0
            std_of = torch.zeros_like(factor)
            for fit_rows, test_rows in folds.split(x, groups=held.frame):
                head.load_state_dict(start)
                _fit(head, _rows(held, fit_rows), factor[fit_rows], penalty)
                part = _rows(held, test_rows)
                force = head(part.features, part.species)
                score += float(head.log_density(force, factor[test_rows], part.errors).sum())
                std_of[test_rows] = head.std(force, factor[test_rows]).detach()
            scores[penalty] = (score / len(x), std_of)
    penalty = max(scores, key=lambda p: scores[p][0]) if scores else PENALTIES[-1]
    head.load_state_dict(start)
    _fit(head, held, factor, penalty)
    std = head.std(head(held.features, held.species), factor).detach()
    head.set_bin_width(float(std.median()))
    cross_std = scores[penalty][1] if scores else std
    rmse = held.errors.square().mean().sqrt()
    return {
        "validation_frames": num_frames,
        "validation_atoms": len(x),
        "penalty": penalty,
        "force_rmse": float(rmse),
        "size_ratio": float(cross_std.square().mean().sqrt() / rmse),
        "log_density": scores[penalty][0] if scores else math.nan,
    }


def _rows(atoms: Atoms, rows: np.ndarray) -> Atoms:
    index = torch.from_numpy(np.asarray(rows))
    features = Features(atoms.features.scalars[index], atoms.features.tensors[:, index])
    return Atoms(features, atoms.species[index], atoms.frame[index], atoms.errors[index])


def _fit(head: torch.nn.Module, atoms: Atoms, factor: Tensor, penalty: float) -> None:
    parameters = list(head.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")
    # delta is weakly tied to zero: a free weight for every scale would follow single atoms
    tied: Sequence[tuple[Tensor, float]] = (
        (head.location.weight, penalty),
        (head.shape_weight, penalty),
        (head.delta, 1e-2),
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        force = head(atoms.features, atoms.species)
        value = -head.log_density(force, factor, atoms.errors).mean()
        for weight, strength in tied:
            value = value + strength * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    for parameter in parameters:
        parameter.requires_grad_(False)


def _rank_fields(potential: Potential, held: Atoms) -> dict[str, float]:
    """Spearman correlation of every field with |dF| on the validation atoms, pooled."""
    with torch.no_grad():
        energy = potential.energy_head(held.features.scalars, held.species)
        fields = potential.fields(held.features, energy, held.species)
    size = held.errors.norm(dim=1).numpy()
    pairs = itertools.chain(fields.items())
    return {name: float(spearmanr(value.numpy(), size).statistic) for name, value in pairs}
