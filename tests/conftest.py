"""Shared fixtures: small potentials with random weights and fitted scales, structures, an hl.pt."""

import copy
import functools
import os
import shutil

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from filelock import FileLock
from lammps_cases import crystal

from lmp_hl import keys
from lmp_hl.ensemble import Ensemble
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.nn.backbone import fit_scales
from lmp_hl.nn.heads import HistogramEnergy, invariants
from lmp_hl.training import frames as fr
from lmp_hl.training.config import ModelConfig
from lmp_hl.training.module import build_potential
from lmp_hl.uncertainty import DEFAULT

ELEMENTS = ("Si", "O", "Cu")
CUTOFF = 4.0

# glibc fills new memory of the processes that tests start: what is read before it was written is
# then 1e127 and not, most of the time, zero
os.environ.setdefault("MALLOC_PERTURB_", "165")

# one thread: sums come out the same on every machine, and two test processes share two cores
torch.set_num_threads(1)


def make_structure(elements, num_atoms=9, pbc=True, seed=0):
    """Atoms on a jittered grid of about bond length in a triclinic box, every element in turn."""
    rng = np.random.default_rng(seed)
    radius = max(covalent_radii[atomic_numbers[e]] for e in elements)
    side = int(np.ceil(num_atoms ** (1 / 3)))
    spacing = 2.3 * radius
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = grid[rng.permutation(len(grid))[:num_atoms]] + 0.25 * rng.uniform(
        -1, 1, (num_atoms, 3)
    )
    strain = np.eye(3) + 0.08 * rng.uniform(-1, 1, (3, 3))
    symbols = [elements[i % len(elements)] for i in range(num_atoms)]
    cell = spacing * side * strain
    return Atoms(symbols, positions=spacing * points @ strain, cell=cell, pbc=pbc)


def randomize(potential, structures, elements, seed):
    """Random values for what starts at zero or one, so that no test passes because of a zero."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor, size):
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return (size * values).to(tensor.dtype)

    dtype = str(next(potential.parameters()).dtype).removeprefix("torch.")
    cutoff = potential.backbone.radial.cutoff
    layers = 1 + len(potential.backbone.message_layers)
    inputs = []
    for structure in structures:
        graph = graph_inputs(structure, elements, cutoff, layers, dtype)
        inputs.append({**graph, fr.NUM_ATOMS: torch.tensor([len(structure)])})
    batch = fr.collate_graphs(inputs)
    fit_scales(potential.backbone, batch)
    head, methods = potential.energy_head, potential.methods
    with torch.no_grad():
        for method in potential.uncertainty_methods():
            if method.trained:
                for parameter in method.parameters():
                    parameter.copy_(noise(parameter, 0.3))
        for part in head.parts():
            part.scale.fill_(0.4)
            part.anchor.element_bias.weight.copy_(noise(part.anchor.element_bias.weight, 0.5))
            if isinstance(part, HistogramEnergy):
                head.set_bin_width(0.02)
                part.log_tau.weight.copy_(noise(part.log_tau.weight, 0.1))
                part.log_tau.bias.fill_(1.0)
                part.delta.weight.copy_(noise(part.delta.weight, 0.3))
                part.delta.bias.copy_(noise(part.delta.bias, 0.3))
        if "scales" in methods:
            distance, force = methods["scales"].distance, methods["scales"].force_distribution
            force.delta.copy_(noise(force.delta, 0.5))
            force.shape_weight.copy_(noise(force.shape_weight, 1.0))
            force.size.copy_(torch.exp(noise(force.size, 0.5)))
            force.tabulate(0.05)
        potential.reference_energies.copy_(noise(potential.reference_energies, 3.0))
        if "scales" in methods:
            features = potential.backbone(batch)
            x = invariants(features)
            distance.mean.copy_(x.mean(0) + noise(distance.mean, 0.1))
            distance.whiten.add_(noise(distance.whiten, 0.2).tril())
            values = distance(x, batch["species"])
            distance.median.copy_(values.median())
            promise(methods["scales"], values / distance.median)


def promise(scales, distances):
    """Offer the fields that promise something; every third atom extrapolates."""
    scales.coverage.fill_(0.95)
    scales.bound_factor.fill_(2.5)
    scales.reach.copy_(distances.quantile(2 / 3))


@functools.cache
def make_potential(
    preset="local",
    head="hlgauss",
    num_elements=1,
    l_max=2,
    dtype="float64",
    num_layers=None,
    seed=0,
    cutoff=CUTOFF,
    methods=DEFAULT,
    message_channels=3,
):
    """A small potential for the first `num_elements` of ELEMENTS; shared, so do not change it."""
    torch.manual_seed(seed)
    config = ModelConfig(
        preset=preset,
        head=head,
        cutoff=cutoff,
        channels=3,
        l_max=l_max,
        num_radial=4,
        hidden=8,
        num_layers=num_layers,
        message_channels=message_channels,
        num_bins=32,
        dtype=dtype,
        uncertainty=methods,
    )
    elements = ELEMENTS[:num_elements]
    potential = build_potential(config, num_elements)
    structures = [make_structure(elements, n, seed=seed + n) for n in (9, 20, 27)]
    randomize(potential, structures, elements, seed)
    return potential.requires_grad_(False).eval()


FIELDS = make_potential().field_names()  # of a recommended potential


def calibrated(preset, dtype="float64", seed=0):
    """A random potential whose uncertainty is fitted to features of a crystal, so that it varies.

    Otherwise features far from those expected drive every histogram to its widest shape, and
    fields that are all alike agree whatever the code does.
    """
    potential = copy.deepcopy(make_potential(preset, num_elements=2, dtype=dtype, seed=seed))
    backbone, scales = potential.backbone, potential.methods["scales"]
    distance, force = scales.distance, scales.force_distribution
    layers = 1 + len(backbone.message_layers)
    atoms = crystal(15, triclinic=True, repeat=5)
    symbols = np.array(ELEMENTS)[atoms.species]
    structure = Atoms(symbols, atoms.positions, cell=atoms.cell, pbc=True)
    inputs = graph_inputs(structure, ELEMENTS[:2], backbone.radial.cutoff, layers, dtype)
    with torch.no_grad():
        features = backbone(inputs)
        x = invariants(features)
        mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
        distance.mean.copy_(mean)
        distance.whiten.copy_(torch.diag(1 / std))
        distance.median.fill_(1.0)
        values = distance(x, inputs[keys.SPECIES])
        distance.median.copy_(values.median())
        promise(scales, values / distance.median)
        force.scale_features(features)
    return potential


def calibrated_ensemble(preset, dtype="float64"):
    """Three potentials of different seeds as one, with numbers as a calibration might find."""
    ensemble = Ensemble([calibrated(preset, dtype, seed) for seed in range(3)])
    ensemble.energy_means.add_(torch.tensor([[0.1, -0.2], [0.0, 0.3], [-0.4, 0.0]]))
    ensemble.force_factor.fill_(1.7)
    return ensemble.requires_grad_(False).eval()


def make_card(head="hlgauss"):
    """What a training run would say about a model; the numbers are made up."""
    return {
        "name": "tiny",
        "config": {"model": {"head": head}, "training": {"epochs": 3}},
        "versions": {"torch": torch.__version__},
        "training": {
            "train_frames": 5,
            "valid_frames": 2,
            "train_atoms": 45,
            "seconds": 1.5,
            "metrics": {"valid_energy_rmse": 12.345, "valid_forces_rmse": 67.89},
        },
        "calibration": {
            "validation_atoms": 18,
            "size_ratio": 1.04,
            "ranking": {"distance": 0.31, "force_std": 0.47},
        },
    }


@pytest.fixture(scope="session")
def potential_factory():
    """make_potential: its arguments -> Potential."""
    return make_potential


@pytest.fixture(scope="session")
def structure_factory():
    """make_structure: (elements, num_atoms, pbc, seed) -> ase.Atoms."""
    return make_structure


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of an exported float64 hl.pt: random weights, strictly local, elements Si and O."""
    path = tmp_path_factory.mktemp("model") / "hl.pt"
    return export_potential(make_potential(num_elements=2), ELEMENTS[:2], make_card(), path)


class CompiledModels(dict):
    """Preset -> hl.pt2, made when it is first asked for: each takes half a minute or more.

    One process of pytest-xdist makes it for all.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, preset):
        from lmp_hl.compile import export_compiled

        path = self.folder / f"{preset}.pt2"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                export_compiled(calibrated(preset), ELEMENTS[:2], make_card(), path)
        self[preset] = path
        return path


@pytest.fixture(scope="session")
def compiled_models(tmp_path_factory):
    """Preset -> float64 hl.pt2 of calibrated(preset), compiled for this CPU.

    By default only "mp" is compiled, which has every kind of stage.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("compiling a model needs g++")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes
    (folder / "compiled").mkdir(exist_ok=True)
    return CompiledModels(folder / "compiled")


@pytest.fixture
def silicon():
    """Eight silicon atoms, rattled: a periodic cell not much larger than the cutoff."""
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=3)
    return atoms


@pytest.fixture(scope="session")
def network_folder(tmp_path_factory, request):
    """Folder with the model files and structures of lammps_network.py."""
    from lammps_network import RUNTIMES, STRUCTURES, write_models, write_start

    path = tmp_path_factory.mktemp("network")
    write_models(path)
    if "pt2" in RUNTIMES:
        compiled = request.getfixturevalue("compiled_models")
        for name in ("local", "mp"):
            shutil.copy(compiled[name], path / f"{name}.pt2")
    for name, atoms in STRUCTURES.items():
        write_start(path / f"{name}.start", atoms)
    return path
