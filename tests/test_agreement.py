"""The real network in LAMMPS equals Python's calculator: energy, forces, virial, every field."""

import functools
import json
import shutil
import warnings

import conftest
import numpy as np
import pytest
import torch
from ase import Atoms as AseAtoms
from ase.stress import voigt_6_to_full_3x3_stress
from conftest import ELEMENTS, calibrated, calibrated_ensemble, make_card
from lammps_cases import Atoms, cluster, crystal, read_dump, run_lammps

from lmp_hl import keys
from lmp_hl.analysis import validation_ranking
from lmp_hl.calculator import HLCalculator
from lmp_hl.compile import export_compiled
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.h5md import open_trajectory

SYMBOLS = np.array(ELEMENTS[:2])
FIELDS = [keys.ENERGY, *conftest.FIELDS]
DISAGREEMENT = [keys.ENSEMBLE_ENERGY_STD, keys.ENSEMBLE_FORCE_STD]
BAR_PER_EV_A3 = 1.6021765e6  # the rounded number that LAMMPS itself uses in units metal

# Both evaluate the same network, in float64 on edges in another order: sums of some hundred terms
# of order 1 to 10 differ by about 1e-14, and the network's derivatives enlarge that somewhat.
FLOAT64 = 1e-10
# float32 has seven digits; sums of some hundred terms and the network lose up to two of them.
FLOAT32 = 1e-4

SYSTEMS = {
    "periodic": crystal(11),
    "triclinic": crystal(12, triclinic=True),
    "small_cell": Atoms(  # every edge is shorter than the cutoff: atoms see their own images
        [[0.1, 0.2, 0.3], [1.2, 0.9, 1.6], [2.2, 2.6, 0.9]],
        [0, 1, 1],
        [[2.9, 0, 0], [0.4, 3.1, 0], [-0.3, 0.5, 3.0]],
    ),
    "cluster": cluster(13),  # one atom has no neighbours, and one of two ranks has no atoms
    "shrink_wrapped": cluster(14),
    "isolated": Atoms([[4.0, 5.0, 6.0]], [1], 30 * np.eye(3), (False, False, False)),
    "isolated_periodic": Atoms([[4.0, 5.0, 6.0]], [0], 30 * np.eye(3)),
    "large": crystal(15, triclinic=True, repeat=5),  # wider than two cutoffs
}


def structure(atoms):
    """ASE's view of a system."""
    return AseAtoms(SYMBOLS[atoms.species], atoms.positions, cell=atoms.cell, pbc=atoms.periodic)


MODELS = {
    "local": calibrated("local"),
    "mp": calibrated("mp"),
    "float32": calibrated("mp", "float32"),
    "ensemble_local": calibrated_ensemble("local"),
    "ensemble_mp": calibrated_ensemble("mp"),
}
STRICTLY_LOCAL = ("local", "ensemble_local")


def fields_of(model):
    return FIELDS + DISAGREEMENT * model.startswith("ensemble")


EVERYWHERE = ("periodic", "triclinic", "small_cell")  # the other kinds of box: once each
# ways to run a model that must not change its results: kind of file, options
WAYS = {
    "default": "pt",
    "extended": "pt comm extended",
    "device": "pt edges device",
    "device_extended": "pt edges device comm extended",
    "portions": "pt memory 0.05",
    "compiled": "pt2",
    "compiled_extended": "pt2 comm extended",
    "compiled_portions": "pt2 memory 0.05 edges device",
    "cuda": "pt device cuda",
    "cuda_host": "pt device cuda edges host memory 1",
}
CASES = [("local", name, "default") for name in (*EVERYWHERE, "cluster", "isolated")]
CASES += [
    ("mp", name, "default")
    for name in (*EVERYWHERE, "shrink_wrapped", "isolated_periodic", "large")
]
CASES += [("float32", "triclinic", "default")]
CASES += [("mp", "large", way) for way in ("extended", "device", "device_extended", "portions")]
CASES += [("mp", name, "extended") for name in ("small_cell", "shrink_wrapped")]
CASES += [("local", name, "device") for name in ("triclinic", "cluster")]
CASES += [("local", "large", "portions"), ("mp", "isolated_periodic", "device")]
CASES += [("local", name, "compiled") for name in ("triclinic", "cluster", "isolated")]
CASES += [
    ("mp", n, "compiled") for n in ("large", "small_cell", "shrink_wrapped", "isolated_periodic")
]
CASES += [("mp", "large", way) for way in ("compiled_extended", "compiled_portions")]
CASES += [("ensemble_local", "triclinic", "default"), ("ensemble_mp", "large", "portions")]
SLOW_CASES = [
    ("ensemble_local", name, way)
    for name in ("triclinic", "cluster", "isolated", "large")
    for way in ("device", "portions", "compiled")
]
SLOW_CASES += [
    ("ensemble_mp", name, way)
    for name in ("large", "small_cell", "shrink_wrapped", "isolated_periodic")
    for way in ("default", "extended", "device", "compiled", "compiled_extended")
]
SLOW_CASES += [("ensemble_mp", "large", "compiled_portions")]
RANKS = (1, 2, 4)
MORE_RANKS = [("local", "triclinic", "default"), ("mp", "shrink_wrapped", "default")]
MORE_RANKS += [("ensemble_mp", "large", "portions")]
MORE_RANKS += [("mp", "large", way) for way in ("default", "extended", "compiled")]

# on a GPU: everything
GPU_CASES = [(model, name, "cuda") for model, name, way in CASES if way == "default"]
GPU_CASES += [(model, "large", "cuda_host") for model in ("local", "mp", "ensemble_mp")]


def cases_of(num_ranks):
    return CASES if num_ranks <= 2 else MORE_RANKS


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

CASE = """
clear
units metal
boundary {boundary}
box tilt large
read_data {name}.data
pair_style mliap model {model}.{options}
pair_coeff * * {elements} NULL
compute e all pe/atom
compute u all hlgauss/atom {fields}
compute p all pressure NULL virial
compute s all stress/atom NULL virial
compute c all {centroid}stress/atom NULL virial
thermo_style custom step pe c_p[1] c_p[2] c_p[3] c_p[4] c_p[5] c_p[6]
run 0
write_dump all custom {out}.dump id fx fy fz c_e c_u[*] c_s[*] c_c[*] modify format float %.17g
print "{numbers}" file {out}.thermo
"""
NUMBERS = " ".join(
    f"$({name}:%.17g)" for name in ["pe", "vol", *(f"c_p[{k}]" for k in range(1, 7))]
)


def case(model, name, way, ranks):
    """Commands that evaluate one system with one model and write every result."""
    side = "s" if name == "shrink_wrapped" else "f"
    return CASE.format(
        boundary=" ".join("p" if p else side for p in SYSTEMS[name].periodic),
        name=name,
        model=model,
        options=WAYS[way],
        centroid="centroid/" if model in STRICTLY_LOCAL else "",
        elements=" ".join(SYMBOLS),
        fields=" ".join(fields_of(model)),
        out=f"{model}.{name}.{way}.{ranks}",
        numbers=NUMBERS,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_models):
    """Models and structures."""
    path = tmp_path_factory.mktemp("agreement")
    for name, compiled in compiled_models.items():
        shutil.copy(compiled, path / f"{name}.pt2")
    for name, potential in MODELS.items():
        export_potential(potential, SYMBOLS, make_card(), path / f"{name}.pt")
    for name, atoms in SYSTEMS.items():
        atoms.write(path / f"{name}.data")
    return path


@pytest.fixture(scope="module")
def calculators(folder):
    """Model name -> calculator."""
    return {name: HLCalculator(folder / f"{name}.pt") for name in MODELS}


@functools.cache
def run_cases(folder, num_ranks, slow=False):
    """Runs every case in one LAMMPS process on this many ranks."""
    cases = cases_of(num_ranks) + GPU_CASES * torch.cuda.is_available()
    if slow:
        cases = SLOW_CASES
    script = "".join(case(*one, num_ranks) for one in cases)
    result = run_lammps(script, folder, num_ranks)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def python_results(calculator, atoms):
    """What the calculator says, and the virial in LAMMPS's sign and order, eV."""
    calculator.calculate(structure(atoms))
    results = calculator.results
    if all(atoms.periodic):
        virial = -np.linalg.det(atoms.cell) * voigt_6_to_full_3x3_stress(results["stress"])
    else:
        virial = atoms.positions.T @ results["forces"]  # nothing crosses the boundary
    return results, virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]


def atomic_virials(model, atoms):
    """Half of each edge to either end, (num_atoms, 6), and each edge to its neighbour, (.., 9)."""
    inputs = graph_inputs(
        structure(atoms), list(SYMBOLS), model.cutoff, model.num_layers, model.dtype
    )
    gradients = model.evaluate(inputs)[keys.EDGE_GRADIENTS].double()
    w = -(inputs[keys.EDGE_VECTORS].double().unsqueeze(2) * gradients.unsqueeze(1))
    half = 0.25 * (w + w.transpose(1, 2)).flatten(1)[:, [0, 4, 8, 1, 2, 5]]
    centers, neighbors = inputs[keys.EDGE_INDEX]
    zeros = torch.zeros(len(atoms.species), 9, dtype=torch.float64)
    shared = zeros[:, :6].index_add(0, centers, half).index_add(0, neighbors, half)
    to_neighbor = zeros.index_add(0, neighbors, w.flatten(1)[:, [0, 4, 8, 1, 2, 5, 3, 6, 7]])
    return shared.numpy(), to_neighbor.numpy()


@pytest.mark.parametrize(
    ("ranks", "model", "name", "way"),
    [
        pytest.param(n, *one, id=f"{n}-{'-'.join(one)}", marks=no_gpu if one in GPU_CASES else ())
        for n in RANKS
        for one in cases_of(n) + GPU_CASES
    ],
)
def test_lammps_equals_python(folder, calculators, ranks, model, name, way):
    run_cases(folder, ranks)
    compare(folder, calculators, ranks, model, name, way)


@pytest.fixture(scope="module")
def compiled_ensembles(folder):
    """The ensembles as hl.pt2, in the folder."""
    for name in ("ensemble_local", "ensemble_mp"):
        export_compiled(MODELS[name], SYMBOLS, make_card(), folder / f"{name}.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_ensembles_in_lammps_equal_python(folder, calculators, compiled_ensembles, ranks):
    run_cases(folder, ranks, slow=True)
    for case_ in SLOW_CASES:
        compare(folder, calculators, ranks, *case_)


def compare(folder, calculators, ranks, model, name, way):
    """Every number of a case that was run."""
    atoms = SYSTEMS[name]
    want, virial = python_results(calculators[model], atoms)
    rows = read_dump(folder / f"{model}.{name}.{way}.{ranks}.dump")
    energy, volume, *pressure = np.loadtxt(folder / f"{model}.{name}.{way}.{ranks}.thermo")
    assert rows[:, 0].tolist() == list(range(1, len(atoms.species) + 1))
    tolerance = FLOAT32 if model == "float32" else FLOAT64

    def close(got, expected, what):
        expected = np.asarray(expected)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale, err_msg=what)

    close(energy, want["energy"], "energy")
    close(rows[:, 1:4], want["forces"], "forces")
    close(rows[:, 4], want["energies"], "energy of each atom")
    close(np.array(pressure) * volume / BAR_PER_EV_A3, virial, "virial")
    fields = fields_of(model)
    for column, field in enumerate(fields, start=5):
        close(rows[:, column], want["energies" if field == keys.ENERGY else field], field)
    shared, to_neighbor = atomic_virials(calculators[model].model, atoms)
    stresses = -rows[:, 5 + len(fields) :] / BAR_PER_EV_A3
    close(stresses[:, :6], shared, "virial of each atom")
    if model in STRICTLY_LOCAL:
        close(stresses[:, 6:], to_neighbor, "centroid virial of each atom")


@pytest.mark.parametrize("model", MODELS)
def test_results_compared_differ_from_atom_to_atom(calculators, model):
    atoms = SYSTEMS["triclinic"]
    results, virial = python_results(calculators[model], atoms)
    assert np.abs(results["forces"]).max() > 0.1 and np.abs(virial).min() > 0.01
    for field in ("energies", *fields_of(model)[1:]):
        for element in (0, 1):
            values = results[field][atoms.species == element]
            assert values.std() > 0.01 * np.abs(values).mean() > 0, (field, element)


def test_neighbours_of_neighbours_matter_to_the_second_layer_only(calculators):
    atoms = SYSTEMS["large"]
    distances = np.linalg.norm(atoms.positions - atoms.positions[62], axis=1)
    far = int(np.argmin(np.where(distances > 4.6, distances, np.inf)))  # cutoff 4 Å, move 0.3 Å
    moved = Atoms(atoms.positions.copy(), atoms.species, atoms.cell)
    moved.positions[far] += 0.3 * (moved.positions[far] - moved.positions[62]) / distances[far]
    assert distances[far] < 8.0
    for model, changes in (("local", False), ("mp", True)):
        before, _ = python_results(calculators[model], atoms)
        before = before["energies"][62]
        after, _ = python_results(calculators[model], moved)
        assert (abs(after["energies"][62] - before) > 1e-9) == changes


TRAJECTORY = """
units metal
read_data large.data
pair_style mliap model mp.pt
pair_coeff * * {elements} NULL
velocity all create 600 5
fix nve all nve
timestep 0.0002
compute u all hlgauss/atom entropy force_std
fix traj all hlgauss/h5md 5 traj.h5md id type x v f c_u[1] c_u[2] precision double
run 10
"""


@pytest.fixture(scope="module")
def trajectory_file(folder):
    """Three frames of dynamics on two ranks."""
    result = run_lammps(TRAJECTORY.format(elements=" ".join(SYMBOLS)), folder, 2)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    return folder / "traj.h5md"


def test_trajectory_holds_the_fields_of_python_by_name_and_unit(trajectory_file, calculators):
    calculator = calculators["mp"]
    with open_trajectory(trajectory_file) as trajectory:
        assert trajectory.steps.tolist() == [0, 5, 10]
        assert {"entropy", "force_std"} <= set(trajectory.fields)
        assert trajectory.units["entropy"] == "nat"
        assert trajectory.units["force_std"] == "eV Angstrom-1"  # H5MD writes no slashes
        for k in range(len(trajectory)):
            frame, atoms = trajectory[k], trajectory.to_ase(k)
            calculator.calculate(atoms)
            for name in ("entropy", "force_std"):
                expected = calculator.results[name]
                np.testing.assert_allclose(frame[name], expected, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(
                atoms.get_forces(), calculator.results["forces"], rtol=1e-9, atol=1e-9
            )
        assert np.ptp(trajectory.values("entropy"), axis=0).max() > 1e-6  # the frames differ


def test_trajectory_opens_in_mdanalysis_with_the_fields(trajectory_file):
    mda = pytest.importorskip("MDAnalysis")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses masses and charges, which nobody asked for
        universe = mda.Universe(str(trajectory_file))
    with open_trajectory(trajectory_file) as trajectory:
        for frame, ts in zip(trajectory, universe.trajectory, strict=True):
            for name in ("entropy", "force_std"):
                np.testing.assert_array_equal(ts.data[name], frame[name])


def test_trajectory_carries_the_model_card(trajectory_file, calculators):
    with open_trajectory(trajectory_file) as trajectory:
        (run,) = trajectory.runs
        assert json.loads(run["model_card"]) == calculators["mp"].model.card
        ranking = make_card()["calibration"]["ranking"]
        assert validation_ranking(trajectory) == ranking
        assert next(iter(validation_ranking(trajectory))) == max(ranking, key=ranking.get)
