"""Evaluation with a pair potential whose errors and uncertainties are known."""

import csv
import json
import sys
import types
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.io import write
from rich.console import Console
from scipy.stats import chi2

import lmp_hl
from lmp_hl import cli, evaluate, keys
from lmp_hl.report import with_constants

CUTOFF = 5.0


FIELDS = ("force_std", "distance", "force_bound", "mean_variance_energy_std")


@dataclass
class PairModel:
    """Lennard-Jones as a model file: force_std grows with the distance to the nearest neighbour."""

    elements: list = field(default_factory=lambda: ["Ar"])
    cutoff: float = CUTOFF
    num_layers: int = 1
    dtype: str = "float64"
    card: dict = field(default_factory=lambda: {"conformal": {"coverage": 0.9}})
    fields: list = field(default_factory=lambda: ["energy", *FIELDS])
    field_units: list = field(
        default_factory=lambda: ["eV", "eV/Angstrom", "1", "eV/Angstrom", "eV"]
    )

    def evaluate(self, inputs, with_fields):
        vectors = inputs[keys.EDGE_VECTORS].clone().requires_grad_(True)
        center = inputs[keys.EDGE_INDEX][0]
        num_atoms = len(inputs[keys.SPECIES])
        d = vectors.norm(dim=1)

        def pair(r):
            return 4 * 0.1 * ((2.5 / r) ** 12 - (2.5 / r) ** 6)

        shifted = 0.5 * (pair(d) - pair(torch.tensor(CUTOFF, dtype=d.dtype)))
        energy = torch.zeros(num_atoms, dtype=torch.float64).index_add(0, center, shifted)
        (gradients,) = torch.autograd.grad(energy.sum(), vectors)
        nearest = torch.full((num_atoms,), CUTOFF, dtype=d.dtype)
        nearest = nearest.scatter_reduce(0, center, d.detach(), "amin")
        std = 0.02 * torch.exp(4 * (nearest - 2.5))
        return {
            keys.ENERGY: energy.detach(),
            keys.EDGE_GRADIENTS: gradients,
            keys.FORCE_STD: std,
            keys.DISTANCE: torch.ones_like(std),
            "force_bound": 1.5 * std,
            FIELDS[3]: torch.full_like(std, 0.002),
        }


@dataclass
class Labelled:
    """A frame as lmp_hl.training.frames makes them."""

    atoms: object
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None = None
    config_type: str = ""
    source: str = "memory: frame 0"

    def __getattr__(self, name):
        return getattr(self.atoms, name)


def crystal(rng, stretch=1.0, rattle=0.1):
    atoms = bulk("Ar", "fcc", a=3.8 * stretch, cubic=True) * (2, 2, 2)
    shear = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.3, 0]])
    atoms.set_cell(atoms.cell.array + shear, scale_atoms=True)
    atoms.positions += rng.normal(0, rattle, (len(atoms), 3))
    return atoms


def noisy_frames(rng, num_frames, stretch=1.0, config_type=""):
    """Frames whose labels differ from the model by Gaussians of the size the model predicts."""
    model, frames = PairModel(), []
    for _ in range(num_frames):
        atoms = crystal(rng, stretch)
        exact = Labelled(atoms, 0.0, np.zeros((len(atoms), 3)))
        p = evaluate.predict(model, [exact])
        noise = rng.normal(0, p.fields["force_std"][:, None], (len(atoms), 3))
        energy = p.energy[0] + 0.002 * len(atoms)
        frames.append(Labelled(atoms, energy, p.forces + noise, None, config_type))
    return frames


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    model = PairModel()
    seen = [*noisy_frames(rng, 8, 1.0, "cold"), *noisy_frames(rng, 4, 1.01, "warm")]
    return (
        evaluate.predict(model, noisy_frames(rng, 10, 1.1)),
        evaluate.predict(model, seen),
    )


@pytest.fixture(scope="module")
def report(sets):
    return evaluate.report(*sets, num_resamples=100)


def test_energy_forces_and_stress_of_a_triclinic_cell_equal_ase():
    atoms = crystal(np.random.default_rng(1))
    atoms.calc = LennardJones(sigma=2.5, epsilon=0.1, rc=CUTOFF)
    true = Labelled(
        atoms, atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
    )
    p = evaluate.predict(PairModel(), [true])
    # two float64 sums over the same pairs in another order
    np.testing.assert_allclose(p.energy, p.energy_true, rtol=1e-12)
    np.testing.assert_allclose(p.forces, p.forces_true, atol=1e-11)
    np.testing.assert_allclose(p.stress, p.stress_true, atol=1e-13)
    numbers = evaluate.report(p, num_resamples=2)["sets"]["data"]
    assert numbers["stress_rmse_meV_per_Angstrom3"]["value"] < 1e-9


def test_forces_are_minus_the_gradient_of_the_energy():
    atoms = crystal(np.random.default_rng(2))
    labels = (0.0, np.zeros((len(atoms), 3)))
    forces = evaluate.predict(PairModel(), [Labelled(atoms, *labels)]).forces
    step, energies = 1e-5, []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[3, 1] += sign * step
        energies.append(evaluate.predict(PairModel(), [Labelled(moved, *labels)]).energy[0])
    # central differences: error step² times the third derivative, and rounding 1e-15/step
    assert forces[3, 1] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-7)


def test_known_errors_come_back_in_their_units(sets, report):
    held_out = report["sets"]["held out"]
    assert held_out["energy_rmse_meV_per_atom"]["value"] == pytest.approx(2.0)
    direct = 1e3 * np.sqrt(((sets[0].forces - sets[0].forces_true) ** 2).mean())
    assert held_out["forces_rmse_meV_per_Angstrom"]["value"] == pytest.approx(direct)
    assert held_out["by_element"]["Ar"]["num_atoms"] == held_out["num_atoms"] == 320
    seen = report["sets"]["seen"]["by_config_type"]
    assert {k: v["num_atoms"] for k, v in seen.items()} == {"cold": 256, "warm": 128}


def test_errors_as_large_as_predicted_have_size_ratio_one(report):
    for numbers in report["sets"].values():
        ratio = numbers["calibration"]["force_std"]["size_ratio"]
        # about 1000 components of unequal size: relative error of their rms below 5 %, three times
        assert ratio["value"] == pytest.approx(1, abs=0.15)
        assert ratio["low"] < ratio["value"] < ratio["high"]
        covered = numbers["calibration"]["force_std"]["coverage"]["0.6827"]
        assert covered == pytest.approx(0.6827, abs=0.06)  # 4 sqrt(0.68 0.32 / 960)


def test_force_std_ranks_and_its_monotone_control_ranks_alike(report):
    pooled = report["ranking"]["held out"]["pooled"]
    assert pooled["force_std"]["value"] > 0.3
    # the fake field is a monotone function of this control: no lead, on any draw
    assert pooled["neighbor_distance"]["value"] == pytest.approx(pooled["force_std"]["value"])
    assert pooled["force_std"]["over_best_control"]["high"] <= 1e-12
    assert pooled["distance"]["value"] == 0.0
    assert report["best_field"]["pooled"] == "force_std"


def test_controls_take_the_sign_that_favours_them(report):
    for ranking in report["ranking"].values():
        for scores in ranking.values():
            assert all(scores[c]["value"] >= 0 for c in report["controls"])
    assert report["ranking"]["held out"]["pooled"]["coordination"]["sign"] == -1


def test_a_size_that_is_right_near_and_far_grows_as_the_error_does(report):
    # sizes of 1000 components on either side: relative error of the ratio below 5 %, three times
    assert report["growth"]["force_std"]["value"] == pytest.approx(1, abs=0.15)
    held_out, seen = (report["sets"][n]["forces_rmse_meV_per_Angstrom"] for n in report["sets"])
    # a constant does not grow at all
    expected = seen["value"] / held_out["value"]
    assert report["growth"]["element_error"]["value"] == pytest.approx(expected)
    for numbers in report["sets"].values():
        right, constant = (numbers["calibration"][n] for n in ("force_std", "element_error"))
        assert right["reliability_slope"]["value"] == pytest.approx(1, abs=0.25)
        assert right["miscalibration_area"]["value"] < 0.05
        for score in ("gaussian_nll_nats", "energy_score_meV_per_Angstrom"):
            assert right[score]["value"] < constant[score]["value"]
        assert set(evaluate.CALIBRATION) <= set(right)


def test_large_errors_and_frames_are_found_and_every_score_is_explained(report):
    ranking = report["ranking"]["held out"]
    assert ranking["large_error"]["force_std"]["value"] > 0.6
    assert 0.2 < ranking["risk_coverage"]["force_std"]["value"] < 1
    assert ranking["risk_coverage"]["distance"]["value"] == pytest.approx(0, abs=1e-12)
    assert {*evaluate.CALIBRATION, "growth", *ranking, "auroc_mean"} <= set(evaluate.MEANINGS)
    assert set(report["best_field"]) == {*ranking, "auroc_mean", "auroc_max"}


def test_bounds_and_energy_sizes_are_held_against_what_they_claim(report):
    for numbers in report["sets"].values():
        # chi² of 3 components below 3 · 1.5² with probability 0.92, 320 atoms at least: ±4 sigma
        covered = numbers["promises"]["errors_within_force_bound"]["value"]
        assert covered == pytest.approx(chi2.cdf(3 * 1.5**2, 3), abs=0.06)
        assert "force_bound" not in numbers["calibration"]
        # 2 meV per atom, right for one atom, is sqrt(32) of the true 2 meV per atom of all
        energy = numbers["energy_calibration"]["mean_variance_energy_std"]["size_ratio"]["value"]
        assert energy == pytest.approx(1 / np.sqrt(32))


def test_constants_of_elements_and_sites_come_from_the_seen_frames():
    def predictions(errors, numbers):
        forces = np.asarray(errors, dtype=float)[..., None].repeat(3, axis=-1).reshape(-1, 3)
        num_frames, num_atoms = np.shape(errors)
        one = np.ones(num_frames)
        return evaluate.Predictions(
            np.full(num_frames, num_atoms), np.full(num_frames, "(none)"), one, one,
            np.full((num_frames, 3, 3), np.nan), np.full((num_frames, 3, 3), np.nan),
            np.repeat(np.arange(num_frames), num_atoms), np.tile(numbers, num_frames),
            np.zeros_like(forces), forces, {}, {}, {},
        )  # fmt: skip

    seen = predictions([[1, 2, 3], [1, 4, 3]], [1, 1, 6])
    far = predictions([[9, 9, 9], [8, 8, 8]], [1, 1, 6])
    controls = with_constants(far, seen).controls
    hydrogen = np.sqrt((1 + 4 + 1 + 16) / 4)
    np.testing.assert_allclose(controls["element_error"], [hydrogen, hydrogen, 3] * 2)
    np.testing.assert_allclose(controls["site_error"], [1, np.sqrt(10), 3] * 2)
    # an element that was never seen gets the error of all atoms; other molecules have other sites
    other = with_constants(predictions([[9, 9, 9], [9, 9, 9]], [1, 6, 8]), seen).controls
    assert other["element_error"][2] == pytest.approx(np.sqrt((1 + 4 + 9 + 1 + 16 + 9) / 6))
    assert "site_error" not in other


def test_stretched_frames_separate_from_seen_ones(report):
    for how in ("mean", "max"):
        assert report["separation"][how]["force_std"]["value"] > 0.95
        assert report["separation"][how]["distance"]["value"] == 0.5


def test_groups_follow_element_config_type_and_site(sets):
    held_out, seen = sets
    assert set(held_out.groups()) == {"pooled", "within_element"}
    assert set(seen.groups()) == {"pooled", "within_element", "within_config_type"}


def test_per_frame_mean_and_max(sets):
    values = sets[0].fields["force_std"].reshape(10, 32)
    flat = values.ravel()
    np.testing.assert_allclose(sets[0].per_frame(flat, "mean"), values.mean(1))
    np.testing.assert_allclose(sets[0].per_frame(flat, "max"), values.max(1))
    p = replace(sets[0], num_atoms=np.array([3, 7, 310]))
    assert len(np.unique(p.per_frame(np.full(320, 0.1), "mean"))) == 1


def test_coordination_counts_the_first_shell():
    atoms = bulk("Si", "diamond", a=5.43, cubic=True)
    numbers = np.full(8, 14)
    center, neighbor, distance = _neighbors(atoms, 5.0)
    smooth, count = evaluate.coordination(numbers, np.stack([center, neighbor]), distance)
    np.testing.assert_array_equal(count, 4)
    np.testing.assert_allclose(smooth, 4, atol=0.3)


def _neighbors(atoms, cutoff):
    from ase.neighborlist import neighbor_list

    return neighbor_list("ijd", atoms, cutoff)


def test_report_is_json_and_prints_the_best_field(report, tmp_path):
    evaluate.write_json(tmp_path / "r.json", report)
    assert json.loads((tmp_path / "r.json").read_text())["best_field"]["pooled"] == "force_std"
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    evaluate.print_report(report, console)
    text = console.export_text()
    assert "neighbor_distance (control)" in text
    assert [line for line in text.splitlines() if "force_std" in line and "▸" in line]


def test_csv_has_one_line_per_atom(sets, tmp_path):
    evaluate.write_csv(tmp_path / "atoms.csv", {"held out": sets[0], "seen": sets[1]})
    with open(tmp_path / "atoms.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 320 + 384
    assert rows[-1]["set"] == "seen" and rows[-1]["frame"] == "11" and rows[-1]["atom"] == "31"
    assert float(rows[5]["force_error"]) == pytest.approx(sets[0].error[5])


def test_figures_are_written(sets, report, tmp_path):
    paths = evaluate.write_figures(tmp_path / "f", {"held out": sets[0], "seen": sets[1]}, report)
    assert [p.name for p in paths] == [
        "parity.png",
        *(f"error_{n}.png" for n in FIELDS),
        "rankings.png",
    ]  # fmt: skip
    assert all(p.stat().st_size > 10_000 for p in paths)


def test_run_reads_files_and_writes_what_was_asked_for(monkeypatch, tmp_path, capsys):
    model_file = types.ModuleType("lmp_hl.model_file")
    model_file.load = lambda path: PairModel()
    monkeypatch.setitem(sys.modules, "lmp_hl.model_file", model_file)
    monkeypatch.setattr(lmp_hl, "model_file", model_file, raising=False)
    rng = np.random.default_rng(4)
    files = {}
    for name, stretch in (("held_out", 1.1), ("seen", 1.0)):
        files[name] = str(tmp_path / f"{name}.xyz")
        for frame in noisy_frames(rng, 3, stretch):
            frame.atoms.info["REF_energy"] = frame.energy
            frame.atoms.arrays["REF_forces"] = frame.forces
            write(files[name], frame.atoms, append=True)
    words = ["evaluate", "hl.pt", files["held_out"], "--seen", files["seen"]]
    assert cli.main(words) == 2
    assert "no energy 'energy'" in capsys.readouterr().err
    words += ["--energy-key", "REF_energy", "--forces-key", "REF_forces"]
    outputs = {k: tmp_path / k for k in ("json", "csv", "figures")}
    words += [w for k, path in outputs.items() for w in (f"--{k}", str(path))]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "AUROC" in printed and "errors within force bound" in printed
    assert "promised for frames like the validation frames: 90%" in printed
    numbers = json.loads(outputs["json"].read_text())
    assert numbers["files"] == {"held out": files["held_out"], "seen": files["seen"]}
    assert numbers["sets"]["seen"]["energy_rmse_meV_per_atom"]["value"] == pytest.approx(2.0)
    assert len(outputs["csv"].read_text().splitlines()) == 1 + 6 * 32
    assert len(list(outputs["figures"].iterdir())) == 6


def test_no_frames_and_broken_fields_are_refused():
    with pytest.raises(ValueError, match=r"x\.xyz: no frames"):
        evaluate.predict(PairModel(), [], "x.xyz")

    class Broken(PairModel):
        def evaluate(self, inputs, with_fields):
            out = super().evaluate(inputs, with_fields)
            return out | {keys.FORCE_STD: out[keys.FORCE_STD] * float("nan")}

    atoms = crystal(np.random.default_rng(3))
    frame = Labelled(atoms, 0.0, np.zeros((len(atoms), 3)), source="x.xyz: frame 7")
    with pytest.raises(ValueError, match=r"x\.xyz: frame 7: the model's force_std is not finite"):
        evaluate.predict(Broken(), [frame])
