"""An ensemble of potentials taken apart into stages, that a runtime evaluates one after another.

Between two layers the features of an atom may travel to other MPI ranks, and on the way back their
gradients: no communication happens inside a stage or inside autograd. Stage t < num_layers - 1
gives features of its centres, `layer`; its gradients are another stage, `layer_vjp`; the last layer
gives energies and all gradients at once, `final`. A strictly local potential is `final` alone.

What belongs to the K members of the ensemble stands side by side in columns: features are
(atoms, F), F the sum over members, and gradients of edge vectors (edges, 3 K), the x, y, z of one
member after the other. A single potential is K = 1.

Inputs of a stage, in this order (n centres, m nodes, e edges):

    center_species (n,) int64
    first layer: species (m,) int64
    edge_index     (2, e) int64, row 0 an index into the centres, row 1 into the nodes
    edge_vectors   (e, 3) model dtype, Å
    other layers: center_features (n, F), features (m, F), model dtype

A runtime may evaluate the centres of a stage in several portions. When everything is summed up it
takes the mean of the members for energies, forces and virials.

Uncertainty fields are made in two steps, because some depend on what other ranks know of an atom's
neighbours. `final` gives values of the centres and numbers of the edges; `finish` makes fields of
the values and of sums over edges on all ranks: of the members' forces if K > 1, and of the edges'
numbers at the atom that is the neighbour. Where there is neither, nothing is summed.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from . import keys
from .ensemble import Ensemble, combine
from .potential import Potential, edge_forces
from .uncertainty.neighbors import neighbor_weights, weighted_mean


class Stages(nn.Module):
    """The stages of an ensemble.

    Attributes:
        fields: names of what `finish` returns, in that order.
        num_members: K.
        num_layers: 1 strictly local, more message passing.
        num_features: F.
        num_shared: S, numbers that an edge carries to its neighbour: its weight times the values
            that fields want the neighbours' mean of.
    """

    fields: list[str]
    ends: list[int]
    value_names: list[list[list[str]]]

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.fields = [keys.ENERGY, *ensemble.field_names()]
        self.num_members = ensemble.num_members
        backbones = [potential.backbone for potential in ensemble.potentials()]
        self.num_layers = 1 + len(backbones[0].message_layers)
        self.ends = [0]  # the columns of member k are those from ends[k] to ends[k + 1]
        for backbone in backbones:
            self.ends.append(self.ends[-1] + backbone.num_features)
        self.num_features = self.ends[-1]
        self.cutoff = float(backbones[0].radial.cutoff)
        self.value_names = [_value_names(potential) for potential in ensemble.potentials()]
        shared = [names for potential in ensemble.potentials() for names in potential.shared]
        self.num_shared = sum(len(names) for names in shared)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The last stage without fields."""
        return self.final(inputs, False)

    def _of_member(self, k: int, t: int, inputs: list[Tensor], leaves: bool) -> list[Tensor]:
        """Inputs of one member; edge vectors and features as leaves of autograd if wanted."""
        out: list[Tensor] = []
        first = 3 if t == 0 else 2  # that is differentiable
        for position, x in enumerate(inputs):
            if position > first:
                x = x[:, self.ends[k] : self.ends[k + 1]]
            out.append(x if position < first else x.detach().requires_grad_(leaves))
        return out

    @torch.jit.export
    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        """Features of the centres after layer t (from 0), (n, F)."""
        found: list[Tensor] = []
        for k, member in enumerate(self.ensemble.members):
            features = member.backbone.layer(t, self._of_member(k, t, inputs, False))
            found.append(member.backbone.flatten(features))
        return torch.cat(found, 1)

    @torch.jit.export
    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        """Gradients (n, F) of layer t's output -> those of edge_vectors, center_features, features.

        The layer is evaluated again: cheaper to hold, and a compiled stage has no graph to keep.
        """
        found: list[list[Tensor]] = []
        for k, member in enumerate(self.ensemble.members):
            mine = self._of_member(k, t, inputs, True)
            output = member.backbone.flatten(member.backbone.layer(t, mine))
            weights = gradients[:, self.ends[k] : self.ends[k + 1]]
            found.append(_gradients(output, weights, mine[3 if t == 0 else 2 :]))
        return _side_by_side(found)

    @torch.jit.export
    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        """Energies of the centres (n, K), float64, eV, and their sums' gradients as in layer_vjp.

        With fields two more, model dtype: values (n, P) for `finish`, with the sum of the edges'
        weights as the last if S > 0, and (e, S) what each edge carries to its neighbour.
        """
        t = self.num_layers - 1
        energies: list[Tensor] = []
        found: list[list[Tensor]] = []
        carried: list[Tensor] = []
        shared: list[Tensor] = []
        for k, member in enumerate(self.ensemble.members):
            mine = self._of_member(k, t, inputs, True)
            features = member.backbone.layer(t, mine)
            head = member.energy_head(features.scalars, mine[0])
            found.append(_gradients(head.energy.sum(), None, mine[3 if t == 0 else 2 :]))
            energies.append(member.total_energy(head, mine[0]).detach())
            if with_fields:
                with torch.no_grad():
                    values = member.values(features, head, mine[0])
                    for of_one in values:
                        carried += list(of_one.values())
                    shared += member.shared_values(values)
        out = [torch.stack(energies, 1)]
        out += _side_by_side(found)
        if with_fields:
            centers, vectors = inputs[2 if t == 0 else 1][0], inputs[3 if t == 0 else 2].detach()
            on_edges = vectors.new_zeros((vectors.shape[0], 0))
            if len(shared) > 0:
                weights = neighbor_weights(vectors, self.cutoff)
                shares = torch.stack(shared, 1).index_select(0, centers)
                on_edges = weights.unsqueeze(1) * shares
                # of an atom's edges that come in as of those that go out
                carried.append(torch.zeros_like(shared[0]).index_add(0, centers, weights))
            if len(carried) > 0:
                out.append(torch.stack(carried, 1))
            else:
                out.append(vectors.new_zeros((inputs[0].shape[0], 0)))
            out.append(on_edges)
        return out

    @torch.jit.export
    def finish(
        self, species: Tensor, energies: Tensor, carried: Tensor, sums: Tensor
    ) -> list[Tensor]:
        """Every field (n,) of atoms all of whose edges have been summed up.

        Args:
            species: (n,).
            energies: (n, K) that `final` returned.
            carried: (n, P) that `final` returned.
            sums: float64; the members' forces (n, 3 K) if K > 1, then (n, S) the sums of what the
                edges to the atom carry.
        """
        columns = carried.unbind(1)
        at, first = 0, 3 * self.num_members if self.num_members > 1 else 0
        shared = first
        fields: list[dict[str, Tensor]] = []
        for k, member in enumerate(self.ensemble.members):
            values: list[dict[str, Tensor]] = []
            for names in self.value_names[k]:
                of_one: dict[str, Tensor] = {}
                for name in names:
                    of_one[name] = columns[at]
                    at += 1
                values.append(of_one)
            means: list[Tensor] = []
            for value in member.shared_values(values):
                means.append(weighted_mean(value, sums[:, shared].to(value.dtype), columns[-1]))
                shared += 1
            fields.append(member.finish(values, means, species))
        merged = self.ensemble.fields(fields, energies, sums[:, :first], species)
        merged[keys.ENERGY] = energies.mean(1)
        return [merged[name] for name in self.fields]


def _value_names(potential: Potential) -> list[list[str]]:
    """Names of what Potential.values returns."""
    references = potential.reference_energies
    none = references.new_zeros(0, dtype=torch.int64)
    layers = torch.zeros(1 + len(potential.backbone.message_layers), dtype=torch.int64)
    vectors = references.new_zeros((0, 3), dtype=next(potential.parameters()).dtype)
    inputs = {
        keys.SPECIES: none,
        keys.EDGE_INDEX: none.reshape(2, 0),
        keys.EDGE_VECTORS: vectors,
        keys.LAYER_NODES: layers,
        keys.LAYER_EDGES: layers,
    }
    features, energy = potential.atoms(inputs)
    return [list(of_one) for of_one in potential.values(features, energy, none)]


def _gradients(output: Tensor, weights: Tensor | None, wanted: list[Tensor]) -> list[Tensor]:
    """Of sum(weights * output), zeros where it does not depend on one of them."""
    given: list[Tensor | None] = [weights]
    found = torch.autograd.grad([output], wanted, given, allow_unused=True)
    out: list[Tensor] = []
    for gradient, tensor in zip(found, wanted):  # noqa: B905  # TorchScript's zip is strict anyway
        out.append(torch.zeros_like(tensor) if gradient is None else gradient)
    return out


def _side_by_side(found: list[list[Tensor]]) -> list[Tensor]:
    """One list of tensors per member -> their columns side by side."""
    return [torch.cat([of_one[k] for of_one in found], 1) for k in range(len(found[0]))]


class Runtime(Protocol):
    """Whatever evaluates stages: `Stages` itself, scripted, or compiled for one device."""

    fields: list[str]

    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        """See Stages.layer."""

    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        """See Stages.layer_vjp."""

    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        """See Stages.final."""

    def finish(
        self, species: Tensor, energies: Tensor, carried: Tensor, sums: Tensor
    ) -> list[Tensor]:
        """See Stages.finish."""


def evaluate(runtime: Runtime, inputs: dict[str, Tensor], with_fields: bool) -> dict[str, Tensor]:
    """Energy, gradients and fields (keys.py) of a structure, stage by stage on one process.

    Args:
        runtime: of the model.
        inputs: tensors of keys.py.
        with_fields: whether to return the fields.
    """
    species = inputs[keys.SPECIES]
    num_layers = inputs[keys.LAYER_NODES].shape[0]
    stage_inputs: list[list[Tensor]] = []
    features = torch.zeros(0)
    for t in range(num_layers):
        n, e = int(inputs[keys.LAYER_NODES][t]), int(inputs[keys.LAYER_EDGES][t])
        edges = [inputs[keys.EDGE_INDEX][:, :e], inputs[keys.EDGE_VECTORS][:e]]
        nodes = [species, *edges] if t == 0 else [*edges, features[:n], features]
        stage_inputs.append([species[:n], *nodes])
        if t < num_layers - 1:
            features = runtime.layer(t, stage_inputs[t]).detach()

    found = runtime.final(stage_inputs[-1], with_fields)
    num_gradients = 1 if num_layers == 1 else 3
    energies = found[0]
    for_fields = found[1 + num_gradients :]
    found = found[1 : 1 + num_gradients]
    gradients = found[0].new_zeros((inputs[keys.EDGE_VECTORS].shape[0], found[0].shape[1]))
    for t in range(num_layers - 1, -1, -1):
        gradients[: found[0].shape[0]] += found[0]
        if t > 0:
            of_features = found[2].clone()
            of_features[: found[1].shape[0]] += found[1]
            found = runtime.layer_vjp(t - 1, stage_inputs[t - 1], of_features)

    out = combine(energies, gradients)
    if with_fields:
        carried, on_edges = for_fields
        edge_index, num_owned = inputs[keys.EDGE_INDEX], len(energies)
        sums = on_edges.new_zeros((len(species), on_edges.shape[1]), dtype=torch.float64)
        sums.index_add_(0, edge_index[1, : len(on_edges)], on_edges.double())
        if energies.shape[1] > 1:
            forces = edge_forces(edge_index, gradients.double(), len(species))
            sums = torch.cat([forces, sums], 1)
        fields = runtime.finish(species[:num_owned], energies, carried, sums[:num_owned])
        out.update(zip(runtime.fields, fields, strict=True))
    return out
