"""The equivariant backbone: neighbours -> density -> many-body products -> features per atom.

Layer 1 expands the neighbours of an atom in radial functions and spherical harmonics, separately
per element (the density of the atomic cluster expansion); later layers expand what the neighbours
carry (message passing). In each layer the density A is squared (A x A -> B), A and B are mixed into
tensors T, and the invariants A_0, B_0, A.T and T.T, up to five-body, feed a small network. Any
other backbone that returns `Features` fits the same heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import keys
from .angular import (
    DegreeLinear,
    ScaledLinear,
    SphericalHarmonics,
    SymmetricSquare,
    degree_of_components,
    degree_products,
    nonzero_scale,
)
from .radial import RadialBasis

L_OUT = 2  # highest degree of the tensors that a layer makes; the force distribution needs 2


class Features(NamedTuple):
    """What a backbone hands to the heads, for the atoms whose features it computed.

    scalars: (num_atoms, num_scalars) invariant; tensors: ((l_out + 1)^2, num_atoms, channels).
    """

    scalars: Tensor
    tensors: Tensor


class Standardize(nn.Module):
    """x -> (x - mean) / std / 2^(order - 2) per feature, with statistics of the training data.

    Invariants of two- to five-body order differ by orders of magnitude; without the statistics the
    first epochs go into finding scales. But products of more neighbours vary faster and carry less
    of the energy; taken as equals they make forces on other frames a tenth worse (acetylacetone,
    120 epochs: 13.3 instead of 12.2 meV/Å), hence the factor. 4 instead of 2 is no better.

    Args:
        orders: (number of features, their body order), in the order of the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, orders: list[tuple[int, int]]) -> None:
        super().__init__()
        size = sum(number for number, _ in orders)
        self.orders = orders
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(num_atoms, size) -> (num_atoms, size)."""
        return (x - self.mean) / self.std

    def fit(self, x: Tensor) -> None:
        """Take mean and standard deviation of x; a feature that never varies keeps its scale."""
        factor = torch.cat([torch.full((number,), 2.0 ** (n - 2)) for number, n in self.orders])
        self.mean.copy_(x.mean(0))
        self.std.copy_(factor * nonzero_scale((x - self.mean).pow(2).mean(0).sqrt()))


class ElementDensity(nn.Module):
    """Layer 1: A_i,lm = sum_j R_l(r_ij; elements of i and j) Y_lm.

    Neighbours are summed per element and radial function first, so the learned radial functions
    cost one small matrix product per atom, not per edge.
    """

    def __init__(self, l_max: int, channels: int, num_radial: int, num_elements: int) -> None:
        super().__init__()
        self.num_elements = num_elements
        self.num_radial = num_radial
        self.mix = ScaledLinear(l_max, num_elements * num_radial, channels)
        self.center_element = nn.Parameter(torch.ones(num_elements, channels))

    def forward(
        self,
        center_species: Tensor,
        species: Tensor,
        edge_index: Tensor,
        radial: Tensor,
        angular: Tensor,
    ) -> Tensor:
        """Edges of the centres -> density ((l_max + 1)^2, num_centers, channels)."""
        num_centers, num_components = center_species.shape[0], angular.shape[1]
        slots = edge_index[0] * self.num_elements + species.index_select(0, edge_index[1])
        total = torch.zeros(
            (num_centers * self.num_elements, num_components, self.num_radial),
            dtype=radial.dtype,
            device=radial.device,
        ).index_add(0, slots, angular.unsqueeze(2) * radial.unsqueeze(1))
        raw = total.reshape(num_centers, self.num_elements, num_components, self.num_radial)
        density = self.mix(raw.permute(2, 0, 1, 3).flatten(2))
        return density * self.center_element.index_select(0, center_species)


class MessageDensity(nn.Module):
    """Later layers: what the neighbours carry, expanded.

    A_i,lm = sum_j R_l Y_lm s_j + R'_l T_j,lm + [l = 0] sum_l' R''_l' Y_l'.T_j,l'

    Y goes up to l_max, T up to l_out. s and T are few mixtures of the neighbour's channels, and
    what has been summed is mixed to many again: an edge costs (l_max + 1)^2 message_channels, and
    there are tens of edges to an atom.
    """

    weight_of: Tensor

    def __init__(
        self,
        l_max: int,
        l_out: int,
        channels: int,
        num_radial: int,
        num_scalars: int,
        message_channels: int,
    ) -> None:
        super().__init__()
        self.num_tensors = (l_out + 1) ** 2
        self.channels = message_channels
        self.num_weights = l_max + 1 + 2 * (l_out + 1)  # R, R' and R'' of every degree
        self.radial = nn.Linear(num_radial, self.num_weights * message_channels, bias=False)
        self.scalars = nn.Linear(num_scalars, message_channels)
        self.tensors = DegreeLinear(l_out, channels, message_channels)
        self.mix = ScaledLinear(l_max, message_channels, channels)
        self.keep = DegreeLinear(l_out, channels, channels)
        y, t = degree_of_components(l_max), degree_of_components(l_out)
        # of each component of Y, T and Y.T
        index = torch.cat([y, l_max + 1 + t, l_max + 2 + l_out + t])
        self.register_buffer("weight_of", index)

    def forward(
        self,
        centers: Features,
        features: Features,
        edge_index: Tensor,
        radial: Tensor,
        angular: Tensor,
    ) -> Tensor:
        """Features of centres and neighbours -> density ((l_max + 1)^2, num_centers, channels)."""
        num_centers, num_all, n = centers.scalars.shape[0], angular.shape[1], self.num_tensors
        # the weights of a degree are repeated for its components here, not for every edge
        weight = self.radial.weight.reshape(self.num_weights, -1).index_select(0, self.weight_of)
        weights = torch.matmul(radial, weight.reshape(-1, radial.shape[1]).t())
        weights = weights.reshape(radial.shape[0], num_all + 2 * n, self.channels)
        of_spread, of_carried, of_inner = weights.split([num_all, n, n], dim=1)
        s_j = self.scalars(features.scalars).index_select(0, edge_index[1]).unsqueeze(1)
        t_j = self.tensors(features.tensors).transpose(0, 1).index_select(0, edge_index[1])
        y = angular.unsqueeze(2)
        terms = of_spread * y * s_j  # (num_edges, components, channels)
        inner = (of_inner * y[:, :n] * t_j).sum(1, keepdim=True)
        # padded, not cut and joined: the gradient of a cut is one more pass over all terms
        terms = terms + pad(of_carried * t_j, [0, 0, 0, num_all - n])
        terms = terms + pad(inner, [0, 0, 0, num_all - 1])
        raw = torch.zeros(
            (num_centers, num_all, self.channels), dtype=radial.dtype, device=radial.device
        ).index_add(0, edge_index[0], terms)
        kept = pad(self.keep(centers.tensors), [0, 0, 0, 0, 0, num_all - n])
        return self.mix(raw.transpose(0, 1)) + kept


class ManyBody(nn.Module):
    """Density of one layer, up to degree l_max -> invariants and mixed tensors up to l_out."""

    def __init__(
        self, l_max: int, l_out: int, channels: int, num_scalars: int, num_elements: int
    ) -> None:
        super().__init__()
        self.l_out = l_out
        self.square = SymmetricSquare(l_max, l_out)
        self.mix_density = DegreeLinear(l_out, channels, channels)
        self.mix_square = nn.ParameterList(
            nn.Parameter(torch.randn(n, channels, channels) / math.sqrt(n * channels))
            for n in self.square.paths
        )
        # A_0, B_0, A.T and T.T, by the highest order in them
        each = [(1, 2), (self.square.paths[0], 3), (l_out + 1, 4), (l_out + 1, 5)]
        orders = [(number * channels, order) for number, order in each]
        num_invariants = sum(number for number, _ in orders)
        self.standardize = Standardize(orders)
        self.linear = nn.Linear(num_invariants, num_scalars)
        self.hidden = nn.Linear(num_invariants, num_scalars)
        self.hidden_element = nn.Embedding(num_elements, num_scalars)
        self.out = nn.Linear(num_scalars, num_scalars)

    def forward(self, density: Tensor, species: Tensor) -> Features:
        """((l_max + 1)^2, n, channels) and (n,) species -> Features of these n atoms."""
        squares = self.square(density)
        low = density[: (self.l_out + 1) * (self.l_out + 1)]
        blocks: list[Tensor] = []
        for degree, weight in enumerate(self.mix_square):
            # (2l + 1, n, paths * channels): all paths in one product
            block = squares[degree].permute(1, 2, 0, 3).flatten(2)
            blocks.append(torch.matmul(block, weight.flatten(0, 1)))
        mixed = self.mix_density(low) + torch.cat(blocks, dim=0)
        # A_0, B_0 of every path, A.T and T.T of every degree
        invariants = [density[0], squares[0].squeeze(1).transpose(0, 1).flatten(1)]
        invariants += degree_products(low, mixed, self.l_out)
        invariants += degree_products(mixed, mixed, self.l_out)
        x = self.standardize(torch.cat(invariants, dim=1))
        hidden = torch.nn.functional.silu(self.hidden(x) + self.hidden_element(species))
        return Features(self.linear(x) + self.out(hidden), mixed)


class MessageLayer(nn.Module):
    """One message-passing step; scalars of the layers add up."""

    def __init__(
        self,
        l_max: int,
        l_out: int,
        channels: int,
        num_radial: int,
        num_scalars: int,
        num_elements: int,
        message_channels: int,
    ) -> None:
        super().__init__()
        self.density = MessageDensity(
            l_max, l_out, channels, num_radial, num_scalars, message_channels
        )
        self.many_body = ManyBody(l_max, l_out, channels, num_scalars, num_elements)

    def forward(
        self,
        center_species: Tensor,
        centers: Features,
        features: Features,
        edge_index: Tensor,
        radial: Tensor,
        angular: Tensor,
    ) -> Features:
        """Features of centres and neighbours -> new features of the centres."""
        density = self.density(centers, features, edge_index, radial, angular)
        new = self.many_body(density, center_species)
        return Features(centers.scalars + new.scalars, new.tensors)


class Backbone(nn.Module):
    """E(3)-equivariant features; `num_layers` 1 is strictly local, more pass messages.

    Args:
        num_elements: number of species indices.
        cutoff: in Å.
        num_layers: range of the energy is num_layers * cutoff.
        channels: copies of each tensor.
        l_max: highest degree of the spherical harmonics, 1 to 4; tensors stop at L_OUT.
        num_radial: radial functions per pair of elements.
        num_scalars: size of the invariant features.
        message_channels: copies of each tensor that an edge carries from layer to layer.
    """

    def __init__(
        self,
        num_elements: int,
        cutoff: float,
        num_layers: int,
        channels: int,
        l_max: int,
        num_radial: int,
        num_scalars: int,
        message_channels: int,
    ) -> None:
        super().__init__()
        if not 1 <= l_max <= 4:
            raise ValueError(f"model.l_max must be 1 to 4, got {l_max}")
        if num_layers < 1:
            raise ValueError(f"model.num_layers must be at least 1, got {num_layers}")
        self.radial = RadialBasis(cutoff, num_radial)
        self.angular = SphericalHarmonics(l_max)
        self.element_density = ElementDensity(l_max, channels, num_radial, num_elements)
        l_out = min(l_max, L_OUT)
        self.many_body = ManyBody(l_max, l_out, channels, num_scalars, num_elements)
        self.message_layers = nn.ModuleList(
            MessageLayer(
                l_max, l_out, channels, num_radial, num_scalars, num_elements, message_channels
            )
            for _ in range(num_layers - 1)
        )
        self.num_scalars = num_scalars
        self.channels = channels
        self.num_components = (l_out + 1) ** 2  # of the tensors
        self.num_features = num_scalars + self.num_components * channels

    def expand(self, edge_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(num_edges, 3) Å -> radial (num_edges, num_radial), angular (num_edges, components)."""
        lengths = edge_vectors.pow(2).sum(1).sqrt()
        return self.radial(lengths), self.angular(edge_vectors / lengths.unsqueeze(1))

    def first_layer(
        self,
        center_species: Tensor,
        species: Tensor,
        edge_index: Tensor,
        radial: Tensor,
        angular: Tensor,
    ) -> Features:
        """Species of centres and of all nodes, edges of the centres -> features of the centres."""
        density = self.element_density(center_species, species, edge_index, radial, angular)
        return self.many_body(density, center_species)

    def layer(self, t: int, inputs: list[Tensor]) -> Features:
        """Layer t (from 0) by itself: inputs of a stage (stages.py) -> features of the centres."""
        if t == 0:
            radial, angular = self.expand(inputs[3])
            return self.first_layer(inputs[0], inputs[1], inputs[2], radial, angular)
        radial, angular = self.expand(inputs[2])
        centers, nodes = self.unflatten(inputs[3]), self.unflatten(inputs[4])
        features = centers
        for k, layer in enumerate(self.message_layers):
            if k + 1 == t:
                features = layer(inputs[0], centers, nodes, inputs[1], radial, angular)
        return features

    def flatten(self, features: Features) -> Tensor:
        """Features of n atoms as (n, num_features)."""
        return torch.cat([features.scalars, features.tensors.transpose(0, 1).flatten(1)], dim=1)

    def unflatten(self, flat: Tensor) -> Features:
        """What `flatten` made flat."""
        scalars, rest = flat[:, : self.num_scalars], flat[:, self.num_scalars :]
        tensors = rest.reshape(flat.shape[0], self.num_components, self.channels)
        return Features(scalars, tensors.transpose(0, 1))

    def layers(
        self,
        species: Tensor,
        edge_index: Tensor,
        edge_vectors: Tensor,
        num_nodes: list[int],
        num_edges: list[int],
    ) -> Features:
        """All layers, the t-th for the first num_nodes[t] nodes, which have num_edges[t] edges."""
        radial, angular = self.expand(edge_vectors)
        n, e = num_nodes[0], num_edges[0]
        features = self.first_layer(
            species[:n], species, edge_index[:, :e], radial[:e], angular[:e]
        )
        for t, layer in enumerate(self.message_layers):
            n, e = num_nodes[t + 1], num_edges[t + 1]
            centers = Features(features.scalars[:n], features.tensors[:, :n])
            features = layer(
                species[:n], centers, features, edge_index[:, :e], radial[:e], angular[:e]
            )
        return features

    def forward(self, inputs: dict[str, Tensor]) -> Features:
        """Model inputs (keys.py) -> features of the owned atoms, differentiable in edge_vectors."""
        num_nodes: list[int] = inputs[keys.LAYER_NODES].tolist()
        num_edges: list[int] = inputs[keys.LAYER_EDGES].tolist()
        vectors = inputs[keys.EDGE_VECTORS]
        return self.layers(
            inputs[keys.SPECIES], inputs[keys.EDGE_INDEX], vectors, num_nodes, num_edges
        )


def fit_scales(backbone: Backbone, inputs: dict[str, Tensor]) -> None:
    """Set every Standardize and ScaledLinear from one batch of training data, first layer first."""
    hooks = [
        module.register_forward_pre_hook(lambda module, args: module.fit(args[0]))
        for module in backbone.modules()
        if isinstance(module, Standardize | ScaledLinear)
    ]
    try:
        with torch.no_grad():
            backbone(inputs)
    finally:
        for hook in hooks:
            hook.remove()
