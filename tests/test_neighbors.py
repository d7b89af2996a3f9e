"""Uncertainty fields that depend on what the neighbours of an atom know."""

import copy

import numpy as np
import pytest
import torch
from conftest import CUTOFF, ELEMENTS, calibrated, make_card, make_potential, make_structure
from lammps_cases import edges as brute_force_edges
from lammps_cases import read_dump, run_lammps
from test_agreement import SYSTEMS, structure
from torch import Tensor

from lmp_hl import HLCalculator, keys, model_file, stages, uncertainty
from lmp_hl.ensemble import Ensemble
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.nn.backbone import Features
from lmp_hl.nn.heads import AtomicEnergy
from lmp_hl.training import frames as fr
from lmp_hl.training.calibrate import collect_atoms, recalibrate
from lmp_hl.uncertainty import Method

SYMBOLS = ELEMENTS[:2]
# the same sums in float64, some in another order
EXACT = 1e-12
OWN, MEAN, PRODUCT = keys.LLPR_FORCE_STD, keys.EXTRAPOLATION_GRADE, keys.LATENT_NLL
FIELDS = (OWN, MEAN, PRODUCT)


class Shared(Method):
    """Two values of an atom of which the neighbours' means are wanted, and one that is its own."""

    FIELDS = FIELDS
    SHARED = ("square", "sine")

    def __init__(self, sizes):
        super().__init__()

    def forward(
        self, features: Features, energy: AtomicEnergy, species: Tensor
    ) -> dict[str, Tensor]:
        x = features.scalars
        return {
            "square": x.pow(2).mean(1),
            "number": (1 + species).to(x.dtype),
            "sine": torch.sin(x[:, 0]),
        }

    def finish(
        self, values: dict[str, Tensor], neighbors: dict[str, Tensor], species: Tensor
    ) -> dict[str, Tensor]:
        return {
            keys.LLPR_FORCE_STD: values["square"],
            keys.EXTRAPOLATION_GRADE: neighbors["square"],
            keys.LATENT_NLL: values["number"] * neighbors["sine"],
        }


@pytest.fixture(scope="module")
def with_shared():
    """(preset, dtype, seed, methods) -> a potential with the method above beside the default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(uncertainty.METHODS, "shared", Shared)

        def make(preset="local", dtype="float64", seed=0, methods=("shared", "scales")):
            return make_potential(
                preset, num_elements=2, dtype=dtype, seed=seed, cutoff=CUTOFF, methods=methods
            )

        yield make


def inputs_of(atoms, potential, dtype="float64"):
    layers = 1 + len(potential.backbone.message_layers)
    return graph_inputs(atoms, SYMBOLS, CUTOFF, layers, dtype)


def brute_force_mean(values, atoms):
    """Over the neighbours within the cutoff, their images among them."""
    i, j, vectors = brute_force_edges(atoms)
    weights = (1 - (vectors**2).sum(1) / CUTOFF**2) ** 4
    mean = np.empty(len(values))
    for k in range(len(values)):
        near, w = j[i == k], weights[i == k]
        mean[k] = (1e-3 * values[k] + (w * values[near]).sum()) / (1e-3 + w.sum())
    return mean


@pytest.mark.parametrize("name", ["triclinic", "small_cell", "cluster", "isolated_periodic"])
@pytest.mark.parametrize("preset", ["local", "mp"])
def test_neighbours_are_averaged_by_nearness(with_shared, preset, name):
    atoms, potential = SYSTEMS[name], with_shared(preset)
    outputs = {
        k: v.detach() for k, v in potential(inputs_of(structure(atoms), potential), True).items()
    }
    own, mean = outputs[OWN].numpy(), outputs[MEAN].numpy()
    np.testing.assert_allclose(mean, brute_force_mean(own, atoms), rtol=1e-12)
    centers, _, _ = brute_force_edges(atoms)
    lonely = np.setdiff1d(np.arange(len(own)), centers)
    np.testing.assert_allclose(mean[lonely], own[lonely], rtol=1e-12)
    if name in ("triclinic", "cluster"):
        assert np.abs(mean / own - 1).max() > 0.05
    if name == "cluster":
        assert len(lonely) == 1


def test_a_neighbour_that_comes_in_changes_the_mean_gradually(with_shared):
    potential = with_shared()
    atoms = make_structure(SYMBOLS, 2, pbc=False)
    means = []
    for distance in np.linspace(CUTOFF + 0.1, 0.5 * CUTOFF, 400):
        atoms.positions[:] = [[0, 0, 0], [0, 0, distance]]
        outputs = potential(inputs_of(atoms, potential), True)
        means.append(float((outputs[MEAN] - outputs[OWN])[0].detach()))
    steps = np.abs(np.diff(means))
    assert steps.max() < 0.1 * np.ptp(means) and np.ptp(means) > 0.1 * abs(means[-1]) > 0


@pytest.mark.parametrize("preset", ["local", "mp"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", EXACT), ("float32", 1e-4)])
def test_stages_give_what_one_pass_gives(with_shared, preset, dtype, tolerance):
    members = [with_shared(preset, dtype), with_shared(preset, dtype, 1, ("shared",))]
    # two values of the method above and one of scales
    for ensemble, num_shared in ((Ensemble(members[:1]), 3), (Ensemble(members), 5)):
        parts = stages.Stages(ensemble)
        assert parts.num_shared == num_shared
        assert set(FIELDS) <= set(parts.fields)
        runtime = torch.jit.script(parts)
        for num_atoms in (20, 1, 0):
            atoms = make_structure(SYMBOLS, max(1, num_atoms), pbc=num_atoms > 1)[:num_atoms]
            inputs = inputs_of(atoms, members[0], dtype)
            got = stages.evaluate(runtime, inputs, True)
            expected = ensemble(inputs, True)
            assert set(got) == set(expected)
            for key, value in expected.items():
                torch.testing.assert_close(got[key], value.detach(), rtol=tolerance, atol=tolerance)


def test_centres_may_be_evaluated_in_portions(with_shared):
    potential = with_shared("mp")
    parts = stages.Stages(Ensemble([potential]))
    inputs = inputs_of(make_structure(SYMBOLS, 20), potential)
    species, index, vectors = (
        inputs[k] for k in (keys.SPECIES, keys.EDGE_INDEX, keys.EDGE_VECTORS)
    )
    features = parts.layer(0, [species, species, index, vectors])
    energies, carried, sums = [], [], torch.zeros(20, parts.num_shared, dtype=torch.float64)
    for begin, end in ((0, 7), (7, 8), (8, 8), (8, 20)):
        inside = (index[0] >= begin) & (index[0] < end)
        edges = index[:, inside] - torch.tensor([[begin], [0]])
        own = [species[begin:end], edges, vectors[inside], features[begin:end], features]
        energy, *_, values, on_edges = parts.final(own, True)
        energies.append(energy)
        carried.append(values)
        sums.index_add_(0, edges[1], on_edges)
    found = parts.finish(species, torch.cat(energies), torch.cat(carried), sums)
    expected = potential(inputs, True)
    for name, value in zip(parts.fields, found, strict=True):
        torch.testing.assert_close(value, expected[name].detach(), rtol=EXACT, atol=EXACT)


def test_edges_carry_nothing_where_nothing_is_shared():
    potential = make_potential(num_elements=2, methods=("density",))
    parts = stages.Stages(Ensemble([potential]))
    inputs = inputs_of(make_structure(SYMBOLS, 9), potential)
    given = [inputs[k] for k in (keys.SPECIES, keys.SPECIES, keys.EDGE_INDEX, keys.EDGE_VECTORS)]
    assert parts.num_shared == 0
    assert parts.final(given, True)[-1].shape == (inputs[keys.EDGE_INDEX].shape[1], 0)


def test_a_model_file_has_the_fields_and_their_gradients(with_shared, tmp_path):
    potential = with_shared("mp")
    model = model_file.load(export_potential(potential, SYMBOLS, make_card(), tmp_path / "hl.pt"))
    inputs = inputs_of(make_structure(SYMBOLS, 9), potential)
    expected, got = potential(inputs, True), model.evaluate(inputs)
    for name in (*FIELDS, keys.FORCE_STD):
        torch.testing.assert_close(got[name], expected[name].detach(), rtol=EXACT, atol=EXACT)
    vectors = inputs[keys.EDGE_VECTORS].requires_grad_(True)
    total = model.module(inputs, True, True)[MEAN].sum()
    (gradient,) = torch.autograd.grad([total], [vectors])
    step = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)).double()
    ends = [
        model.module({**inputs, keys.EDGE_VECTORS: (vectors + h * step).detach()}, True, False)
        for h in (1e-5, -1e-5)
    ]
    difference = float((ends[0][MEAN] - ends[1][MEAN]).sum().detach()) / 2e-5
    assert float((gradient * step).sum()) == pytest.approx(difference, rel=1e-6)


# frozen atoms -------------------------------------------------------------------------------------
def graphs(potential, number):
    out = []
    for seed in range(number):
        atoms = make_structure(SYMBOLS, 9 + seed, pbc=seed % 2 == 0, seed=seed)
        out.append(
            {
                **inputs_of(atoms, potential),
                fr.NUM_ATOMS: torch.tensor([len(atoms)]),
                fr.TARGET_FORCES: torch.zeros(len(atoms), 3),
                fr.TARGET_ENERGY: torch.zeros(1),
            }
        )
    return out


def test_frozen_atoms_have_the_fields_of_their_frames(with_shared):
    potential = with_shared("mp")
    frames = graphs(potential, 3)
    whole = collect_atoms(potential, frames)
    chosen = torch.nonzero(whole.frame != 1).squeeze(1).flip(0)
    for rows, atoms in ((torch.arange(30), whole), (chosen, whole.rows(chosen))):
        got = potential.fields(*atoms[:3], atoms.edge_index, atoms.edge_weights)
        each = [potential(graph, True) for graph in frames]
        for name in FIELDS:
            expected = torch.cat([of_one[name].detach() for of_one in each])[rows]
            torch.testing.assert_close(got[name], expected, rtol=EXACT, atol=EXACT)
    assert atoms.double().edge_weights.dtype == torch.float64


def test_frozen_atoms_keep_the_edges_among_them(with_shared):
    whole = collect_atoms(with_shared(), graphs(with_shared(), 2))
    rows = torch.tensor([12, 3, 5])
    some = whole.rows(rows)
    assert bool((whole.frame[rows] == some.frame).all())
    kept = {(int(rows[i]), int(rows[j])) for i, j in some.edge_index.t()}
    near = {(int(i), int(j)) for i, j in whole.edge_index.t()}
    assert kept == {(i, j) for i, j in near if i in rows and j in rows} and (3, 5) in kept
    assert some.edge_weights.shape == some.edge_index.shape[1:]


def test_older_model_files_are_not_calibrated(tmp_path):
    path = export_potential(calibrated("local"), SYMBOLS, make_card(), tmp_path / "hl.pt")
    module = copy.deepcopy(torch.jit.load(str(path)))
    module.format_version = 3
    torch.jit.save(module, str(path))
    assert model_file.load(path).module.format_version == 3  # still evaluated
    with pytest.raises(ValueError, match="model format 3, this lmp-hl calibrates format 4; export"):
        recalibrate(path, tmp_path / "data.xyz")


# LAMMPS -------------------------------------------------------------------------------------------
CASE = """
clear
units metal
boundary {boundary}
box tilt large
read_data {name}.data
pair_style mliap model {model}.pt {options}
pair_coeff * * {elements} NULL
compute u all hlgauss/atom {fields}
run 0
write_dump all custom {out} id fx fy fz c_u[*] modify format float %.17g
"""
# model, structure, options of the pair style; one rank of several has no atoms of the cluster
RUNS = [
    ("local", "large", ""),
    ("local", "large", "edges device memory 0.05"),
    ("local", "small_cell", ""),
    ("local", "cluster", ""),
    ("local", "isolated", ""),
    ("mp", "large", "memory 0.05"),
    ("mp", "large", "comm extended"),
    ("mp", "small_cell", ""),
    ("mp", "small_cell", "edges device comm extended"),
    ("mp", "cluster", ""),
    ("ensemble", "large", ""),
    ("ensemble", "small_cell", "memory 0.05"),
]


@pytest.fixture(scope="module")
def folder(with_shared, tmp_path_factory):
    path = tmp_path_factory.mktemp("neighbors")
    models = {preset: with_shared(preset) for preset in ("local", "mp")}
    models["ensemble"] = Ensemble([with_shared(seed=0), with_shared(seed=1, methods=("shared",))])
    for name, potential in models.items():
        export_potential(potential, SYMBOLS, make_card(), path / f"{name}.pt")
    for name in {name for _, name, _ in RUNS}:
        SYSTEMS[name].write(path / f"{name}.data")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_lammps_equals_python(folder, ranks):
    script = ""
    for k, (model, name, options) in enumerate(RUNS):
        script += CASE.format(
            boundary=" ".join("p" if p else "f" for p in SYSTEMS[name].periodic),
            name=name,
            model=model,
            options=options,
            elements=" ".join(SYMBOLS),
            fields=" ".join(FIELDS),
            out=f"{k}.{ranks}.dump",
        )
    result = run_lammps(script, folder, ranks)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    for k, (model, name, _) in enumerate(RUNS):
        calculator = HLCalculator(folder / f"{model}.pt")
        calculator.calculate(structure(SYSTEMS[name]))
        rows = read_dump(folder / f"{k}.{ranks}.dump")
        wanted = [calculator.results[field] for field in ("forces", *FIELDS)]
        for got, want in zip((rows[:, 1:4], *rows[:, 4:].T), wanted, strict=True):
            scale = max(1.0, np.abs(want).max())
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * scale, err_msg=RUNS[k])
