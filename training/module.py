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
from .config import IvonConfig, ModelConfig, SwagConfig, TrainConfig
from .energy_targets import energy_loss
from .prediction import Network, Prediction, by_member, compiled_network, member_of, predict

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
            message_channels=config.message_channels,
            l_max=config.l_max,
            num_radial=config.num_radial,
            num_scalars=config.hidden,
            num_bins=config.num_bins,
            sigma=config.sigma,
            num_members=config.num_members,
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
        self._network: Network | None = None

    @property
    def is_warm(self) -> bool:
        """Whether the warm-up with squared errors is over."""
        training = self.config.training
        return training.init_from is not None or self.current_epoch >= training.warmup_epochs

    @property
    def uses_histogram(self) -> bool:
        """Whether the energy loss is the cross-entropy at this epoch (after the warm-up)."""
        return self.is_warm and len(self.histograms) > 0

    @property
    def histograms(self) -> list[HistogramEnergy]:
        """The histogram heads: one, a committee's, or none."""
        parts = self.potential.energy_head.parts()
        return [part for part in parts if isinstance(part, HistogramEnergy)]

    def configure_optimizers(self) -> Any:
        """AdamW or IVON with a short linear rise and a cosine descent of the learning rate.

        It descends to 1 %, or to the constant rate at which SWAG collects.
        """
        training = self.config.training
        shape = [p for head in self.histograms for p in head.shape_parameters()]
        chosen = {id(parameter) for parameter in shape}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": shape, "lr": SHAPE_RATE * training.learning_rate},
        ]
        optimizer: torch.optim.Optimizer
        if isinstance(training.posterior, IvonConfig):
            from .ivon import Ivon

            optimizer = Ivon(groups, training, self.config.seed)
        else:
            optimizer = torch.optim.AdamW(
                groups,
                lr=training.learning_rate,
                weight_decay=training.weight_decay,
                amsgrad=True,
            )
        total, end = max(1, int(self.trainer.estimated_stepping_batches)), END
        if isinstance(training.posterior, SwagConfig):
            end = training.posterior.learning_rate / training.learning_rate
            total = total * (training.epochs - training.posterior.epochs) // training.epochs

        def factor(step: int) -> float:
            if step >= total:
                return end
            done = step / total
            if done < RISE:
                return (step + 1) / (RISE * total + 1)
            return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (done - RISE) / (1 - RISE)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Compile the network, if asked for, where it is now."""
        if self.config.training.compile:
            self.print("compiling the network")
            self._network = compiled_network(self.potential)

    def on_train_epoch_start(self) -> None:
        """Measure the bin width once the scalar warm-up is over."""
        self._sums = {}
        training = self.config.training
        just_warm = training.init_from is None and self.current_epoch == training.warmup_epochs
        if self.histograms and just_warm:
            head = self.histograms[0]
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
        for head in [] if self.uses_histogram else self.histograms:
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
        is_train = split == "train"
        turn = self.global_step if is_train else None
        network = self._network if is_train else None
        prediction = predict(self.potential, batch, is_train, turn, network)
        of_member: Tensor | None = None
        if turn is not None and prediction.members and weights.member_frames == "bootstrap":
            of_member = losses.bootstrap_weights(batch, len(prediction.members))
        energy = self._energy(split, prediction, batch, of_member)
        squared = losses.forces_squared(prediction, batch)
        forces = squared
        if of_member is not None and turn is not None:
            graphs = torch.arange(len(of_member), device=of_member.device)
            chosen = of_member[graphs, member_of(turn, graphs, of_member.shape[1])]
            forces = losses.forces_squared(prediction, batch, chosen)
        for method in self.potential.uncertainty_methods():
            if method.trained:
                cutoff = self.potential.backbone.radial.cutoff
                atoms = losses.with_errors(prediction, batch, cutoff, detach=not self.is_warm)
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

    def _energy(
        self,
        split: str,
        prediction: Prediction,
        batch: dict[str, Tensor],
        of_member: Tensor | None,
    ) -> Tensor:
        """Mean over the heads of the energy loss; `of_member`: weights (num_graphs, members)."""
        name, share = self.config.loss.energy_target, self.config.loss.cross_entropy
        found = []
        for k, own in enumerate(by_member(prediction, batch)):
            frame_weights = None if of_member is None else of_member[:, k]
            if not self.uses_histogram:
                found.append(losses.energy_squared(own, batch, frame_weights))
                continue
            loss, outside, spread = energy_loss(name, self.histograms[k], own, batch, frame_weights)
            if share < 1:
                squared = losses.energy_squared(own, batch, frame_weights)
                loss = share * loss + (1 - share) * squared
            found.append(loss)
            self._add(split, "outside", 100.0 * outside, 1)
            self._add(split, "spread", spread, 1)
        return torch.stack(found).mean()

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
    head, *others = potential.energy_head.parts()
    shares = []
    dataset = loader.dataset
    for graph in dataset:
        batch = {k: v.to(device) for k, v in fr.collate_graphs([graph]).items()}
        _, atoms = potential.atoms(batch)
        # of a committee the member that is furthest off; before the cross-entropy an anchor is the
        # energy, but for the rounding of sums over bins
        energy = atoms.anchor if others else atoms.energy
        residual = batch[fr.TARGET_ENERGY][0] - energy.double().sum(0)
        residual = residual.flatten()[residual.abs().argmax()]
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
    potential.energy_head.set_bin_width(bin_width)
