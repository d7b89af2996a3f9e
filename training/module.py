"""One training run as Lightning sees it: steps, metrics, schedule, the switch to histograms."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lmp_hl.graph import DTYPES
from lmp_hl.nn.heads import HistogramEnergy
from lmp_hl.potential import Potential

from . import frames as fr
from . import losses
from .config import ModelConfig, TrainConfig
from .energy_targets import energy_loss

# share of the schedule in which the learning rate rises, and where it ends
RISE, END = 0.02, 0.01
# learning rate of the histogram's shape relative to the rest: Adam's steps do not know how small a
# change of the logits is meant, and their jitter moves the expectation, hence energy and forces
SHAPE_RATE = 0.1


def build_potential(config: ModelConfig, num_elements: int) -> Potential:
    """A new potential with random weights, in the configuration's dtype."""
    default = torch.get_default_dtype()
    # not .to(dtype) afterwards: constants would have the digits of float32 only, and what is
    # float64 in any network would lose them (reference energies may be -1e5 eV)
    torch.set_default_dtype(DTYPES[config.dtype])
    try:
        return Potential(
            num_elements=num_elements,
            cutoff=config.cutoff,
            num_layers=config.layers,
            head=config.head,
            channels=config.channels,
            l_max=config.l_max,
            num_radial=config.num_radial,
            num_scalars=config.hidden,
            num_bins=config.num_bins,
            sigma=config.sigma,
            target=config.target,
            methods=config.uncertainty,
        )
    finally:
        torch.set_default_dtype(default)


class PotentialModule(L.LightningModule):
    """Trains a Potential.

    Args:
        potential: with scales and reference energies set.
        config: the run.
    """

    def __init__(self, potential: Potential, config: TrainConfig) -> None:
        super().__init__()
        self.potential = potential
        self.config = config
        # most methods are fitted after training on frozen features, never by the loss
        for method in potential.uncertainty_methods():
            method.requires_grad_(method.trained)
        self._sums: dict[str, Tensor] = {}

    @property
    def is_warm(self) -> bool:
        """Whether the warm-up with squared errors is over."""
        return self.current_epoch >= self.config.training.warmup_epochs

    @property
    def uses_histogram(self) -> bool:
        """Whether the energy loss is the cross-entropy at this epoch (after the warm-up)."""
        return self.is_warm and isinstance(self.potential.energy_head, HistogramEnergy)

    def configure_optimizers(self) -> Any:
        """AdamW with a short linear rise and a cosine descent to 1 % of the learning rate."""
        training = self.config.training
        head = self.potential.energy_head
        shape = head.shape_parameters() if isinstance(head, HistogramEnergy) else []
        chosen = {id(parameter) for parameter in shape}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in chosen]
        optimizer = torch.optim.AdamW(
            [
                {"params": rest},
                {"params": shape, "lr": SHAPE_RATE * training.learning_rate},
            ],
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            amsgrad=True,
        )
        total = max(1, int(self.trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            done = step / total
            if done < RISE:
                return (step + 1) / (RISE * total + 1)
            return END + (1 - END) * 0.5 * (
                1 + math.cos(math.pi * min(1.0, (done - RISE) / (1 - RISE)))
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        """Measure the bin width once the scalar warm-up is over."""
        self._sums = {}
        head = self.potential.energy_head
        if (
            isinstance(head, HistogramEnergy)
            and self.current_epoch == self.config.training.warmup_epochs
        ):
            loader = self.trainer.train_dataloader
            set_bin_width(self.potential, loader, self.config.model.bin_width, self.device)
            self.print(
                f"histogram on: {head.num_bins} bins of {1e3 * float(head.bin_width):.3g} meV "
                f"around each atom's anchor"
            )

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Loss of one batch."""
        return self._evaluate(batch, "train")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the histogram's shape untouched while the loss does not see it."""
        head = self.potential.energy_head
        if isinstance(head, HistogramEnergy) and not self.uses_histogram:
            for parameter in head.shape_parameters():
                parameter.grad = torch.zeros_like(parameter)

    def on_validation_epoch_start(self) -> None:
        """Forget what the previous validation summed up."""
        self._sums = {k: v for k, v in self._sums.items() if k.startswith("train")}

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Errors on validation frames; forces need gradients even here."""
        with torch.enable_grad():
            self._evaluate(batch, "valid")

    def on_validation_epoch_end(self) -> None:
        """Publish the validation errors, and the training errors of the weights as they moved.

        Both here, because callbacks see the end of a training epoch before the module does.
        """
        self._publish()

    def _evaluate(self, batch: dict[str, Tensor], split: str) -> Tensor:
        weights = self.config.loss
        prediction = losses.predict(self.potential, batch, create_graph=split == "train")
        head = self.potential.energy_head
        if self.uses_histogram and isinstance(head, HistogramEnergy):
            name, share = weights.energy_target, weights.cross_entropy
            energy, outside, spread = energy_loss(name, head, prediction, batch)
            if share < 1:
                energy = share * energy + (1 - share) * losses.energy_squared(prediction, batch)
            self._add(split, "outside", 100.0 * outside, 1)
            self._add(split, "spread", spread, 1)
        else:
            energy = losses.energy_squared(prediction, batch)
        squared = forces = losses.forces_squared(prediction, batch)
        for method in self.potential.uncertainty_methods():
            if method.trained:
                atoms = losses.with_errors(prediction, batch, detach=not self.is_warm)
                own = method.loss(atoms)
                forces = own.forces if self.is_warm else forces + own.forces
                if own.energy is not None:
                    energy = own.energy if self.is_warm else energy + own.energy
        loss = weights.energy * energy + weights.forces * forces
        if weights.stress > 0 and bool(torch.isfinite(batch[fr.TARGET_STRESS]).any()):
            loss = loss + weights.stress * losses.stress_squared(prediction, batch)
            error = prediction.stress - batch[fr.TARGET_STRESS]
            known = torch.isfinite(error)
            self._add(split, "stress_rmse", error[known].square().sum(), int(known.sum()))
        per_atom = (prediction.energy - batch[fr.TARGET_ENERGY]) / batch[fr.NUM_ATOMS]
        self._add(split, "energy_rmse", per_atom.square().sum(), per_atom.numel())
        self._add(
            split, "forces_rmse", squared * prediction.forces.numel(), prediction.forces.numel()
        )
        self._add(split, "loss", loss, 1)
        return loss

    def _add(self, split: str, name: str, value: Tensor, count: int) -> None:
        total = torch.stack([value.detach().double(), value.new_tensor(count, dtype=torch.float64)])
        key = f"{split}/{name}"
        self._sums[key] = self._sums[key] + total if key in self._sums else total

    def _publish(self) -> None:
        for key, total in self._sums.items():
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
            value = total[0] / total[1]
            if key.endswith("_rmse"):
                value = 1e3 * value.sqrt()  # meV/atom, meV/Å, meV/Å³
            self.log(
                key.replace("/", "_"),
                value.float(),
                rank_zero_only=False,
                sync_dist=self.trainer.world_size > 1,
            )


@torch.no_grad()
def set_bin_width(
    potential: Potential, loader: Any, bin_width: float | None, device: torch.device
) -> None:
    """Choose w so that every training target lies well inside the support, or check the given one.

    w = 2 max |dE/N| / (num_bins / 2 - 4 sigma / w): twice the room of today's largest residual, and
    4 sigma of padding against truncation.

    Args:
        potential: after the scalar warm-up.
        loader: batches of training frames.
        bin_width: eV, or None to measure it.
        device: of the potential.

    Raises:
        ValueError: with a given width a target lies more than four times as far away as the support
            reaches; names the frames.
    """
    head = potential.energy_head
    shares = []
    dataset = loader.dataset
    for graph in dataset:
        batch = {k: v.to(device) for k, v in fr.collate_graphs([graph]).items()}
        _, atoms = potential.atoms(batch)
        residual = batch[fr.TARGET_ENERGY][0] - atoms.energy.double().sum()
        shares.append(float(residual / batch[fr.NUM_ATOMS][0]))
    largest = max(abs(share) for share in shares)
    half = head.num_bins / 2
    if bin_width is None:
        bin_width = max(2.0 * largest / (half - 4 * head.sigma_in_bins), 1e-5)
    far = [k for k, share in enumerate(shares) if abs(share) > 4 * half * bin_width]
    if far:
        names = "; ".join(f"{dataset.frames[k].source} by {shares[k]:+.3g}" for k in far[:5])
        raise ValueError(
            f"targets of {len(far)} frames lie far outside the histogram's support of "
            f"±{half * bin_width:.3g} eV/atom around the prediction ({names} eV/atom); check their "
            f"labels, or leave model.bin_width to be measured (null)"
        )
    head.set_bin_width(bin_width)
