"""What is fitted after training, on frozen features: feature distance and force distribution.

The distance comes from the training frames' features; everything with a size (its median, the force
distribution, the bins of force_entropy) from the validation frames, not trained on.
"""

import copy
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
from lmp_hl.nn.heads import ForceDistribution, invariants
from lmp_hl.potential import Potential, edge_forces

from . import frames as fr

FOLDS = 4
# on the weights of the force distribution's location; the largest makes it constant per element
PENALTIES = (1e6, 1.0, 1e-1, 1e-2)
# forces that vanish by symmetry have no error; below this share of the RMSE an error counts as
# noise, or else the likelihood would look at nothing but those atoms
NOISE = 0.2


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
        For the card: number of validation frames and atoms; ratio predicted/true force error and
        rank correlation, both cross-validated; Spearman correlation of every field with the error.
    """
    # float64 throughout: covariances of correlated features lose float32's digits
    working = copy.deepcopy(potential).cpu().eval().double()
    seen = collect_atoms(working, train)
    held = collect_atoms(working, valid)
    fit_distance(working, seen, held)
    with torch.no_grad():
        summary = fit_force_distribution(working, held)
    potential.load_state_dict(working.state_dict())
    summary["ranking"] = _rank_fields(working, held)
    return summary


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
    x = invariants(seen.features)
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
    """Fit the validation frames' force errors: shape by likelihood, size by second moment.

    The penalty is the one whose cross-validated force_std (over frames) ranks the errors best, the
    largest on a tie; see _fit for what is fitted.
    """
    head = potential.force_distribution
    x = invariants(held.features)
    head.feature_mean.copy_(x.mean(0))
    std = x.std(0)
    head.feature_std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))
    head.tensor_rms.copy_(held.features.tensors[4:9].square().mean().sqrt())
    rmse = held.errors.square().mean().sqrt()
    torch.nn.init.constant_(head.element_location.weight, float(rmse.log()))
    distance = potential.distance(held.features, held.species)

    start = {k: v.clone() for k, v in head.state_dict().items()}
    num_frames = int(held.frame.max()) + 1
    best, penalty, cross_std = -math.inf, PENALTIES[0], torch.full_like(distance, math.nan)
    for candidate in PENALTIES if num_frames >= 2 else ():
        predicted = torch.zeros_like(distance)
        folds = GroupKFold(min(FOLDS, num_frames)).split(x, groups=held.frame)
        for fit_rows, test_rows in folds:
            head.load_state_dict(start)
            _fit(head, _rows(held, fit_rows), distance[fit_rows], candidate)
            part = _rows(held, test_rows)
            force = head(part.features, part.species)
            predicted[test_rows] = head.std(force, distance[test_rows])
        score = float(spearmanr(predicted.numpy(), held.errors.norm(dim=1).numpy()).statistic)
        if score > best:
            best, penalty, cross_std = score, candidate, predicted
    head.load_state_dict(start)
    _fit(head, held, distance, penalty)
    std = head.std(head(held.features, held.species), distance)
    head.set_bin_width(float(std.median()))
    return {
        "validation_frames": num_frames,
        "validation_atoms": len(x),
        "penalty": penalty,
        "force_rmse": float(rmse),
        "size_ratio": float(cross_std.square().mean().sqrt() / rmse),
        "rank_correlation": best,
    }


def _above_noise(errors: Tensor, noise: Tensor) -> Tensor:
    """Errors (num_atoms, 3) stretched to a length of at least `noise`, in any direction if zero."""
    length = errors.norm(dim=1, keepdim=True)
    stretched = errors * (noise / length.clamp(min=1e-12))
    stretched = torch.where(length > 1e-12, stretched, noise / math.sqrt(3.0))
    return torch.where(length < noise, stretched, errors)


def _rows(atoms: Atoms, rows: np.ndarray) -> Atoms:
    index = torch.from_numpy(np.asarray(rows))
    features = Features(atoms.features.scalars[index], atoms.features.tensors[:, index])
    return Atoms(features, atoms.species[index], atoms.frame[index], atoms.errors[index])


def _fit(head: ForceDistribution, atoms: Atoms, distance: Tensor, penalty: float) -> None:
    """Penalised maximum likelihood, then one factor on all scales.

    A mixture's likelihood hardly minds a tail that is too heavy, but force_std is read as a size:
    the factor makes its mean square that of the errors.
    """
    rmse = atoms.errors.square().mean().sqrt()
    errors = _above_noise(atoms.errors, NOISE * rmse)
    # delta is weakly tied to zero: a free weight for every scale would follow single atoms
    tied: Sequence[tuple[Tensor, float]] = (
        (head.location.weight, penalty),
        (head.shape_weight, penalty),
        (head.delta, 1e-2),
        (head.log_spread, 1e-2),
    )
    parameters = list(head.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        force = head(atoms.features, atoms.species)
        value = -head.log_density(force, distance, errors).mean()
        for weight, strength in tied:
            value = value + strength * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    for parameter in parameters:
        parameter.requires_grad_(False)
    std = head.std(head(atoms.features, atoms.species), distance)
    head.element_location.weight.add_(torch.log(rmse / std.square().mean().sqrt()))


def _rank_fields(potential: Potential, held: Atoms) -> dict[str, float]:
    """Spearman correlation of every field with |dF| on the validation atoms, pooled."""
    with torch.no_grad():
        energy = potential.energy_head(held.features.scalars, held.species)
        fields = potential.fields(held.features, energy, held.species)
    size = held.errors.norm(dim=1).numpy()
    return {name: float(spearmanr(value.numpy(), size).statistic) for name, value in fields.items()}
