"""Energies, forces and stress of a batch, differentiable in the weights; compiled if asked for.

In a batch every node is owned in every layer (lmp_hl.graph folds periodic images), so the network
needs nothing but species, edges and vectors.
"""

import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmp_hl import keys
from lmp_hl.compile import need_compiler
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import AtomicEnergy
from lmp_hl.potential import Potential, edge_forces
from lmp_hl.uncertainty.committee import CommitteeEnergy

from . import frames as fr


class Prediction(NamedTuple):
    """A batch evaluated with everything the losses need.

    energy: (num_graphs,) float64, eV, without reference energies; forces: (num_nodes, 3), eV/Å;
    stress: (num_graphs, 3, 3), eV/Å³; atoms: per-atom output of the energy head; features: of the
    atoms; members: output of every head of a committee.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor
    atoms: AtomicEnergy
    features: Features | None = None
    members: Sequence[AtomicEnergy] = ()


class Evaluated(NamedTuple):
    """What a network says of a batch.

    features: of the nodes; heads: output of the energy head, or of every head of a committee;
    gradient: (num_edges, 3), eV/Å, of the sum of the differentiated energies.
    """

    features: Features
    heads: list[AtomicEnergy]
    gradient: Tensor


# (species, edge_index, edge_vectors, weights of the heads) -> Evaluated
Network = Callable[[Tensor, Tensor, Tensor, Tensor], Evaluated]


def network_of(potential: Potential, create_graph: bool) -> Network:
    """A potential as a function of tensors.

    The differentiated energy is that of each node's heads times `weights`, (num_nodes, num_heads).
    """

    def network(
        species: Tensor, edge_index: Tensor, edge_vectors: Tensor, weights: Tensor
    ) -> Evaluated:
        vectors = edge_vectors.detach().requires_grad_(True)
        layers = 1 + len(potential.backbone.message_layers)
        nodes, edges = [species.shape[0]] * layers, [vectors.shape[0]] * layers
        features = potential.backbone.layers(species, edge_index, vectors, nodes, edges)
        head = potential.energy_head
        if isinstance(head, CommitteeEnergy):
            heads = head.members(features.scalars, species)
        else:
            heads = [head(features.scalars, species)]
        energies = torch.stack([one.energy for one in heads], 1)
        (gradient,) = torch.autograd.grad(
            [(weights * energies).sum()], [vectors], create_graph=create_graph
        )
        return Evaluated(features, heads, gradient)

    return network


def need_compilers() -> None:
    """Refuse to go on where compiled_network cannot work.

    Raises:
        ValueError: no compiler, or Python's own headers are missing; what to install.
    """
    need_compiler()
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise ValueError(
            f"training.compile needs Python's headers, and there is no {header}; install them "
            f"(Debian: python3-dev), or set training.compile: false"
        )


def compiled_network(
    potential: Potential, compile_graph: Callable[..., Any] = torch.compile
) -> Network:
    """The same as network_of(potential, create_graph=True), compiled by torch.compile.

    torch.compile cannot differentiate twice. What autograd does for the forces is therefore traced
    into plain operations first, for any number of nodes and edges; the gradient of those in the
    weights is the compiler's work. Weights and buffers are read anew at every call. The network
    must not detach anything: results that autograd keeps for its own use are detached in the trace,
    and cannot be told from what was meant so.

    """
    from torch.fx.experimental.proxy_tensor import make_fx

    eager = network_of(potential, create_graph=True)

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = eager(*inputs)
        return (out.gradient, *out.features, *(x for head in out.heads for x in head))

    weight = next(potential.parameters())
    # sizes that are equal in the example are taken for always equal, so all of them differ
    n, e = potential.backbone.num_features + 1, potential.backbone.num_features + 2
    heads = len(potential.energy_head.parts())
    radius = 0.3 * potential.backbone.radial.cutoff
    example = (
        torch.zeros(n, dtype=torch.int64),
        torch.stack([torch.arange(e) % n, torch.arange(e) // 2]),
        torch.full((e, 3), radius, dtype=weight.dtype),
        torch.ones(n, heads, dtype=weight.dtype),
    )
    traced = make_fx(flat, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        *(x.to(weight.device) for x in example)
    )
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    compiled = compile_graph(traced)

    def network(
        species: Tensor, edge_index: Tensor, edge_vectors: Tensor, weights: Tensor
    ) -> Evaluated:
        inputs = (species, edge_index, edge_vectors, weights)
        for tensor, dim in zip(inputs, (0, 1, 0, 0), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        gradient, scalars, tensors, *rest = compiled(*inputs)
        size = len(AtomicEnergy._fields)
        heads = [AtomicEnergy(*rest[k : k + size]) for k in range(0, len(rest), size)]
        return Evaluated(Features(scalars, tensors), heads, gradient)

    return network


def predict(
    potential: Potential,
    batch: dict[str, Tensor],
    create_graph: bool,
    turn: int | None = None,
    network: Network | None = None,
) -> Prediction:
    """Energies, forces and stress of a batch.

    Args:
        potential: to evaluate.
        batch: of graphs.
        create_graph: make them differentiable in the weights.
        turn: of a committee, forces and stress of frame f are those of member (turn + f) modulo
            their number: with a step's number for it every member's forces are trained, at the
            price of one gradient. None: those of the mean energy.
        network: of the potential, if it has been compiled.
    """
    species, graph_of = batch[keys.SPECIES], batch[fr.BATCH]
    edge_index, vectors = batch[keys.EDGE_INDEX], batch[keys.EDGE_VECTORS]
    head = potential.energy_head
    number = len(head.parts())
    if turn is None or number == 1:
        weights = vectors.new_full((len(species), number), 1.0 / number)
    else:
        chosen = member_of(turn, graph_of, number)
        weights = torch.nn.functional.one_hot(chosen, number).to(vectors.dtype)
    network = network or network_of(potential, create_graph)
    features, heads, gradient = network(species, edge_index, vectors, weights)
    members, atoms = (), heads[0]
    if isinstance(head, CommitteeEnergy):
        members, atoms = heads, head.combine(heads)
    num_graphs = batch[fr.NUM_ATOMS].shape[0]
    energy = atoms.energy.new_zeros(num_graphs, dtype=torch.float64)
    energy = energy.index_add(0, graph_of, atoms.energy.double())
    forces = edge_forces(edge_index, gradient, graph_of.shape[0])
    outer = vectors.unsqueeze(2) * gradient.unsqueeze(1)  # (num_edges, 3, 3)
    virial = outer.new_zeros((num_graphs, 3, 3))
    virial = virial.index_add(0, graph_of[edge_index[0]], outer)
    stress = 0.5 * (virial + virial.transpose(1, 2)) / batch[fr.VOLUME].reshape(-1, 1, 1)
    return Prediction(energy, forces, stress, atoms, features, members)


def member_of(turn: int, graph: Tensor, num_members: int) -> Tensor:
    """The member of a committee whose forces are trained on a graph of the batch."""
    return (graph + turn) % num_members


def by_member(prediction: Prediction, batch: dict[str, Tensor]) -> list[Prediction]:
    """The prediction of every head that is trained on its own energies: of one head, its own."""
    out = []
    for atoms in prediction.members:
        energy = torch.zeros_like(prediction.energy)
        energy = energy.index_add(0, batch[fr.BATCH], atoms.energy.double())
        out.append(prediction._replace(energy=energy, atoms=atoms, members=()))
    return out or [prediction]
