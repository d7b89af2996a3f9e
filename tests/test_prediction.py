"""The network of a training step, compiled: the same numbers as without."""

import copy

import pytest
import torch
from conftest import make_potential
from test_potential import inputs_of

from lmp_hl import keys
from lmp_hl.training import frames as fr
from lmp_hl.training.prediction import compiled_network, network_of


def gradients(potential, batch, network):
    """Outputs of a network and the gradient in the weights of a sum that reaches all of them."""
    generator = torch.Generator().manual_seed(1)

    def random(shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    species, edges, vectors = (
        batch[key] for key in (keys.SPECIES, keys.EDGE_INDEX, keys.EDGE_VECTORS)
    )
    weights = random((len(species), len(potential.energy_head.parts())))
    out = network(species, edges, vectors, weights)
    flat = [out.gradient, *out.features, *(x for head in out.heads for x in head)]
    total = sum((x * random(x.shape)).sum() for x in flat)
    parameters = [p for p in potential.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return flat, [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]


@pytest.mark.parametrize(
    "compile_graph",
    [lambda graph: graph, pytest.param(torch.compile, marks=pytest.mark.slow)],
    ids=["traced", "compiled"],
)
@pytest.mark.parametrize(("preset", "head"), [("mp", "hlgauss"), ("local", "committee")])
def test_compiled_network_has_the_same_outputs_and_gradients_in_the_weights(
    preset, head, compile_graph, structure_factory
):
    potential = copy.deepcopy(make_potential(preset, head, num_elements=2))
    potential.energy_head.requires_grad_(True)
    potential.backbone.requires_grad_(True)
    graphs = []
    for number in (5, 12, 1):  # a single atom in a box has no edges
        atoms = structure_factory(["Si", "O"], number, pbc=number > 5, seed=number)
        graphs.append(inputs_of(potential, atoms) | {fr.NUM_ATOMS: torch.tensor([number])})
    compiled = compiled_network(potential, compile_graph)
    eager = network_of(potential, create_graph=True)
    for chosen in (graphs, graphs[:1], graphs[1:]):  # other sizes, and other weights and buffers
        batch = fr.collate_graphs(chosen)
        expected, slopes = gradients(potential, batch, eager)
        got, got_slopes = gradients(potential, batch, compiled)
        for x, y in zip([*expected, *slopes], [*got, *got_slopes], strict=True):
            # float64, other order of sums
            scale = float(x.abs().max()) if x.numel() else 0.0
            torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-10 * max(1.0, scale))
        with torch.no_grad():
            for parameter in potential.parameters():
                parameter.mul_(1.01)
        potential.energy_head.set_bin_width(0.03)
