"""SWAG and IVON: their Gaussians where they are known, and runs that end with members."""

import importlib
import shutil
import sys

import numpy as np
import pytest
import torch
from ase.io import write
from test_training import configure, emt_frames, last_state, numbers, quick_calibration

from lmp_hl import keys, model_file
from lmp_hl.calculator import HLCalculator
from lmp_hl.training import train as train_module
from lmp_hl.training.checkpoint import export_checkpoint, load_checkpoint
from lmp_hl.training.config import IvonConfig, SwagConfig, TrainingConfig, load_config, to_yaml
from lmp_hl.training.notebook import Notebook
from lmp_hl.training.posterior import Moments, Posterior, weights_of
from lmp_hl.training.train import train

SWAG = {"method": "swag", "members": 3, "epochs": 3, "rank": 2, "learning_rate": 0.002}
IVON = {"method": "ivon", "members": 3}


# the Gaussians -----------------------------------------------------------------------------------
def test_moments_are_those_computed_from_all_weights_at_once():
    """Also where the mean is 1e6 times the spread."""
    generator = torch.Generator().manual_seed(0)
    weights = 1e6 + torch.randn(40, 7, dtype=torch.float64, generator=generator)
    moments = Moments(rank=5)
    for w in weights:
        moments.add(w)
    posterior = moments.posterior()
    np.testing.assert_allclose(posterior.mean, weights.mean(0), rtol=1e-14)
    np.testing.assert_allclose(posterior.variance, weights.var(0, unbiased=False) / 2, rtol=1e-8)
    running = torch.stack([weights[: t + 1].mean(0) for t in range(35, 40)])
    deviations = (weights[35:] - running) / np.sqrt(2 * (5 - 1))
    # rounding of 1e6 is 1e-10
    np.testing.assert_allclose(posterior.deviations, deviations, rtol=0, atol=1e-9)


def test_samples_have_the_covariance_of_the_gaussian():
    generator = torch.Generator().manual_seed(0)
    posterior = Posterior(
        torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64),
        torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64),
        torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 0.3]], dtype=torch.float64),
    )
    samples = torch.stack([posterior.sample(generator) for _ in range(20000)])
    expected = torch.diag(posterior.variance) + posterior.deviations.T @ posterior.deviations
    # a variance of 2.1 is found within 2.1 sqrt(2 / 20000) = 0.02; four times that
    np.testing.assert_allclose(samples.mean(0), posterior.mean, atol=0.04)
    np.testing.assert_allclose(torch.cov(samples.T), expected, atol=0.09)


def test_swag_finds_the_stationary_distribution_of_noisy_descent_in_a_quadratic():
    """w <- w - a (H w + noise of covariance H) is stationary at S = a/2 (1 - a H / 2)^-1.

    SWAG takes half of S from its diagonal and half of S from the deviations.
    """
    rng = torch.Generator().manual_seed(1)
    angle = torch.tensor(0.5, dtype=torch.float64)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    hessian = turn @ torch.diag(torch.tensor([1.0, 8.0], dtype=torch.float64)) @ turn.T
    rate, root = 0.2, torch.linalg.cholesky(hessian)
    stationary = rate / 2 * torch.linalg.inv(torch.eye(2) - rate / 2 * hessian)
    moments, w = Moments(rank=2000), torch.zeros(2, dtype=torch.float64)
    for step in range(24000):
        noise = root @ torch.randn(2, generator=rng, dtype=torch.float64)
        w = w - rate * (hessian @ w + noise)
        if step % 12 == 0:  # almost independent
            moments.add(w)
    posterior = moments.posterior()
    half = posterior.deviations.T @ posterior.deviations
    # 2000 samples: 3 % of the variances, four times that
    np.testing.assert_allclose(half, stationary / 2, atol=0.12 * float(stationary.max()) / 2)
    np.testing.assert_allclose(posterior.variance, stationary.diag() / 2, rtol=0.12)


def quadratic(hessian, centre, weight_decay=0.1, ess=50.0, steps=600):
    """(mean, variance) that IVON finds for the loss sum_i h_i (w_i - c_i)^2 / 2; its optimiser."""
    ivon = importlib.import_module("lmp_hl.training.ivon")
    settings = IvonConfig(method="ivon", ess=ess, hess_init=3.0, beta2=0.99)
    config = TrainingConfig(learning_rate=0.1, weight_decay=weight_decay, posterior=settings)
    w = torch.nn.Parameter(torch.zeros_like(hessian))
    unused = torch.nn.Parameter(torch.zeros(2, dtype=hessian.dtype))
    optimizer = ivon.Ivon([{"params": [unused]}, {"params": [w]}, {"params": []}], config, seed=0)

    def run(number):
        for _ in range(number):

            def closure():
                optimizer.zero_grad()
                loss = 0.5 * (hessian * (w - centre).square()).sum()
                loss.backward()
                return loss

            optimizer.step(closure)

    run(steps)
    return w, unused, optimizer, run


def test_ivon_finds_the_posterior_of_a_quadratic():
    """Precision ess (h + weight_decay), mean h c / (h + weight_decay)."""
    pytest.importorskip("ivon")
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    hessian, centre = curvature.repeat_interleave(800), torch.full((1600,), 2.0).double()
    w, unused, optimizer, _ = quadratic(hessian, centre)
    mean = torch.cat([w.detach(), unused.detach()])
    posterior = optimizer.posterior([w, unused], mean)
    # averages over 800 weights with the same curvature: what is left is IVON's own bias, small
    # for 1 - beta2 = 1 %
    precision = 1 / posterior.variance[:1600].reshape(2, 800)
    np.testing.assert_allclose(precision.mean(1), 50 * (curvature + 0.1), rtol=0.04)
    expected = 2 * curvature / (curvature + 0.1)
    np.testing.assert_allclose(w.detach().reshape(2, 800).mean(1), expected, rtol=0.02)
    # weights without a gradient keep the prior, as fast as the Hessian is forgotten
    assert bool((1 / posterior.variance[1600:] < 50 * (0.1 + 3 * 0.99**500)).all())


def test_ivon_goes_on_where_it_was_stored():
    pytest.importorskip("ivon")
    hessian, centre = torch.tensor([1.0, 4.0]).double(), torch.tensor([2.0, -1.0]).double()
    w, _, optimizer, run = quadratic(hessian, centre, steps=5)
    stored, at = optimizer.state_dict(), w.detach().clone()
    stored = {
        "state": dict(stored["state"]),
        "param_groups": [dict(g) for g in stored["param_groups"]],
    }
    run(3)
    expected = w.detach().clone()
    w2, _, again, run2 = quadratic(hessian, centre, steps=0)
    w2.data.copy_(at)
    again.load_state_dict(stored)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    run2(3)
    assert torch.equal(w2.detach(), expected)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are used


# runs --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["swag", "ivon"])
def sampled(request, tmp_path_factory):
    """(configuration, model.ckpt) of a run with members and what is quickly calibrated."""
    if request.param == "ivon":
        pytest.importorskip("ivon")
    posterior, rate = {"swag": (SWAG, 0.005), "ivon": (IVON, 0.05)}[request.param]
    training = {"epochs": 6, "learning_rate": rate, "posterior": posterior}
    model = {"uncertainty": ["grade"]}
    config = configure(tmp_path_factory.mktemp(request.param), model=model, training=training)
    return config, train(config)


def members_of(checkpoint):
    return [checkpoint.parent / f"member_{k}.ckpt" for k in range(3)]


def test_members_are_checkpoints_around_the_mean(sampled):
    checkpoint = sampled[1]
    mean = load_checkpoint(checkpoint)[0]
    members = [load_checkpoint(path)[0] for path in members_of(checkpoint)]
    centre = weights_of(mean.requires_grad_(True))
    far = [weights_of(m.requires_grad_(True)) - centre for m in members]
    assert all(0 < float(d.norm()) < float(centre.norm()) for d in far)
    assert all(not torch.equal(far[0], d) for d in far[1:])
    # bins, scales and reference energies are those that were trained with
    for member in members:
        for name, value in mean.named_buffers():
            if not name.startswith("methods."):
                assert torch.equal(dict(member.named_buffers())[name], value), name


@pytest.mark.parametrize("sampled", ["swag"], indirect=True)
def test_members_export_as_an_ensemble(sampled, tmp_path):
    checkpoint = sampled[1]
    write(tmp_path / "held.xyz", emt_frames(6, 2))
    path = export_checkpoint(
        members_of(checkpoint), tmp_path / "hl.pt", valid=tmp_path / "held.xyz"
    )
    model = model_file.load(path)
    assert keys.ENSEMBLE_FORCE_STD in model.fields and keys.EXTRAPOLATION_GRADE in model.fields
    names = [m["name"] for m in model.card["ensemble"]["members"]]
    assert names == ["run-member0", "run-member1", "run-member2"]
    (atoms,) = emt_frames(1, 3)
    atoms.calc = HLCalculator(path)
    atoms.get_forces()
    assert float(np.min(atoms.calc.results["ensemble_force_std"])) > 0


@pytest.mark.parametrize("stop_after", ["in the middle", "at the end"])
def test_resumed_run_ends_with_the_same_mean_and_members(
    sampled, stop_after, tmp_path, monkeypatch
):
    config, checkpoint = sampled
    training = load_config(config).training
    again = tmp_path / config.name
    shutil.copytree(config.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs")
    original = Notebook.on_train_epoch_end

    def interrupt(self, trainer, module):
        original(self, trainer, module)
        if trainer.current_epoch == 4:  # moments of epoch 3 are stored
            raise KeyboardInterrupt

    def no_calibration(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop_after == "at the end":
            patch.setattr(train_module, "calibrate", no_calibration)
        else:
            patch.setattr(Notebook, "on_train_epoch_end", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(again)
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    train(again, resume=True)
    out = tmp_path / "runs" / "run"
    for name in ("model.ckpt", *(path.name for path in members_of(checkpoint))):
        states = [
            torch.load(folder / name, weights_only=True)["state"]
            for folder in (out, checkpoint.parent)
        ]
        for key, value in states[1].items():
            if not key.startswith("methods."):
                assert torch.equal(states[0][key], value), (name, key)
    assert numbers(again) == numbers(config)
    collected = last_state(again)["callbacks"].get("Swag")
    assert (collected is None) == (training.posterior.method == "ivon")
    assert collected is None or collected["count"] == SWAG["epochs"]


def test_swag_descends_to_a_constant_learning_rate_and_averages_its_epochs(tmp_path, monkeypatch):
    seen = []
    original = Moments.add

    def add(self, weights):
        seen.append(weights)
        original(self, weights)

    monkeypatch.setattr(Moments, "add", add)
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    training = {"epochs": 6, "posterior": SWAG}
    config = configure(tmp_path, model={"uncertainty": []}, training=training)
    checkpoint = train(config)
    rates = [row["learning_rate"] for row in numbers(config)]
    assert rates[0] > 0.003 and rates[3:] == pytest.approx([0.002] * 3)
    assert len(seen) == 3
    found = weights_of(load_checkpoint(checkpoint)[0].requires_grad_(True))
    np.testing.assert_allclose(found, torch.stack(seen).mean(0), rtol=1e-12)


# from a trained network --------------------------------------------------------------------------
def test_run_starts_from_a_trained_network_with_its_bins(sampled, tmp_path, monkeypatch):
    trained = sampled[1]
    monkeypatch.setattr(train_module, "calibrate", quick_calibration)
    starts = []
    original = train_module.PotentialModule

    def keep(potential, config):
        starts.append({k: v.clone() for k, v in potential.state_dict().items()})
        return original(potential, config)

    monkeypatch.setattr(train_module, "PotentialModule", keep)
    training = {
        "epochs": 3,
        "warmup_epochs": 5,
        "init_from": str(trained),
        "posterior": {**SWAG, "learning_rate": 1e-5},
    }
    model = {"uncertainty": ["density"]}
    config = configure(tmp_path, model=model, training=training)
    checkpoint = train(config)
    before = load_checkpoint(trained)[0].state_dict()
    after = load_checkpoint(checkpoint)[0].state_dict()
    network = [name for name in before if not name.startswith("methods.")]
    assert network and all(torch.equal(starts[0][name], before[name]) for name in network)
    assert torch.equal(after["energy_head.bin_width"], before["energy_head.bin_width"])
    assert not all(torch.equal(after[name], before[name]) for name in network)
    # the histogram is trained at once: there is no warm-up
    assert all("train_outside" in row for row in numbers(config))


def test_a_network_that_a_run_cannot_start_from_is_refused(sampled, tmp_path):
    start = {"init_from": str(sampled[1]), "epochs": 1}
    for folder, model, message in (
        ("channels", {"channels": 5}, r"has model.channels 4, but this run 5"),
        ("trained", {"uncertainty": ["evidential"]}, r"model.uncertainty \[\], but .*evidential"),
    ):
        config = configure(tmp_path / folder, model=model, training=start)
        with pytest.raises(ValueError, match=message):
            train(config)
    config = configure(tmp_path / "no", training={"init_from": "no.ckpt", "epochs": 1})
    with pytest.raises(ValueError, match=r"no.ckpt: no such checkpoint"):
        train(config)
    data = {"train": "train.xyz", "valid": "valid.xyz", "elements": ["Au", "Cu"]}
    config = configure(tmp_path / "elements", training=start, data=data)
    with pytest.raises(ValueError, match=r"for the elements Cu Au, .*data.elements: \[Cu, Au\]"):
        train(config)


# bad input ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        ("swag", r"training.posterior must be a mapping or null, got 'swag' \(text\)"),
        ("{members: 5}", r"posterior.method must be 'swag' or 'ivon', got nothing"),
        ("{method: sgld}", r"posterior.method must be 'swag' or 'ivon', got 'sgld'"),
        ("{method: ivon, rank: 3}", r"unknown key 'training.posterior.rank'; known: method, mem"),
        ("{method: swag, members: 0}", r"posterior.members must be >= 1, got 0"),
        ("{method: swag, rank: 1}", r"posterior.rank must be >= 2, got 1"),
        ("{method: swag, rank: 30}", r"posterior.rank must be <= posterior.epochs \(25\)"),
        ("{method: swag, learning_rate: 0}", r"posterior.learning_rate must be > 0"),
        ("{method: swag, epochs: 195}", r"posterior.epochs must be <= 190, the epochs .* warm-up"),
        ("{method: ivon, ess: -1}", r"posterior.ess must be > 0, got -1"),
        ("{method: ivon, beta2: 1}", r"posterior.beta2 must be 0 < x < 1"),
    ],
)
def test_mistakes_are_named(tmp_path, posterior, message):
    path = tmp_path / "train.yaml"
    path.write_text(f"name: a\ndata: {{train: a.xyz}}\ntraining: {{posterior: {posterior}}}\n")
    with pytest.raises(ValueError, match=message):
        load_config(path)


@pytest.mark.parametrize("posterior", [SWAG, IVON], ids=["swag", "ivon"])
def test_the_section_reads_back_the_same(tmp_path, posterior):
    config = load_config(configure(tmp_path, training={"epochs": 9, "posterior": posterior}))
    assert isinstance(
        config.training.posterior, {"swag": SwagConfig, "ivon": IvonConfig}[posterior["method"]]
    )
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ivon", None)
    monkeypatch.delitem(sys.modules, "lmp_hl.training.ivon", raising=False)
    config = configure(tmp_path, training={"posterior": IVON})
    with pytest.raises(ImportError, match=r"needs the package ivon-opt: pip install 'lmp-hl\[ivon"):
        train(config)
    assert not (tmp_path / "runs").exists()
