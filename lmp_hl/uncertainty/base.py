"""What every uncertainty method takes and gives."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.backbone import Features
from ..nn.heads import AtomicEnergy


class Sizes(NamedTuple):
    """Of the network a method reads: numbers of scalars, channels, degrees, elements, energy bins.

    num_bins is 0 for a scalar energy head, or where no method looks at histograms.
    """

    num_scalars: int
    channels: int
    l_max: int
    num_elements: int
    num_bins: int = 0

    @property
    def num_invariants(self) -> int:
        """Length of what nn.heads.invariants returns."""
        return self.num_scalars + self.l_max * self.channels


class Atoms(NamedTuple):
    """Every atom of a set of frames, frozen: what one forward pass left behind, and its error.

    features: of num_atoms atoms; energy: output of the energy head; species, frame: (num_atoms,);
    errors: (num_atoms, 3) true minus predicted force, eV/Å; energy_errors: (num_frames,) true minus
    predicted energy, eV; edge_index (2, num_edges): pairs of neighbours, both ways, as rows of all
    these atoms; edge_weights (num_edges,): see neighbors.py.
    """

    features: Features
    energy: AtomicEnergy
    species: Tensor
    frame: Tensor
    errors: Tensor
    energy_errors: Tensor
    edge_index: Tensor
    edge_weights: Tensor

    @property
    def num_frames(self) -> int:
        """Frames in the set."""
        return len(self.energy_errors)

    def double(self) -> "Atoms":
        """The same in float64, in which methods are fitted."""
        return Atoms(
            Features(*(x.double() for x in self.features)),
            AtomicEnergy(*(x.double() for x in self.energy)),
            self.species,
            self.frame,
            self.errors.double(),
            self.energy_errors.double(),
            self.edge_index,
            self.edge_weights.double(),
        )

    def rows(self, index: Tensor) -> "Atoms":
        """Some of the atoms and the edges among them; energy_errors stay those of all frames."""
        features = Features(self.features.scalars[index], self.features.tensors[:, index])
        e = self.energy
        tau2 = e.tau2[index] if len(e.tau2) else e.tau2
        energy = AtomicEnergy(
            e.energy[index], e.anchor[index], e.logits[index], tau2, e.hidden[index]
        )
        row_of = torch.full_like(self.species, -1)
        row_of[index] = torch.arange(len(index), device=index.device)
        edges = row_of[self.edge_index]
        kept = (edges >= 0).all(0)
        return Atoms(
            features,
            energy,
            self.species[index],
            self.frame[index],
            self.errors[index],
            self.energy_errors,
            edges[:, kept],
            self.edge_weights[kept],
        )


class Loss(NamedTuple):
    """What a trained method minimises, in units and at the weights of the squared errors.

    energy: eV², in the place of the mean of (dE)^2 / N, or None to leave that term as it is;
    forces: (eV/Å)², in the place of the mean squared error of a force component.
    """

    energy: Tensor | None
    forces: Tensor


class Method(nn.Module):
    """Per-atom fields from what one forward pass leaves behind; never part of the energy.

    A subclass is built from Sizes, is scripted with the potential, and keeps what it has fitted in
    buffers and parameters. Most are fitted after training; a `trained` one has a `loss` that trains
    its parameters together with the network, and `fit` only corrects its size.
    """

    FIELDS: ClassVar[tuple[str, ...]]  # names of keys.py, in the order of the model file
    SHARED: ClassVar[tuple[str, ...]] = ()  # values whose mean over the neighbours `finish` wants
    trained: ClassVar[bool] = False

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """Values of atoms, (n,) each, from what is known of each atom by itself.

        Args:
            features: of the backbone.
            energy: output of the energy head.
            species: (n,).

        Returns:
            The fields of FIELDS, or whatever `finish` makes them of; always the same names.
        """
        raise NotImplementedError

    def finish(
        self, values: dict[str, Tensor], neighbors: dict[str, Tensor], species: Tensor
    ) -> dict[str, Tensor]:
        """Fields of atoms from their values and the means over their neighbours.

        Args:
            values: what `forward` returned.
            neighbors: of the values named in SHARED, weighted_mean of neighbors.py.
            species: (n,).

        Returns:
            Every field of FIELDS, (n,).
        """
        return values

    def of_frame(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        """Values of the atoms given as one structure that fields of single atoms do not hold.

        Returns:
            keys.OF_FRAME and the name of a field -> ().
        """
        out: dict[str, Tensor] = {}
        return out

    def fit(self, seen: Atoms, held: Atoms) -> dict[str, Any]:
        """Fit to frozen features, in float64 on the CPU.

        Args:
            seen: the training frames; their errors are smaller than those of other frames.
            held: frames that were not trained on; everything with a size comes from these.

        Returns:
            What the model card should say about it.
        """
        raise NotImplementedError

    def calibrate(self, held: Atoms) -> dict[str, Any]:
        """Fit anew what has a size, and keep what `fit` learnt from the training frames.

        Args:
            held: as in `fit`; other frames, perhaps of another kind.

        Returns:
            As `fit`.

        Raises:
            ValueError: the method cannot, or these frames are not enough for it.
        """
        raise ValueError(
            f"uncertainty method {type(self).__name__} is fitted with the training frames only; "
            "train again with these frames as data.valid"
        )

    def available_fields(self) -> list[str]:
        """Those of FIELDS that what was fitted can answer for; a model file offers no others."""
        return list(self.FIELDS)

    def loss(self, atoms: Atoms) -> Loss:
        """Of a trained method: what to minimise over a batch; features and errors with gradients.

        In the warm-up it is added to the squared errors with features and errors detached, so that
        only the method's own parameters feel it; then it takes their place.
        """
        raise NotImplementedError

    def card(self) -> dict[str, Any]:
        """What a model card says about the method besides what `fit` found."""
        return {}
