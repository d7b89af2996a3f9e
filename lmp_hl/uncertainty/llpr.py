"""How firmly the training data hold a prediction when only the last layer may move (LLPR)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import keys
from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy
from .base import Atoms, Method, Sizes
from .per_element import error_scale, rows_of

PROJECTIONS = 32  # columns that stand for the weights of a categorical head's logits
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # lambda, in units of the mean diagonal
SEED = 0


class LastLayerRigidity(Method):
    """Last-layer prediction rigidity, equal to a linearised last-layer Laplace approximation.

    With J_i the derivative of atom i's energy by the last layer's weights, J_f = sum_i J_i over the
    atoms of a frame and H = sum_f J_f J_f^T / s_E^2 over the training frames (s_E the RMS of their
    energy errors),

        var(E_f) = alpha^2 J_f^T (H + lambda)^-1 J_f,    var_i = alpha^2 J_i^T (H + lambda)^-1 J_i,

    alpha^2 and lambda from the likelihood of the validation frames' energy errors; rows of forces
    in H did not raise that likelihood on the sets tried. Bigi, Chong, Ceriotti & Grasselli, arXiv
    2403.02251, where sigma^2 = alpha^2 f^T (F^T F + varsigma^2)^-1 f; per atom: Chong et al., arXiv
    2212.13797; Laplace: Daxberger et al., arXiv 2106.14806.

    J_i of a scalar head are its inputs: scalars, hidden activations and the element's bias. They
    are taken relative to the element's mean and in units of their spread, so that one lambda suits
    all; the bias keeps this a mere change of coordinates. A categorical head has, besides, weights
    of logits z_k: dE/dz_k = g_k = p_k (o_k - sum_l p_l o_l) in bin widths, hence J is the outer
    product of g and (scalars, 1), many thousand numbers, kept as PROJECTIONS random products
    (u.g)(v.(scalars, 1)), whose inner products are right in expectation. Their size relative to the
    others is that of what the histogram adds to the anchor's energy. The slope of the bounds on the
    logits is left out.

    `llpr_energy_std` is sqrt(var_i). A replicated cell has J proportional to the number of copies,
    and so has its standard deviation: errors of equal atoms are the same error. Per atom it holds
    the freedom to shift energy between sites, too, which totals and forces leave open: it is larger
    than the total's error, and its squares do not add up to var(E_f), which `of_frame` has.
    `llpr_force_std` is s_z sqrt(x_i^T (M + lambda)^-1 x_i) without the biases. M is that block of
    H, or the mean of x x^T over the training atoms, which is the rigidity that labels of single
    atoms would give and does not feel that freedom; M and lambda are those that rank validation
    force errors best, s_z gives their size per element.
    """

    FIELDS = (keys.LLPR_ENERGY_STD, keys.LLPR_FORCE_STD)

    mean: Tensor
    std: Tensor
    offsets: Tensor
    project_logits: Tensor
    project_scalars: Tensor
    projected_std: Tensor
    one_hot: Tensor
    alpha: Tensor
    energy_root: Tensor
    force_root: Tensor
    force_scale: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        elements, scalars, bins = sizes.num_elements, sizes.num_scalars, sizes.num_bins
        projections = PROJECTIONS if bins > 0 else 0
        self.num_inputs = 2 * scalars
        size = self.num_inputs + projections + elements
        generator = torch.Generator().manual_seed(SEED)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(torch.get_default_dtype())

        self.register_buffer("mean", torch.zeros(elements, self.num_inputs))
        self.register_buffer("std", torch.ones(self.num_inputs))
        self.register_buffer("offsets", torch.arange(bins) - (bins - 1) / 2.0)  # bin widths
        self.register_buffer("project_logits", random(bins, projections))
        self.register_buffer(
            "project_scalars", random(scalars + 1, projections) / math.sqrt(max(projections, 1))
        )
        self.register_buffer("projected_std", torch.ones(()))
        self.register_buffer("one_hot", torch.eye(elements))
        self.register_buffer("alpha", torch.ones(()))
        # R with (H + lambda)^-1 = R R^T
        self.register_buffer("energy_root", torch.eye(size))
        self.register_buffer("force_root", torch.eye(self.num_inputs))
        self.register_buffer("force_scale", torch.ones(elements))

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.forward."""
        rows = self.jacobian(features, energy, species)
        force = _length(rows[:, : self.num_inputs] @ self.force_root)
        return {
            keys.LLPR_ENERGY_STD: self.alpha * _length(rows @ self.energy_root),
            keys.LLPR_FORCE_STD: force * self.force_scale.index_select(0, species),
        }

    def of_frame(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """See Method.of_frame; standard deviation of the error of the total energy, eV."""
        total = self.jacobian(features, energy, species).sum(0, keepdim=True)
        std = self.alpha * _length(total @ self.energy_root)
        return {keys.OF_FRAME + keys.LLPR_ENERGY_STD: std[0]}

    def frame_energy_std(self, atoms: Atoms) -> Tensor:
        """Standard deviation of the error of each frame's energy, (num_frames,) eV."""
        return self.alpha * _length(self._frame_rows(atoms) @ self.energy_root)

    def jacobian(self, features: Features, energy: AtomicEnergy, species: Tensor) -> Tensor:
        """J_i of every atom in the coordinates of the class, (num_atoms, size of H)."""
        inputs = torch.cat([features.scalars, energy.hidden], dim=1)
        inputs = (inputs - self.mean.index_select(0, species)) / self.std
        rows = [inputs]
        if self.offsets.shape[0] > 0:
            rows.append(self._projected(inputs, energy) / self.projected_std)
        rows.append(self.one_hot.index_select(0, species))
        return torch.cat(rows, dim=1)

    def _projected(self, inputs: Tensor, energy: AtomicEnergy) -> Tensor:
        probs = torch.softmax(energy.logits, -1)
        centred = self.offsets - (probs @ self.offsets).unsqueeze(1)
        last = self.project_scalars.shape[0] - 1
        scalars = inputs[:, :last] @ self.project_scalars[:last] + self.project_scalars[last]
        return ((probs * centred) @ self.project_logits) * scalars

    def _frame_rows(self, atoms: Atoms) -> Tensor:
        rows = self.jacobian(atoms.features, atoms.energy, atoms.species)
        frames = rows.new_zeros((atoms.num_frames, rows.shape[1]))
        return frames.index_add(0, atoms.frame, rows)

    def fit(self, seen: Atoms, held: Atoms) -> dict[str, object]:
        """H from the training frames, lambda, alpha and s_z from the validation frames.

        Returns:
            llpr_alpha; llpr_ridge and llpr_force_ridge, lambda in units of the mean diagonal;
            llpr_force_rows, "atoms" or "frames", what M is made of.

        Raises:
            ValueError: no atoms, or features that are not finite.
        """
        from scipy.stats import spearmanr

        self._standardize(seen)
        frames = self._frame_rows(seen)
        rigidity = frames.T @ frames / seen.energy_errors.square().mean().clamp(min=1e-24)
        inputs = self.jacobian(seen.features, seen.energy, seen.species)[:, : self.num_inputs]
        size = held.errors.norm(dim=1).numpy()

        def log_likelihood() -> float:  # alpha makes the mean of (error / std)^2 the same for all
            return float(-self.frame_energy_std(held).log().mean())

        def rank_correlation() -> float:
            std = self(held.features, held.energy, held.species)[keys.LLPR_FORCE_STD]
            return float(spearmanr(std.numpy(), size).statistic)

        rows = {"frames": rigidity}
        _, energy_ridge = self._choose(self.energy_root, rows, held, log_likelihood)
        n = self.num_inputs
        rows = {"atoms": inputs.T @ inputs / len(inputs), "frames": rigidity[:n, :n]}
        force_rows, force_ridge = self._choose(self.force_root, rows, held, rank_correlation)
        return {
            "llpr_alpha": float(self.alpha),
            "llpr_ridge": energy_ridge,
            "llpr_force_ridge": force_ridge,
            "llpr_force_rows": force_rows,
        }

    def _choose(
        self, root: Tensor, matrices: dict[str, Tensor], held: Atoms, score: Callable[[], float]
    ) -> tuple[str, float]:
        """Set `root` from the matrix and the ridge of the highest score, the first on a tie."""
        candidates = [(name, ridge) for name in matrices for ridge in RIDGES]
        scores = []
        for name, ridge in candidates:
            root.copy_(_inverse_root(matrices[name], ridge))
            self.calibrate(held)
            value = score()
            scores.append(value if math.isfinite(value) else -math.inf)
        name, ridge = candidates[scores.index(max(scores))]
        root.copy_(_inverse_root(matrices[name], ridge))
        self.calibrate(held)
        return name, ridge

    def calibrate(self, held: Atoms) -> dict[str, object]:
        """Alpha and s_z from validation frames; H, C and lambda stay."""
        self.alpha.fill_(1.0)
        z = held.energy_errors / self.frame_energy_std(held)
        self.alpha.copy_(z.square().mean().sqrt().clamp(min=1e-12))
        self.force_scale.fill_(1.0)
        size = self(held.features, held.energy, held.species)[keys.LLPR_FORCE_STD]
        self.force_scale.copy_(error_scale(size, held.errors, held.species, len(self.mean)))
        return {"llpr_alpha": float(self.alpha)}

    def _standardize(self, seen: Atoms) -> None:
        inputs = torch.cat([seen.features.scalars, seen.energy.hidden], dim=1)
        for element in range(len(self.mean)):
            own = rows_of(inputs, seen.species, element)
            self.mean[element] = torch.from_numpy(own.mean(0))
        std = (inputs - self.mean[seen.species]).square().mean(0).sqrt()
        self.std.copy_(torch.where(std > 1e-6 * std.max(), std, std.max().clamp(min=1e-12)))
        if self.offsets.shape[0] == 0:
            return
        # what the histogram adds to the energy, relative to the anchor's variation in an element
        energy, anchor = seen.energy.energy, seen.energy.anchor
        varied = anchor.clone()
        for element in seen.species.unique():
            chosen = seen.species == element
            varied[chosen] -= anchor[chosen].mean()
        share = (energy - anchor).std(correction=0) / varied.std(correction=0).clamp(min=1e-12)
        inputs = (inputs - self.mean[seen.species]) / self.std
        size = self._projected(inputs, seen.energy).square().mean().sqrt().clamp(min=1e-12)
        self.projected_std.copy_(size / share.clamp(1e-6, 1.0))


def _length(rows: Tensor) -> Tensor:
    """Norm of each row, positive."""
    return (rows.pow(2).sum(1) + 1e-24).sqrt()


def _inverse_root(matrix: Tensor, ridge: float) -> Tensor:
    """R with R R^T = (M + ridge mean(diag M))^-1, upper triangular, from the Cholesky factor of M.

    The ridge is part of the method: a pseudo-inverse would give directions without data no
    variance at all.
    """
    size = len(matrix)
    level = ridge * matrix.diagonal().mean().clamp(min=1e-24)
    eye = torch.eye(size, dtype=matrix.dtype)
    factor = torch.linalg.cholesky(matrix + level * eye)
    return torch.linalg.solve_triangular(factor, eye, upper=False).T.contiguous()
