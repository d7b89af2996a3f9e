"""What benchmarks/front.py computes rather than measures."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from scipy.spatial.transform import Rotation

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MLEARN = BENCHMARKS.parents[1] / "shared" / "data" / "mlearn"


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark script as a module, by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def labelled(atoms, energy, rng, stress=True):
    results = {"energy": energy, "forces": rng.normal(size=(len(atoms), 3))}
    if stress:
        results["stress"] = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def row_of(rows, full):
    return next(row for row in rows.ROWS if row.full == full)


# rows -------------------------------------------------------------------------------------------
def test_patterns_choose_rows_by_any_part_of_their_name(benchmark):
    front, rows = benchmark("front"), benchmark("front_rows")
    assert len({row.full for row in rows.ROWS}) == len(rows.ROWS)
    assert front.select(["*"]) == list(rows.ROWS)
    chosen = [row.full for row in front.select(["Cu/snap", "Mo/mace*/eager"])]
    assert chosen == ["Cu/snap/lammps", "Mo/mace-64x0e/eager"]
    assert front.select(["no such row"]) == []


def test_every_runtime_of_a_row_has_a_file_of_its_own(benchmark):
    rows, makers = benchmark("front_rows"), benchmark("front_peers").MAKERS
    for potential in rows.POTENTIALS.values():
        if potential.maker != "lammps":
            files = [makers[potential.maker].files[runtime] for runtime in potential.runtimes]
            assert len(set(files)) == len(files)


def test_timed_crystals_are_the_ones_lammps_would_fill_and_wider_than_twice_the_cutoff(benchmark):
    rows, evaluate = benchmark("front_rows"), benchmark("front_evaluate")
    for element, crystal in rows.CRYSTALS.items():
        atoms = evaluate.crystal_atoms(element, crystal)
        assert len(atoms) == crystal.num_atoms and abs(len(atoms) / 864 - 1) < 0.1
        assert min(atoms.cell.lengths()) > 2 * rows.CUTOFF


# data -------------------------------------------------------------------------------------------
def test_test_energies_that_were_trained_on_are_found(benchmark):
    known = benchmark("front_data").known_energy
    rng = np.random.default_rng(0)
    two, three = Atoms("Cu2"), Atoms("Cu3")
    train = [labelled(two.copy(), -7.0, rng), labelled(three.copy(), -9.0, rng)]
    test = [(two, -7.0 + 1e-8), (two, -9.0), (three, -9.001), (three, -9.0)]
    found = known([labelled(a.copy(), energy, rng) for a, energy in test], train)
    assert found.tolist() == [True, False, False, True]


@pytest.mark.skipif(not MLEARN.is_dir(), reason=f"{MLEARN} is not here")
def test_three_strained_silicon_test_frames_were_trained_on(benchmark):
    known = benchmark("front_data").known_energy
    test = read(MLEARN / "Si" / "test.xyz", ":")
    found = known(test, read(MLEARN / "Si" / "train.xyz", ":"))
    assert found.sum() == 3 and len(test) == 25
    assert {test[k].info["config_type"] for k in np.flatnonzero(found)} == {"Elastic"}


def test_pilot_takes_few_frames_of_every_part(benchmark):
    pilot = benchmark("front_data").pilot
    frames = [Atoms(f"Cu{n}") for n in [108] * 50 + [8] * 50]
    few = pilot(frames, 1000)
    assert 1000 <= sum(map(len, few)) < 2000
    assert {len(a) for a in few} == {8, 108}
    assert pilot(frames[:3], 1000) == frames[:3]


def test_deepmd_systems_hold_the_labels_with_virials_and_atoms_of_one_kind_together(
    benchmark, tmp_path
):
    rng = np.random.default_rng(0)
    first = labelled(Atoms("SiOSi", rng.normal(size=(3, 3)), cell=[4, 5, 6]), -1.0, rng)
    second = labelled(Atoms("Si2O", rng.normal(size=(3, 3)), cell=[4, 4, 4]), -2.0, rng)
    bare = labelled(Atoms("Si2O", rng.normal(size=(3, 3)), cell=[4, 4, 4]), -3.0, rng, False)
    folders = benchmark("front_data").write_deepmd([first, bare, second], tmp_path)
    assert len(folders) == 2
    found = {}
    for folder in map(Path, folders):
        assert (folder / "type_map.raw").read_text().split() == ["O", "Si"]
        assert (folder / "type.raw").read_text().split() == ["0", "1", "1"]
        arrays = {p.stem: np.load(p) for p in (folder / "set.000").glob("*.npy")}
        for k, energy in enumerate(arrays["energy"][:, 0]):
            found[energy] = {name: values[k] for name, values in arrays.items()}
    assert sorted(found) == [-3.0, -2.0, -1.0] and "virial" not in found[-3.0]
    order = [1, 0, 2]
    np.testing.assert_array_equal(found[-1.0]["force"], first.get_forces()[order].ravel())
    np.testing.assert_array_equal(found[-1.0]["coord"], first.positions[order].ravel())
    # dE = -tr(virial strain): the virial is minus the derivative, the stress is it over the volume
    np.testing.assert_allclose(
        found[-1.0]["virial"], -120 * first.get_stress(voigt=False).ravel(), rtol=1e-12
    )


# budget -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_epoch", [0.05, 3.0, 40.0])
def test_speed_is_found_with_pilots_long_enough_to_tell(benchmark, per_epoch):
    training = benchmark("front_training")
    asked = []

    def seconds(epochs):
        asked.append(epochs)
        return (112.0 if len(asked) == 1 else 12.0) + per_epoch * epochs  # the first compiles

    startup, found = training.speed(seconds)
    assert startup == pytest.approx(112.0) and found == pytest.approx(per_epoch)
    assert (asked[-1] - 1) * per_epoch >= training.PILOT_SECONDS
    assert asked[:3] == [1, 1, 4] and len(asked) <= 5
    assert len(asked) == 3 or (asked[-2] - 1) * per_epoch < training.PILOT_SECONDS


def test_as_many_epochs_as_fit_and_at_least_one(benchmark):
    within = benchmark("front_training").epochs_within
    assert within(5, startup=20.0, per_epoch=28.0) == 10
    assert within(5, startup=20.0, per_epoch=28.1) == 9
    assert within(5, startup=20.0, per_epoch=1000.0) == 1
    assert within(5, startup=400.0, per_epoch=1.0) == 1


# processes --------------------------------------------------------------------------------------
def test_memory_is_that_of_the_command_and_not_of_its_parent(benchmark, tmp_path):
    run = benchmark("front_process").run
    taken = np.ones(200 * 2**17)  # 200 MiB here
    small = run([sys.executable, "-S", "-c", "print('done')"], tmp_path)
    large = run([sys.executable, "-S", "-c", "x = bytearray(100 * 2**20)"], tmp_path)
    assert taken.nbytes == 200 * 2**20
    assert small.output == "done\n" and small.cpu > 0
    assert 1 < small.peak < 60 and 100 < large.peak - small.peak + 5 < 120


def test_a_command_that_fails_or_is_stopped_says_so(benchmark, tmp_path):
    run = benchmark("front_process").run
    code = "import sys; print('first'); sys.exit('Error: no model'); print('last')"
    with pytest.raises(ValueError, match="failed: Error: no model"):
        run([sys.executable, "-S", "-c", code], tmp_path)
    with pytest.raises(ValueError, match="failed: the last line"):
        run([sys.executable, "-S", "-c", "print('the last line'); raise SystemExit(3)"], tmp_path)
    code = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    with pytest.raises(ValueError, match="was stopped"):
        run([sys.executable, "-S", "-c", code], tmp_path)


def test_times_of_every_run_are_the_processors_per_atom_and_step(benchmark):
    times_of_runs = benchmark("front_lammps").times_of_runs
    loop = "Loop time of {} on 1 procs for {} steps with 500 atoms\n\n{}% CPU use with 1 MPI tasks"
    output = "\n".join([loop.format(2.0, 10, 100.0), "hello", loop.format(4.0, 20, 50.0)])
    np.testing.assert_allclose(times_of_runs(output, 2), [400.0, 200.0])
    with pytest.raises(ValueError, match="LAMMPS stopped: ERROR: Lost atoms"):
        times_of_runs(output + "\nERROR: Lost atoms\n", 3)
    with pytest.raises(ValueError, match="all atoms were lost"):
        times_of_runs(output.replace("with 500", "with 0"), 2)


def test_what_uncertainty_costs_is_the_median_of_the_pairs(benchmark):
    page = benchmark("cost").page
    snap = [benchmark("front_rows").POTENTIALS[name].about for name in ("snap", "qsnap")]
    # the machine slows down meanwhile: medians of each say 30 % more, every pair says 10 %
    pairs = [[t, 1.1 * t] for t in (50.0, 51.0, 52.0, 80.0, 81.0)]
    times = {"hl.pt": pairs, snap[0]: [[104.0]] * 5, snap[1]: [[80.0]] * 5}
    lines = page("Cu", times, benchmark("provenance").provenance()).splitlines()
    row = next(line for line in lines if line.startswith("| hl.pt "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["52.0 (51.0-80.0)", "0.50"]
    assert cells[4] == "1.100 [1.100, 1.100]"


# errors -----------------------------------------------------------------------------------------
def test_errors_leave_out_known_energies_and_missing_stresses(benchmark):
    errors = benchmark("front_evaluate").errors
    rng = np.random.default_rng(0)
    frames = [labelled(bulk("Cu", cubic=True), -1.0 * k, rng, stress=k != 2) for k in range(3)]
    predicted = {
        "energy": np.array([4e-3, -1.0 + 8e-3, 98.0]),
        "forces": np.concatenate([a.get_forces() for a in frames]) + 5e-3,
        "stress": np.array(
            [a.get_stress(voigt=False) + 2e-3 if k != 2 else np.ones((3, 3)) * 7
             for k, a in enumerate(frames)]
        ),
    }  # fmt: skip
    found = errors(predicted, frames, np.array([False, False, True]), num_resamples=50)
    assert (found["num_frames"], found["num_energies"]) == (3, 2)
    energy = found["energy_rmse_meV_per_atom"]  # of 1 and 2 meV/atom
    assert energy["value"] == pytest.approx(np.sqrt(2.5))
    assert energy["low"] == pytest.approx(1) and energy["high"] == pytest.approx(2)
    for name, value in (
        ("forces_rmse_meV_per_Angstrom", 5.0),
        ("stress_rmse_meV_per_Angstrom3", 2.0),
    ):
        assert found[name] == pytest.approx({"value": value, "low": value, "high": value})


def test_lammps_predictions_turn_with_the_frame_and_their_stress_is_the_strain_derivative(
    benchmark, tmp_path
):
    rows, evaluate = benchmark("front_rows"), benchmark("front_evaluate")
    subject = evaluate.subject_of(row_of(rows, "Cu/snap/lammps"), tmp_path, 1.0)
    atoms = bulk("Cu", a=3.6) * (2, 2, 1)  # a skew cell
    atoms.rattle(0.1, seed=0)
    turn = Rotation.from_rotvec([0.3, -1.2, 0.7]).as_matrix()
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.T)
    turned.positions = atoms.positions @ turn.T
    step, frames = 1e-4, [atoms, turned]
    for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        for sign in (step, -step):
            strain = np.eye(3)
            strain[i, j] += sign / 2
            strain[j, i] += sign / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            frames.append(strained)
    found = evaluate.predict(subject, frames)
    forces = found["forces"].reshape(len(frames), -1, 3)
    # LAMMPS writes box and positions with 16 digits, thermodynamic output as well
    assert found["energy"][1] == pytest.approx(found["energy"][0], abs=1e-8)
    np.testing.assert_allclose(forces[1], forces[0] @ turn.T, atol=1e-7)
    np.testing.assert_allclose(found["stress"][1], turn @ found["stress"][0] @ turn.T, atol=1e-8)
    slopes = (found["energy"][2::2] - found["energy"][3::2]) / (2 * step) / atoms.get_volume()
    voigt = found["stress"][0][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    np.testing.assert_allclose(voigt, slopes, atol=1e-6)  # differences: 1e-12 eV / 1e-4 / 40 Å³


def test_coefficients_of_a_published_potential_are_counted(benchmark, tmp_path):
    rows, evaluate = benchmark("front_rows"), benchmark("front_evaluate")
    for name, number in (("snap", 56), ("qsnap", 496)):
        subject = evaluate.subject_of(row_of(rows, f"Cu/{name}/lammps"), tmp_path, 1.0)
        assert evaluate.num_coefficients(subject.file) == number
        # an offset, and as many coefficients as lines
        lines = [x for x in subject.file.read_text().splitlines() if x and x[0] != "#"]
        assert len(lines) == 2 + number


# the whole --------------------------------------------------------------------------------------
def interval(value):
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def result(forces, **more):
    numbers = {"energy_rmse_meV_per_atom": 0.1, "stress_rmse_meV_per_Angstrom3": 0.2}
    numbers["forces_rmse_meV_per_Angstrom"] = 1.0
    errors = {name: interval(factor * forces) for name, factor in numbers.items()}
    errors |= {"num_frames": 31, "num_energies": 22}
    return {"errors": errors, "parameters": 1234, "hash": str(forces), **more}


def test_a_peer_that_fails_stands_with_its_reason_and_the_rest_goes_on(
    benchmark, monkeypatch, tmp_path
):
    front, rows, evaluate = benchmark("front"), benchmark("front_rows"), benchmark("front_evaluate")
    chosen = front.select(["Cu/mace", "Cu/snap", "Cu/deepmd"])
    trained, scored = [], []

    def environment(maker, _):
        if maker == "mace":
            raise ValueError("not installed: no matching distribution")

    def train(training, *_):
        trained.append(training)

    def score(row, *_):
        scored.append(row.full)
        if row.runtime == "compressed":
            raise ValueError("export failed: no operator")
        return result(50.0)

    monkeypatch.setattr(front, "environment", environment)
    monkeypatch.setattr(front, "train", train)
    monkeypatch.setattr(front, "write_split", lambda *_: tmp_path)
    monkeypatch.setattr(evaluate, "score", score)
    front.make(chosen, tmp_path, tmp_path, 5.0, 1, False)
    assert sorted(trained) == [("Cu", "deepmd"), ("Cu", "snap")]
    found = {row: front.stored(row, tmp_path, 5.0) for row in chosen}
    timings = {"rows": {"Cu/snap/lammps": [{"us": 100.0, "MiB": 30.0}]}}
    page = benchmark("front_tables").page("Cu", found, timings, 5.0)
    assert "- `mace-64x0e/torchscript`, `mace-64x0e/eager`: not installed: no matching" in page
    assert "- `deepmd/compressed`: export failed: no operator" in page
    assert "| frozen | LAMMPS | 5.00 [4.50, 5.50] | 50.0 [45.0, 55.0]" in page
    assert "22, without" not in page and "energies of 22 frames" in page
    # again: only what failed is tried again, and another budget is another table
    trained.clear(), scored.clear()
    front.make(chosen, tmp_path, tmp_path, 5.0, 1, False)
    assert ("Cu", "snap") not in trained and scored == ["Cu/deepmd/compressed"]
    snap = row_of(rows, "Cu/snap/lammps")
    assert front.stored(snap, tmp_path, 20.0) == {"failed": "not made"}
    # and what was made with other settings
    monkeypatch.setitem(snap.potential.settings, "suffix", ".other")
    assert front.stored(snap, tmp_path, 5.0) == {"failed": "made with other settings"}


def test_files_are_timed_in_turn_and_all_again_when_one_of_them_is_new(
    benchmark, monkeypatch, tmp_path
):
    front, rows, evaluate = benchmark("front"), benchmark("front_rows"), benchmark("front_evaluate")
    hashes = {"Cu/snap/lammps": "a", "Cu/qsnap/lammps": "b"}
    for name in hashes:
        row = row_of(rows, name)
        made = result(50.0, recipe=front.recipe((row.element, row.name)))
        front.write_json(front._path(row, tmp_path, 5.0), made)

    class Subject:
        def __init__(self, row, *_):
            self.name, self.hash = row.full, hashes[row.full]

    asked = []

    def measure(subject):
        asked.append(subject.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return 100.0 + len(asked), 31.0

    monkeypatch.setattr(evaluate, "subject_of", Subject)
    monkeypatch.setattr(evaluate, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        front.clock("Cu", tmp_path, 5.0, 2)
    kept = front.clock("Cu", tmp_path, 5.0, 2)
    assert asked == ["Cu/snap/lammps", "Cu/qsnap/lammps", "Cu/snap/lammps", *asked[:2]]
    assert [t["us"] for t in kept["rows"]["Cu/snap/lammps"]] == [101.0, 104.0]
    assert front.clock("Cu", tmp_path, 5.0, 2) == kept and len(asked) == 5
    hashes["Cu/qsnap/lammps"] = "c"
    front.clock("Cu", tmp_path, 5.0, 2)
    assert len(asked) == 9


def test_the_front_is_what_no_other_row_beats(benchmark):
    on_front = benchmark("front_tables").on_front
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (3.0, 5.0), "d": (4.0, 1.0), "e": (5.0, 2.0)}
    assert on_front(points) == {"a", "b", "d"}
    assert on_front({"a": (1.0, 1.0), "b": (1.0, 1.0)}) == {"a", "b"}
    # rounding of one network in two files
    assert on_front({"slow": (84.0, 63.4923), "fast": (66.0, 63.4925)}) == {"fast"}


def test_page_and_figure_have_ratios_of_medians_and_say_what_is_untrained(benchmark, tmp_path):
    rows, tables = benchmark("front_rows"), benchmark("front_tables")
    names = ("Cu/local-64/aoti", "Cu/snap/lammps", "Cu/mace-64x0e/eager")
    ours, snap, mace = (row_of(rows, name) for name in names)
    untrained = {"parameters": 9, "hash": "m", "epochs": 1, "cpu": 7.0}
    found = {ours: result(40.0, epochs=30, cpu=290.0), snap: result(80.0), mace: untrained}
    timings = {
        "rows": {
            ours.full: [{"us": us, "MiB": 300.0} for us in (50.0, 60.0, 90.0)],
            snap.full: [{"us": us, "MiB": 31.0} for us in (150.0, 120.0, 110.0)],
            mace.full: [{"us": 2000.0, "MiB": 900.0}, {"failed": "MACE ran out of memory"}],
        },
        "load": [1.0, 1.3],
    }
    written = tables.write_results("Cu", found, timings, 5.0, tmp_path)
    assert [path.name for path in written] == ["front_Cu.md", "front_Cu.json", "front_Cu.png"]
    page = written[0].read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 3
    assert (
        "**local, 64 channels, l = 3, HL-Gauss**" in lines[0] and "4.8 min, 30 epochs" in lines[0]
    )
    assert "| 60 (50-90) | 0.50 | 300 | 1,234 |" in lines[0]
    assert "**" not in lines[1] and "| 120 (110-150) | 1.00 | 31 |" in lines[1]
    assert "| - | - | - | 2000 (2000-2000) | 16.67 | 900 | 9 | untrained |" in lines[2]
    assert "- `mace-64x0e/eager`: not timed: MACE ran out of memory" in page
    assert json.loads(written[1].read_text())["rows"][ours.full]["cpu"] == 290.0
    # nothing was timed: a page without a figure
    nothing = tables.write_results("Cu", found, {"rows": {}}, 5.0, tmp_path / "none")
    assert [path.suffix for path in nothing] == [".md", ".json"]
