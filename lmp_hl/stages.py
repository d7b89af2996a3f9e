"""A potential taken apart into stages, one per layer, that a runtime evaluates one after another.

Between two layers the features of an atom may travel to other MPI ranks, and on the way back their
gradients: no communication happens inside a stage or inside autograd. Stage t < num_layers - 1
gives features of its centres, `layer`; its gradients are another stage, `layer_vjp`; the last layer
gives energies and all gradients at once, `final`. A strictly local potential is `final` alone.

Inputs of a stage, in this order (n centres, m nodes, e edges, F features):

    center_species (n,) int64
    first layer: species (m,) int64
    edge_index     (2, e) int64, row 0 an index into the centres, row 1 into the nodes
    edge_vectors   (e, 3) model dtype, Å
    other layers: center_features (n, F), features (m, F), model dtype

A runtime may evaluate the centres of a stage in several portions.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from . import keys
from .nn.backbone import Features
from .potential import Potential


class Stages(nn.Module):
    """The stages of a potential; `fields` are those `final` returns, in that order."""

    fields: list[str]

    def __init__(self, potential: Potential, fields: list[str]) -> None:
        super().__init__()
        self.potential = potential
        self.fields = fields
        self.num_layers = 1 + len(potential.backbone.message_layers)
        backbone = potential.backbone
        self.num_scalars = backbone.many_body.out.out_features
        self.channels = backbone.element_density.mix.weight.shape[2]
        self.num_components = (backbone.many_body.l_max + 1) ** 2
        self.num_features = self.num_scalars + self.num_components * self.channels

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The last stage without fields."""
        return self.final(inputs, False)

    def _unpack(self, flat: Tensor) -> Features:
        scalars, rest = flat[:, : self.num_scalars], flat[:, self.num_scalars :]
        tensors = rest.reshape(flat.shape[0], self.num_components, self.channels)
        return Features(scalars, tensors.transpose(0, 1))

    def _features(self, t: int, inputs: list[Tensor]) -> Features:
        backbone = self.potential.backbone
        if t == 0:
            radial, angular = backbone.expand(inputs[3])
            return backbone.first_layer(inputs[0], inputs[1], inputs[2], radial, angular)
        radial, angular = backbone.expand(inputs[2])
        features = Features(inputs[3], inputs[3])
        for k, layer in enumerate(backbone.message_layers):
            if k + 1 == t:
                centers, nodes = self._unpack(inputs[3]), self._unpack(inputs[4])
                features = layer(inputs[0], centers, nodes, inputs[1], radial, angular)
        return features

    @torch.jit.export
    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        """Features of the centres after layer t (from 0), (n, F)."""
        features = self._features(t, inputs)
        tensors = features.tensors.transpose(0, 1).flatten(1)
        return torch.cat([features.scalars, tensors], dim=1)

    def _leaves(self, t: int, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs with the differentiable ones (edge vectors, features) made leaves of autograd."""
        first = 3 if t == 0 else 2
        return [x if k < first else x.detach().requires_grad_(True) for k, x in enumerate(inputs)]

    def _differentiable(self, t: int, inputs: list[Tensor]) -> list[Tensor]:
        return inputs[3:] if t == 0 else inputs[2:]

    @torch.jit.export
    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        """Gradients (n, F) of layer t's output -> those of edge_vectors, center_features, features.

        The layer is evaluated again: cheaper to hold, and a compiled stage has no graph to keep.
        """
        inputs = self._leaves(t, inputs)
        wanted = self._differentiable(t, inputs)
        weights: list[Tensor | None] = [gradients]
        found = torch.autograd.grad([self.layer(t, inputs)], wanted, weights, allow_unused=True)
        return _zeros_for_none(list(found), wanted)

    @torch.jit.export
    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        """Energies of the centres (n,), float64, eV, and their sum's gradients as in layer_vjp.

        With fields those follow, each (n,).
        """
        t = self.num_layers - 1
        inputs = self._leaves(t, inputs)
        wanted = self._differentiable(t, inputs)
        features = self._features(t, inputs)
        head = self.potential.energy_head(features.scalars, inputs[0])
        found = torch.autograd.grad([head.energy.sum()], wanted, allow_unused=True)
        energy = self.potential.total_energy(head, inputs[0]).detach()
        out = [energy]
        out += _zeros_for_none(list(found), wanted)
        if with_fields:
            with torch.no_grad():
                fields = self.potential.fields(features, head, inputs[0])
            fields[keys.ENERGY] = energy
            for name in self.fields:
                out.append(fields[name])
        return out


def _zeros_for_none(found: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    out: list[Tensor] = []
    for gradient, tensor in zip(found, like):  # noqa: B905  # TorchScript's zip is strict anyway
        out.append(torch.zeros_like(tensor) if gradient is None else gradient)
    return out


class Runtime(Protocol):
    """Whatever evaluates stages: `Stages` itself, scripted, or compiled for one device."""

    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        """See Stages.layer."""

    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        """See Stages.layer_vjp."""

    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        """See Stages.final."""


def evaluate(
    runtime: Runtime, inputs: dict[str, Tensor], fields: list[str], with_fields: bool
) -> dict[str, Tensor]:
    """Energy, gradients and fields (keys.py) of a structure, stage by stage on one process.

    Args:
        runtime: of the model.
        inputs: tensors of keys.py.
        fields: names of what `final` returns after the gradients.
        with_fields: whether to ask for them.
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
    out = {keys.ENERGY: found[0]}
    if with_fields:
        out.update(zip(fields, found[1 + num_gradients :], strict=True))
    gradients = torch.zeros_like(inputs[keys.EDGE_VECTORS])
    found = found[1 : 1 + num_gradients]
    for t in range(num_layers - 1, -1, -1):
        gradients[: found[0].shape[0]] += found[0]
        if t > 0:
            of_features = found[2].clone()
            of_features[: found[1].shape[0]] += found[1]
            found = runtime.layer_vjp(t - 1, stage_inputs[t - 1], of_features)
    out[keys.EDGE_GRADIENTS] = gradients
    return out
