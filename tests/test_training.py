"""Training: a whole tiny run, exact resume, the switch to histograms, losses, bad input."""

import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from conftest import make_potential
from torch.utils.data import DataLoader

from lmp_hl import histogram, keys, model_file
from lmp_hl.calculator import HLCalculator
from lmp_hl.training import frames as fr
from lmp_hl.training import losses
from lmp_hl.training import train as train_module
from lmp_hl.training.checkpoint import CHECKPOINT_FORMAT, export_checkpoint, load_checkpoint
from lmp_hl.training.config import load_config
from lmp_hl.training.module import set_bin_width
from lmp_hl.training.notebook import Notebook, read_metrics
from lmp_hl.training.prediction import Prediction, predict
from lmp_hl.training.train import baseline_energies, initial_potential, train

EPOCHS, WARMUP = 4, 2


def emt_frames(number, seed, shift=None):
    """Rattled and strained copper-gold cells labelled by ASE's effective medium theory.

    Frame `shift[0]` gets an energy wrong by `shift[1]` eV per atom.
    """
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(number):
        atoms = bulk("Cu", a=3.8, cubic=True)
        atoms.symbols[: k % 3] = "Au"
        atoms.set_cell(atoms.cell * (1 + 0.04 * rng.uniform(-1, 1)), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.1, (4, 3))
        atoms.calc = EMT()
        energy, forces, stress = (
            atoms.get_potential_energy(),
            atoms.get_forces(),
            atoms.get_stress(),
        )
        if shift is not None and k == shift[0]:
            energy += shift[1] * len(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
        frames.append(atoms)
    return frames


def configure(folder, name="run", model=None, training=None, shift=None, **top):
    """Write data and a configuration of a tiny run into `folder`; returns the YAML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.xyz", emt_frames(8, 0, shift))
    write(folder / "valid.xyz", emt_frames(4, 1))
    content = {
        "name": name,
        "seed": 3,
        "data": {"train": "train.xyz", "valid": "valid.xyz"},
        "model": {
            "cutoff": 3.6,
            "channels": 4,
            "num_radial": 4,
            "hidden": 8,
            "num_bins": 32,
            "dtype": "float64",
            **(model or {}),
        },
        "training": {
            "epochs": EPOCHS,
            "warmup_epochs": WARMUP,
            "batch_size": 3,
            "accelerator": "cpu",
            "num_threads": 1,
            **(training or {}),
        },
        **top,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def quick_calibration(*_):
    """Calibration has its own tests; most runs here are compared before it."""
    return {"force_rmse": 1.0, "size_ratio": 1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(configuration, checkpoint) of an uninterrupted run, with calibration."""
    config = configure(tmp_path_factory.mktemp("finished"))
    return config, train(config)


def last_state(config):
    path = load_config(config).output_dir / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


def numbers(config):
    """metrics.csv without the time."""
    rows = read_metrics(load_config(config).output_dir / "metrics.csv")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# a run -------------------------------------------------------------------------------------------
def test_run_leaves_configuration_metrics_and_a_checkpoint_that_exports(finished, tmp_path):
    config, checkpoint = finished
    out = load_config(config).output_dir
    assert checkpoint == out / "model.ckpt"
    assert load_config(out / "config.yaml") == load_config(config)
    rows = read_metrics(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert rows[-1]["valid_forces_rmse"] < rows[0]["valid_forces_rmse"]

    path = export_checkpoint(checkpoint, tmp_path / "hl.pt")
    assert "Cu (63.546 u) Au" in model_file.describe(path)
    card = model_file.load(path).card
    assert card["training"]["train_frames"] == 8 and card["training"]["train_atoms"] == 32
    assert card["training"]["metrics"] == rows[-1]

    # the exported model has the errors that the last line of the log says
    calculator, squares, energies = HLCalculator(path), [], []
    for atoms in emt_frames(4, 1):
        moved = atoms.copy()
        moved.calc = calculator
        squares.append((moved.get_forces() - atoms.get_forces()) ** 2)
        energies.append((moved.get_potential_energy() - atoms.get_potential_energy()) / len(atoms))
    measured = (1e3 * np.sqrt(np.mean(squares)), 1e3 * np.sqrt(np.mean(np.square(energies))))
    logged = (rows[-1]["valid_forces_rmse"], rows[-1]["valid_energy_rmse"])
    assert measured == pytest.approx(logged, rel=1e-5)  # the log holds float32
    # and what was calibrated on these frames has their size
    assert card["calibration"]["validation_atoms"] == 16
    assert card["calibration"]["force_rmse"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6)
    assert np.median(calculator.results["distance"]) == pytest.approx(1.0, abs=0.5)


def test_histogram_is_on_after_the_warm_up_and_its_width_measured(finished):
    config, checkpoint = finished
    rows = numbers(config)
    assert ["train_outside" in row for row in rows] == [epoch >= WARMUP for epoch in range(EPOCHS)]
    assert all(row["train_outside"] == 0.0 for row in rows[WARMUP:])
    head = load_checkpoint(checkpoint)[0].energy_head
    assert 1e-4 < float(head.bin_width) < 0.5 and float(head.bin_width) != 1.0
    assert float(head.delta.weight.abs().max()) > 0  # its shape has been trained


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch):
    config = configure(tmp_path)
    with monkeypatch.context() as patch:
        original = Notebook.on_train_epoch_end

        def interrupt(self, trainer, module):
            original(self, trainer, module)
            if trainer.current_epoch == WARMUP:  # after the first epoch with a histogram
                raise KeyboardInterrupt

        patch.setattr(Notebook, "on_train_epoch_end", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(config)
    assert not (tmp_path / "runs" / "run" / "model.ckpt").exists()
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume"):
        train(config)
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    train(config, resume=True)
    resumed, whole = last_state(config), last_state(finished[0])
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert resumed["global_step"] == whole["global_step"] == 3 * EPOCHS
    assert numbers(config) == numbers(finished[0])


def test_run_stopped_while_it_calibrates_resumes_to_the_same_weights(
    finished, tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    config = configure(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    paths = (train(config, resume=True), finished[1])
    resumed, whole = (torch.load(path, weights_only=True)["state"] for path in paths)
    for name, value in whole.items():
        if not name.startswith("methods."):
            assert torch.equal(resumed[name], value), name


def test_scalar_twin_is_the_same_until_the_histogram_is_switched_on(
    finished, tmp_path, monkeypatch
):
    """Same seed, same weights, same steps: what differs later comes from the histogram alone."""
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    config = configure(tmp_path, model={"head": "scalar"})
    train(config)
    twin, histogram_run = numbers(config), numbers(finished[0])
    for name in ("train_loss", "train_forces_rmse", "valid_energy_rmse", "valid_forces_rmse"):
        before = [[row[name] for row in rows[:WARMUP]] for rows in (twin, histogram_run)]
        assert before[0] == pytest.approx(before[1], rel=1e-6), name
    # equal pull on the mean: the energies part slowly, the loss is another one
    losses_after = [rows[WARMUP]["train_loss"] for rows in (twin, histogram_run)]
    assert losses_after[0] != losses_after[1]


def test_resume_with_another_architecture_is_refused(finished):
    config, checkpoint = finished
    before = checkpoint.read_bytes()
    other = configure(
        config.parent / "other", model={"channels": 5}, output_dir=str(checkpoint.parent)
    )
    for file in ("train.xyz", "valid.xyz"):
        (other.parent / file).unlink()
    content = yaml.safe_load(other.read_text())
    content["data"] = yaml.safe_load((checkpoint.parent / "config.yaml").read_text())["data"]
    other.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"another 'model' than .*channels: 4 then, 5 now"):
        train(other, resume=True)
    assert checkpoint.read_bytes() == before


# checkpoints -------------------------------------------------------------------------------------
def test_checkpoints_that_are_none_are_refused(finished, tmp_path):
    path = tmp_path / "model.ckpt"
    with pytest.raises(ValueError, match="no such checkpoint; train one"):
        load_checkpoint(path)
    path.write_text("weights")
    with pytest.raises(ValueError, match="not a checkpoint that torch can read"):
        load_checkpoint(path)
    torch.save({"state": {}}, path)
    with pytest.raises(ValueError, match=r"not a finished model; wanted the model.ckpt"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=r"unfinished run, finish it with .*--resume"):
        load_checkpoint(finished[1].parent / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lmp_hl_checkpoint": CHECKPOINT_FORMAT + 1}, "newer than this lmp-hl.*update lmp-hl"),
        ({"model": {"channels": 5}}, "do not fit its own architecture"),
        ({"model": {"preset": "mp"}}, "do not fit its own architecture"),
        ({"elements": ["Cu"]}, "do not fit its own architecture"),
    ],
    ids=["newer", "channels", "preset", "elements"],
)
def test_checkpoints_that_do_not_fit_are_refused(finished, tmp_path, change, message):
    content = torch.load(finished[1], weights_only=True)
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    target = tmp_path / "hl.pt"
    target.write_text("what was there")
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        export_checkpoint(path, target)
    assert target.read_text() == "what was there"


# bins and losses ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Configuration, untrained potential and training graphs; frame 5 is wrong by 4 eV per atom."""
    config = load_config(configure(tmp_path_factory.mktemp("started"), shift=(5, 4.0)))
    splits = fr.load_splits(config.data, config.seed)
    baseline = baseline_energies(splits)
    graphs = train_module._graphs(config, splits, baseline, "train")
    torch.manual_seed(0)
    return initial_potential(config, splits.elements, baseline, graphs), graphs


def residuals(potential, graphs):
    """dE / N of each frame."""
    batch = fr.collate_graphs(list(graphs))
    prediction = predict(potential, batch, create_graph=False)
    return (batch[fr.TARGET_ENERGY] - prediction.energy.detach()) / batch[fr.NUM_ATOMS]


def test_measured_bin_width_leaves_twice_the_room_of_the_largest_residual(started):
    potential, graphs = started
    head = potential.energy_head
    expected = 2 * float(residuals(potential, graphs).abs().max()) / (16 - 4 * 0.75)
    loader = DataLoader(graphs, batch_size=3, collate_fn=fr.collate_graphs)
    set_bin_width(potential, loader, None, torch.device("cpu"))
    assert float(head.bin_width) == pytest.approx(expected, rel=1e-9)
    set_bin_width(potential, loader, 0.3, torch.device("cpu"))
    assert float(head.bin_width) == 0.3


def test_mislabelled_frame_far_outside_a_given_support_is_named(started):
    potential, graphs = started
    far = residuals(potential, graphs).abs()
    largest = far.sort().values[-2:]
    assert int(far.argmax()) == 5 and float(largest[1] - largest[0]) > 0.1
    width = float(largest.mean()) / 64  # four supports of 16 bins hold every frame but one
    potential.energy_head.set_bin_width(0.125)
    loader = DataLoader(graphs, batch_size=3, collate_fn=fr.collate_graphs)
    with pytest.raises(ValueError, match=r"targets of 1 frames lie far .*train.xyz: frame 5 by \+"):
        set_bin_width(potential, loader, width, torch.device("cpu"))
    assert float(potential.energy_head.bin_width) == 0.125


def test_run_stops_at_targets_far_outside_a_given_support(tmp_path):
    config = configure(tmp_path, model={"bin_width": 1e-6}, training={"warmup_epochs": 0})
    with pytest.raises(
        ValueError, match=r"far outside the histogram's support of .*train.xyz: frame"
    ):
        train(config)
    assert not (tmp_path / "runs" / "run" / "model.ckpt").exists()


def labelled_batch(potential, structure_factory, error):
    """Two frames whose energies are the potential's own plus `error` eV per atom."""
    from test_potential import inputs_of

    graphs = []
    for number, seed in ((4, 11), (7, 12)):
        atoms = structure_factory(["Si"], number, seed=seed)
        graph = inputs_of(potential, atoms)
        energy = potential.atoms(graph)[1].energy.double().sum()
        graphs.append(
            graph
            | {
                fr.NUM_ATOMS: torch.tensor([number]),
                fr.TARGET_ENERGY: (energy + error * number).reshape(1).detach(),
                fr.TARGET_FORCES: torch.zeros(number, 3, dtype=torch.float64),
                fr.TARGET_STRESS: torch.full((1, 3, 3), torch.nan, dtype=torch.float64),
                fr.VOLUME: torch.tensor([atoms.get_volume()]),
            }
        )
    return fr.collate_graphs(graphs)


def test_two_processes_share_a_run(tmp_path):
    """Each takes half of every epoch's frames; one of them writes."""
    path = configure(tmp_path, training={"devices": 2, "accelerator": "cpu"})
    command = [sys.executable, "-m", "lmp_hl.cli", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved ") == 1
    config = load_config(path)
    assert [row["epoch"] for row in read_metrics(config.output_dir / "metrics.csv")] == [0, 1, 2, 3]
    state = torch.load(config.output_dir / "checkpoints" / "last.ckpt", weights_only=True)
    # 8 frames in batches of `batch_size` for each of two processes
    steps = EPOCHS * math.ceil(8 / 2 / config.training.batch_size)
    assert state["global_step"] == steps


@pytest.mark.parametrize("error", [0.01, -0.05, 3.0], ids=["near", "bins away", "outside"])
def test_cross_entropy_pulls_the_anchor_as_the_squared_energy_error_does(structure_factory, error):
    """d loss / d anchor_i = d[(dE)^2 / N] / dE_i, whatever the histogram's shape."""
    potential = make_potential()  # random tau and delta
    batch = labelled_batch(potential, structure_factory, error)
    head = potential.energy_head
    scalars = potential.backbone(batch).scalars.detach()

    def loss_and_gradient(loss):
        anchors = []

        def keep(_module, _arguments, output):
            anchors.append(output.detach().requires_grad_(True))
            return anchors[-1]

        handle = head.anchor.register_forward_hook(keep)
        atoms = head(scalars, batch[keys.SPECIES])
        handle.remove()
        energy = torch.zeros(2, dtype=torch.float64).index_add(0, batch[fr.BATCH], atoms.energy)
        prediction = Prediction(energy, torch.zeros(0), torch.zeros(0), atoms)
        value = loss(prediction)
        return value, torch.autograd.grad(value, anchors[0])[0]

    result = []

    def cross_entropy(prediction):
        result.append(losses.energy_histogram(head, prediction, batch))
        return result[0].loss

    _, gradient = loss_and_gradient(cross_entropy)
    _, expected = loss_and_gradient(lambda p: losses.energy_squared(p, batch))
    # the target's discretisation bias is 5e-6 bins, of 20 meV, of targets up to 3 bins away
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert float(result[0].outside) == (1.0 if error == 3.0 else 0.0)


def test_cross_entropy_of_a_perfect_histogram_is_zero_on_average(structure_factory):
    """Less the floor of the entropy; single atoms differ by where in its bin the target falls."""
    head = make_potential().energy_head
    shares = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)[:-1]
    sigma = torch.full_like(shares, head.sigma_in_bins)
    perfect = torch.log(histogram.hl_gauss(shares, head.edges, sigma).clamp(min=1e-300))
    loss = histogram.cross_entropy(torch.softmax(perfect, 1), perfect) - head.entropy_floor()
    assert abs(float(loss.mean())) < 1e-3


def test_stress_and_forces_of_predict_are_the_calculators(tiny_model, structure_factory):
    potential = make_potential(num_elements=2)
    atoms = structure_factory(["Si", "O"], seed=4)
    atoms.calc = HLCalculator(tiny_model)
    calculated = (atoms.get_forces(), atoms.get_stress(voigt=False), atoms.get_volume())
    from test_potential import inputs_of

    graph = inputs_of(potential, atoms)
    graph |= {fr.NUM_ATOMS: torch.tensor([9]), fr.VOLUME: torch.tensor([calculated[2]])}
    prediction = predict(potential, fr.collate_graphs([graph]), create_graph=False)
    np.testing.assert_allclose(prediction.forces.detach(), calculated[0], atol=1e-10)
    np.testing.assert_allclose(prediction.stress[0].detach(), calculated[1], atol=1e-12)


def test_force_and_stress_losses_are_means_over_known_labels():
    forces = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    stress = torch.zeros(2, 3, 3)
    stress[1] = 0.1
    prediction = Prediction(torch.zeros(2), forces, stress, None)
    batch = {
        fr.TARGET_FORCES: torch.zeros(2, 3),
        fr.TARGET_STRESS: torch.stack([torch.full((3, 3), math.nan), torch.zeros(3, 3)]),
        fr.VOLUME: torch.tensor([math.inf, 50.0]),
        fr.NUM_ATOMS: torch.tensor([1, 4]),
    }
    assert float(losses.forces_squared(prediction, batch)) == pytest.approx(9 / 6)
    assert float(losses.stress_squared(prediction, batch)) == pytest.approx((50 * 0.1) ** 2 / 4)


# compiled ----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    reason="torch.compile needs Python's headers",
)
def test_compiled_training_writes_the_same_log(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    config = configure(tmp_path, training={"compile": True})
    train(config)
    for got, expected in zip(numbers(config), numbers(finished[0]), strict=True):
        # sums in another order; Adam makes steps of full size of gradients that are rounding
        assert got == pytest.approx(expected, rel=1e-3)


def test_compiling_without_pythons_headers_is_met_at_the_door(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "nowhere"))
    config = configure(tmp_path, training={"compile": True})
    with pytest.raises(ValueError, match=r"needs Python's headers.*python3-dev.*compile: false"):
        train(config)
    assert not (tmp_path / "runs").exists()
