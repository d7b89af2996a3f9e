"""Backbone and heads put together: edges in; energies, gradients and uncertainty fields out.

The same forward is used in training (keep_graph), by the ASE calculator and, scripted, in LAMMPS.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import keys, uncertainty
from .nn.backbone import L_OUT, Backbone, Features
from .nn.heads import AtomicEnergy, EnergyHead, HistogramEnergy, ScalarEnergy
from .uncertainty.committee import CommitteeEnergy
from .uncertainty.neighbors import neighbor_mean, neighbor_weights


class Potential(nn.Module):
    """E = sum_i (E0[z_i] + E_i), its gradients of edge vectors, uncertainty fields on request.

    Args:
        num_elements: number of species indices.
        cutoff: Å.
        num_layers: 1 local, more message passing.
        head: "hlgauss", "committee", "svd_committee" or "scalar".
        channels, l_max, num_radial, num_scalars, message_channels: see Backbone.
        num_bins, sigma, target: of the energy histogram; sigma in bin widths.
        num_members: heads of a committee.
        methods: names of the uncertainty methods it carries, see lmp_hl.uncertainty.
    """

    if TYPE_CHECKING:
        methods: Any  # a ModuleDict; TorchScript knows the class of each method, mypy does not
    reference_energies: Tensor
    shared: list[list[str]]

    def __init__(
        self,
        num_elements: int,
        cutoff: float,
        num_layers: int,
        head: str,
        channels: int,
        l_max: int,
        num_radial: int,
        num_scalars: int,
        num_bins: int,
        sigma: float,
        message_channels: int = 16,
        target: str = "hlgauss",
        num_members: int = 4,
        methods: Sequence[str] = uncertainty.DEFAULT,
    ) -> None:
        super().__init__()
        if l_max < 2:
            raise ValueError(
                f"model.l_max must be at least 2 (the force distribution needs it), got {l_max}"
            )
        self.backbone = Backbone(
            num_elements,
            cutoff,
            num_layers,
            channels,
            l_max,
            num_radial,
            num_scalars,
            message_channels,
        )
        energy_head: EnergyHead
        if head == "hlgauss":
            energy_head = HistogramEnergy(num_scalars, num_elements, num_bins, sigma, target)
        elif head in ("committee", "svd_committee"):
            singular = head == "svd_committee"
            energy_head = CommitteeEnergy(
                num_members, num_scalars, num_elements, num_bins, sigma, target, singular
            )
        elif head == "scalar":
            energy_head = ScalarEnergy(num_scalars, num_elements)
        else:
            known = "'hlgauss', 'committee', 'svd_committee' or 'scalar'"
            raise ValueError(f"model.head must be {known}, got {head!r}")
        self.energy_head = energy_head
        bins = num_bins if head == "hlgauss" else 0
        sizes = uncertainty.Sizes(num_scalars, channels, min(l_max, L_OUT), num_elements, bins)
        self.methods = uncertainty.make_methods(methods, sizes)
        # of the energy head and of each method: values whose mean over the neighbours is wanted
        self.shared = [[], *(list(method.SHARED) for method in self.uncertainty_methods())]
        self.register_buffer("reference_energies", torch.zeros(num_elements, dtype=torch.float64))

    def atoms(self, inputs: dict[str, Tensor]) -> tuple[Features, AtomicEnergy]:
        """Features and energy-head output of the owned atoms (no reference energies)."""
        features = self.backbone(inputs)
        species = inputs[keys.SPECIES][: features.scalars.shape[0]]
        return features, self.energy_head(features.scalars, species)

    def values(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> list[dict[str, Tensor]]:
        """What the energy head and each uncertainty method say of each atom by itself, (n,)."""
        out = [self.energy_head.fields(energy, species)]
        for _, method in self.methods.items():
            out.append(method(features, energy, species))
        return out

    def shared_values(self, values: list[dict[str, Tensor]]) -> list[Tensor]:
        """Those of the values whose mean over the neighbours is wanted."""
        out: list[Tensor] = []
        for names, of_one in zip(self.shared, values):  # noqa: B905  # TorchScript has no strict
            for name in names:
                out.append(of_one[name])
        return out

    def finish(
        self, values: list[dict[str, Tensor]], means: list[Tensor], species: Tensor
    ) -> dict[str, Tensor]:
        """Every field from values and the neighbours' means of shared_values, see field_names."""
        out = values[0].copy()
        k, first = 1, 0
        for _, method in self.methods.items():
            neighbors: dict[str, Tensor] = {}
            for name in self.shared[k]:
                neighbors[name] = means[first]
                first += 1
            out.update(method.finish(values[k], neighbors, species))
            k += 1
        return out

    def fields(
        self,
        features: Features,
        energy: AtomicEnergy,
        species: Tensor,
        edge_index: Tensor,
        edge_weights: Tensor,
    ) -> dict[str, Tensor]:
        """Every per-atom uncertainty field, see field_names.

        Args:
            features: of the atoms.
            energy: output of the energy head.
            species: (num_atoms,).
            edge_index: (2, num_edges), every pair of neighbours both ways.
            edge_weights: (num_edges,), uncertainty.neighbors.neighbor_weights.
        """
        values = self.values(features, energy, species)
        means: list[Tensor] = []
        for shared in self.shared_values(values):
            means.append(neighbor_mean(shared, edge_index, edge_weights))
        return self.finish(values, means, species)

    def total_energy(self, energy: AtomicEnergy, species: Tensor) -> Tensor:
        """Per-atom energy with the element's reference, (num_atoms,) float64, eV."""
        return energy.energy.double() + self.reference_energies.index_select(0, species)

    @torch.jit.unused
    def field_names(self) -> list[str]:
        """Names (keys.py) of the fields it can answer for, those of the energy head first."""
        names = list(self.energy_head.FIELDS)
        for method in self.uncertainty_methods():
            names += [name for name in method.available_fields() if name not in names]
        return names

    @torch.jit.unused
    def uncertainty_methods(self) -> list[uncertainty.Method]:
        """The uncertainty methods it carries."""
        return list(self.methods.values())

    def forward(
        self, inputs: dict[str, Tensor], with_fields: bool = False, keep_graph: bool = False
    ) -> dict[str, Tensor]:
        """Evaluate the potential.

        Args:
            inputs: tensors of keys.py.
            with_fields: also return the uncertainty fields; where they depend on values of the
                neighbours, those of neighbours that are not owned are missing (stages.py).
            keep_graph: keep gradients of gradients (training, forces that depend on a field).

        Returns:
            energy, edge_gradients and, if asked for, the fields and what is said of all atoms as
            one structure (Method.of_frame); shapes and units in keys.py.
        """
        vectors = inputs[keys.EDGE_VECTORS]
        if not vectors.requires_grad:
            vectors = vectors.detach().requires_grad_(True)
        inputs = inputs.copy()
        inputs[keys.EDGE_VECTORS] = vectors
        features, energy = self.atoms(inputs)
        species = inputs[keys.SPECIES][: energy.energy.shape[0]]
        gradient = torch.autograd.grad(
            [energy.energy.sum()], [vectors], create_graph=keep_graph, allow_unused=True
        )[0]
        if gradient is None:
            gradient = torch.zeros_like(vectors)
        out = {
            keys.ENERGY: self.total_energy(energy, species),
            keys.EDGE_GRADIENTS: gradient,
        }
        if with_fields:
            num_edges = int(inputs[keys.LAYER_EDGES][-1])
            edges = inputs[keys.EDGE_INDEX][:, :num_edges]
            weights = neighbor_weights(vectors[:num_edges], self.backbone.radial.cutoff)
            out.update(self.fields(features, energy, species, edges, weights))
            for _, method in self.methods.items():
                out.update(method.of_frame(features, energy, species))
        return out


def edge_forces(edge_index: Tensor, edge_gradients: Tensor, num_nodes: int) -> Tensor:
    """Forces on the nodes, F_i = sum_e g_e (as centre) - sum_e g_e (as neighbour).

    Args:
        edge_index: (2, num_edges).
        edge_gradients: (num_edges, 3), eV/Å, dE/d(r_j - r_i); or those of several energies side by
            side.
        num_nodes: how many nodes.

    Returns:
        (num_nodes, 3), or as wide as the gradients, eV/Å.
    """
    zeros = edge_gradients.new_zeros((num_nodes, edge_gradients.shape[1]))
    return zeros.index_add(0, edge_index[0], edge_gradients).index_add(
        0, edge_index[1], -edge_gradients
    )
