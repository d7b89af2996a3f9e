"""A potential evaluated stage by stage equals the potential evaluated in one pass."""

import pytest
import torch
from conftest import CUTOFF, ELEMENTS, make_potential, make_structure

from lmp_hl import keys, stages
from lmp_hl.ensemble import Ensemble
from lmp_hl.graph import graph_inputs

# the same sums in float64, some in another order
EXACT = 1e-12


def make_stages(preset, num_layers=None):
    potential = make_potential(preset, num_elements=2, num_layers=num_layers)
    return potential, stages.Stages(Ensemble([potential]))


def inputs_of(potential, num_atoms=20):
    layers = 1 + len(potential.backbone.message_layers)
    structure = make_structure(ELEMENTS[:2], num_atoms)
    return graph_inputs(structure, ELEMENTS[:2], CUTOFF, layers, "float64")


@pytest.mark.parametrize("preset, num_layers", [("local", None), ("mp", None), ("mp", 3)])
@pytest.mark.parametrize("scripted", [False, True])
def test_stages_give_what_one_pass_gives(preset, num_layers, scripted):
    potential, parts = make_stages(preset, num_layers)
    inputs = inputs_of(potential)
    runtime = torch.jit.script(parts) if scripted else parts
    got = stages.evaluate(runtime, inputs, True)
    expected = potential(inputs, True)
    assert set(got) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value.detach(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("preset", ["local", "mp"])
def test_centres_may_be_evaluated_in_portions(preset):
    potential, parts = make_stages(preset)
    inputs = inputs_of(potential)
    species, edge_index, vectors = (
        inputs[k] for k in (keys.SPECIES, keys.EDGE_INDEX, keys.EDGE_VECTORS)
    )
    whole = parts.layer(0, [species, species, edge_index, vectors])
    portions = []
    for begin, end in ((0, 7), (7, 8), (8, 8), (8, 20)):
        inside = (edge_index[0] >= begin) & (edge_index[0] < end)
        edges = edge_index[:, inside] - torch.tensor([[begin], [0]])
        portions.append(parts.layer(0, [species[begin:end], species, edges, vectors[inside]]))
    torch.testing.assert_close(torch.cat(portions), whole, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("preset", ["local", "mp"])
@pytest.mark.parametrize("num_atoms", [0, 1])
def test_no_atoms_and_no_edges_are_evaluated(preset, num_atoms):
    potential, parts = make_stages(preset)
    structure = make_structure(ELEMENTS[:2], 1, pbc=False)[:num_atoms]
    layers = 1 + len(potential.backbone.message_layers)
    inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, layers, "float64")
    got = stages.evaluate(torch.jit.script(parts), inputs, True)
    assert got[keys.EDGE_GRADIENTS].shape == (0, 3)
    for key, value in potential(inputs, True).items():
        torch.testing.assert_close(got[key], value.detach(), rtol=EXACT, atol=EXACT)
