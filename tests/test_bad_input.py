"""Bad input at the command line: one line, exit code 2, and no file made or changed."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from conftest import ELEMENTS, make_card, make_potential

from lmp_hl import cli
from lmp_hl.training.checkpoint import CHECKPOINT_FORMAT
from lmp_hl.training.config import ModelConfig

# of make_potential
MODEL = {"cutoff": 4.0, "channels": 3, "num_radial": 4, "hidden": 8, "num_bins": 32}


def labelled(seed, without=(), symbol="Si", **changes):
    """Eight rattled atoms with made-up labels."""
    rng = np.random.default_rng(seed)
    atoms = bulk(symbol, "diamond", a=5.43, cubic=True)
    atoms.positions += rng.normal(0, 0.05, (8, 3))
    labels = {"energy": -40.0 + rng.normal(), "forces": rng.normal(0, 1, (8, 3)), **changes}
    labels = {name: value for name, value in labels.items() if name not in without}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


@pytest.fixture
def folder(tmp_path, tiny_model):
    """Everything a user might have: data, configuration, checkpoint, model, and older results."""
    write(tmp_path / "train.xyz", [labelled(k) for k in range(4)])
    write(tmp_path / "valid.xyz", [labelled(k) for k in (10, 11)])
    (tmp_path / "hl.pt").write_bytes(tiny_model.read_bytes())
    settings = ModelConfig(**MODEL, dtype="float64")
    torch.save(
        {
            "lmp_hl_checkpoint": CHECKPOINT_FORMAT,
            "state": make_potential(num_elements=2).state_dict(),
            "model": dataclasses.asdict(settings),
            "elements": list(ELEMENTS[:2]),
            "card": {**make_card(), "versions": {}},
        },
        tmp_path / "model.ckpt",
    )
    (tmp_path / "results.json").write_text("older results")
    configure(tmp_path)
    return tmp_path


def configure(folder, text="", **sections):
    """Write train.yaml; sections are merged with those that work."""
    content = {
        "name": "run",
        "data": {"train": "train.xyz", "valid": "valid.xyz"},
        "model": dict(MODEL),
        "training": {"epochs": 2, "warmup_epochs": 0, "batch_size": 2, "accelerator": "cpu"},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    (folder / "train.yaml").write_text(yaml.safe_dump(content) + text)


def replace_frame(folder, atoms):
    """Put a frame in the place of training frame 2."""
    write(folder / "train.xyz", [labelled(0), labelled(1), atoms, labelled(3)])


def nan_forces():
    forces = np.zeros((8, 3))
    forces[5, 1] = np.nan
    return labelled(2, forces=forces)


def close_pair():
    atoms = labelled(2)
    atoms.positions[7] = atoms.positions[2] + [0.0, 0.29, 0.0]
    atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
    return atoms


def water():
    atoms = Atoms("OH2", [[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((3, 3)))
    return atoms


def change_checkpoint(folder, **changes):
    content = torch.load(folder / "model.ckpt", weights_only=True)
    torch.save({**content, **changes}, folder / "model.ckpt")


def newer_model(folder):
    module = torch.jit.load(str(folder / "hl.pt"))
    module.format_version = 99
    torch.jit.save(module, str(folder / "hl.pt"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


TRAIN = "train train.yaml"
EXPORT = "export model.ckpt new.pt"
EVALUATE = "evaluate hl.pt train.xyz --json results.json"

# name: (how it goes wrong, command, words the line must hold: what was wanted, what came, what to
# do)
CASES = {
    "no energy": (
        lambda f: replace_frame(f, labelled(2, without=["energy"])),
        TRAIN,
        ["train.xyz: frame 2", "no energy 'energy'", "found", "set data.energy_key, or remove"],
    ),
    "nan energy": (
        lambda f: replace_frame(f, labelled(2, energy=np.nan)),
        TRAIN,
        ["train.xyz: frame 2", "is nan, not one finite number", "remove the frame"],
    ),
    "nan forces": (
        lambda f: replace_frame(f, nan_forces()),
        TRAIN,
        ["train.xyz: frame 2", "of atoms [5] (from 0) are not finite", "remove the frame"],
    ),
    "no forces": (
        lambda f: replace_frame(f, labelled(2, without=["forces"])),
        TRAIN,
        ["train.xyz: frame 2", "no forces 'forces'", "set data.forces_key, or remove"],
    ),
    "evaluate without forces": (
        lambda f: replace_frame(f, labelled(2, without=["forces"])),
        EVALUATE,
        ["train.xyz: frame 2", "no forces 'forces'"],
    ),
    "unknown element": (
        lambda f: write(f / "valid.xyz", [labelled(10), labelled(11, symbol="Ge")]),
        TRAIN,
        ["valid.xyz: frame 1", "element Ge is unknown", "knows Si"],
    ),
    "evaluate an unknown element": (
        lambda f: write(f / "train.xyz", [water()]),
        EVALUATE,
        ["train.xyz: frame 0", "element H is unknown", "knows Si, O"],
    ),
    "close atoms": (
        lambda f: replace_frame(f, close_pair()),
        TRAIN,
        ["train.xyz: frame 2", "atom 2 is 0.290 Å from atom 7", "less than 0.3 Å", "check the"],
    ),
    "empty data": (
        lambda f: (f / "train.xyz").write_text(""),
        TRAIN,
        ["train.xyz", "mpty"],
    ),
    "no data": (lambda f: (f / "train.xyz").unlink(), TRAIN, ["train.xyz: no such file"]),
    "unknown key": (
        lambda f: configure(f, model={"cutof": 5.0}),
        TRAIN,
        ["train.yaml: unknown key 'model.cutof'; did you mean 'model.cutoff'?"],
    ),
    "mistyped value": (
        lambda f: configure(f, training={"epochs": "many"}),
        TRAIN,
        ["train.yaml: training.epochs must be a whole number, got 'many' (text)"],
    ),
    "key given twice": (
        lambda f: configure(f, text="name: again\n"),
        TRAIN,
        ["train.yaml", "key 'name' is given twice"],
    ),
    "no configuration": (
        lambda f: (f / "train.yaml").unlink(),
        TRAIN,
        ["train.yaml: no such configuration file"],
    ),
    "checkpoint of another architecture": (
        lambda f: change_checkpoint(f, model=dataclasses.asdict(ModelConfig(channels=5))),
        EXPORT,
        ["model.ckpt: its weights do not fit its own architecture"],
    ),
    "newer checkpoint": (
        lambda f: change_checkpoint(f, lmp_hl_checkpoint=CHECKPOINT_FORMAT + 1),
        EXPORT,
        ["model.ckpt: checkpoint format", "is newer than this lmp-hl", "update lmp-hl"],
    ),
    "no checkpoint": (
        lambda f: (f / "model.ckpt").unlink(),
        EXPORT,
        ["model.ckpt: no such checkpoint; train one with lmp-hl train"],
    ),
    "truncated checkpoint": (
        lambda f: truncate(f / "model.ckpt"),
        EXPORT,
        ["model.ckpt: not a checkpoint that torch can read"],
    ),
    "no model": (
        lambda f: (f / "hl.pt").unlink(),
        "info hl.pt",
        ["hl.pt: no such model file; export one"],
    ),
    "truncated model": (
        lambda f: truncate(f / "hl.pt"),
        EVALUATE,
        ["hl.pt: truncated, or not a TorchScript file"],
    ),
    "text as model": (
        lambda f: (f / "hl.pt").write_text("hello"),
        "info hl.pt",
        ["hl.pt: truncated, or not a TorchScript file"],
    ),
    "weights as model": (
        lambda f: torch.save({"weights": torch.zeros(3)}, f / "hl.pt"),
        EVALUATE,
        ["hl.pt: not a TorchScript model that torch can open"],
    ),
    "newer model": (
        newer_model,
        "info hl.pt",
        ["hl.pt: model format 99 is newer than this lmp-hl", "update lmp-hl"],
    ),
    "export into no folder": (
        lambda f: None,
        "export model.ckpt results.json/new.pt",
        ["results.json"],
    ),
    "evaluate into no folder": (
        lambda f: None,
        "evaluate hl.pt valid.xyz --json results.json/e.json",
        ["results.json"],
    ),
    "train into no folder": (
        lambda f: configure(f, text="output_dir: results.json/run\n"),
        TRAIN,
        ["results.json"],
    ),
    "no trajectory": (lambda f: None, "analyze traj.h5md", ["traj.h5md: no such trajectory"]),
    "text as trajectory": (
        lambda f: (f / "traj.h5md").write_text("hello"),
        "analyze traj.h5md",
        ["traj.h5md"],
    ),
}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(text, verb):
    """The complaint, the only line on stderr beside progress bars."""
    lines = [line for line in text.splitlines() if "━" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"lmp-hl {verb}: "), text
    assert "Traceback" not in text and len(text) < 600
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_every_file(folder, name, monkeypatch, capfd):
    spoil, command, words = CASES[name]
    spoil(folder)
    before = contents(folder)
    monkeypatch.chdir(folder)
    assert cli.main(command.split()) == 2
    line = one_line(capfd.readouterr().err, command.split()[0])
    for word in words:
        assert word in line
    assert contents(folder) == before


def test_the_same_commands_work_on_good_input(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert cli.main(EXPORT.split()) == 0
    assert cli.main(["info", "new.pt"]) == 0
    assert cli.main(EVALUATE.split()) == 0
    assert set(json.loads((folder / "results.json").read_text())["sets"]) == {"data"}


@pytest.mark.parametrize(
    ("command", "limit", "file"),
    [("export model.ckpt hl.pt", 30_000, "hl.pt"), (EVALUATE, 2_000, "results.json")],
    ids=["export", "evaluate"],
)
def test_full_disk_is_one_line_and_leaves_the_older_file(folder, command, limit, file):
    assert (folder / "hl.pt").stat().st_size > 30_000
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lmp_hl.cli", *command.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=300,
        # the kernel refuses to write past this size, as it would on a full disk
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    complaint = [line for line in done.stderr.splitlines() if line.startswith("lmp-hl ")]
    assert len(complaint) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"cannot write {file}: File too large; make room" in complaint[0]
    assert contents(folder) == before
