"""The command line: verbs, help with examples, one line and exit code 2 on bad input."""

import importlib
import subprocess
import sys
import types

import pytest

from lmp_hl import __version__, cli

VERBS = ["train", "export", "split", "info", "evaluate", "analyze", "convert", "doctor"]


def stand_in(monkeypatch, name, **functions):
    """Put a module with these functions where `import name` finds it."""
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), child, module, raising=False)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"lmp-hl {__version__}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert f"example: lmp-hl {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["train"],
        ["evaluate", "hl.pt"],
        ["analyze", "t.h5md", "--threshold", "force_std"],
        ["analyze", "t.h5md", "--axis", "q"],
        ["convert", "t.h5md"],
        ["convert", "t.h5md", "t.xyz", "--step", "0"],
    ],
)
def test_wrong_words_give_one_line_and_exit_code_2(words, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("lmp-hl")
    assert "--help" in err


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError])
def test_bad_input_gives_one_line_and_exit_code_2(error, monkeypatch, capsys):
    def describe(path):
        raise error(f"{path}: not a model file\n  wanted TorchScript")

    stand_in(monkeypatch, "lmp_hl.model_file", describe=describe)
    assert cli.main(["info", "x.pt"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "lmp-hl info: x.pt: not a model file wanted TorchScript\n"


def test_debug_shows_the_traceback(monkeypatch):
    def describe(path):
        raise ValueError("broken")

    stand_in(monkeypatch, "lmp_hl.model_file", describe=describe)
    with pytest.raises(ValueError, match="broken"):
        cli.main(["info", "x.pt", "--debug"])


def test_a_bug_is_not_taken_for_bad_input(monkeypatch):
    def describe(path):
        raise ZeroDivisionError

    stand_in(monkeypatch, "lmp_hl.model_file", describe=describe)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", "x.pt"])


def test_interrupted_training_says_how_to_continue(monkeypatch, capsys):
    def train(config, resume):
        raise KeyboardInterrupt

    stand_in(monkeypatch, "lmp_hl.training.notebook", COLUMNS={}, read_metrics=None)
    stand_in(monkeypatch, "lmp_hl.training.train", train=train)
    assert cli.main(["train", "a.yaml"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_train_draws_the_learning_curves(monkeypatch, tmp_path, capsys):
    rows = [{"epoch": k, "train_loss": 1 / (k + 1), "valid_loss": 2 / (k + 1)} for k in range(5)]
    columns = {"epoch": "", "learning_rate": "", "train_loss": "eV²", "valid_loss": "eV²"}
    stand_in(
        monkeypatch, "lmp_hl.training.notebook", COLUMNS=columns, read_metrics=lambda path: rows
    )
    stand_in(
        monkeypatch, "lmp_hl.training.train", train=lambda config, resume: tmp_path / "model.ckpt"
    )
    assert cli.main(["train", "a.yaml"]) == 0
    assert (tmp_path / "learning_curves.png").stat().st_size > 5_000
    assert "learning_curves.png" in capsys.readouterr().out


def test_export_hands_over_both_paths(monkeypatch, capsys):
    calls = []
    stand_in(
        monkeypatch, "lmp_hl.training.checkpoint", export_checkpoint=lambda *a: calls.append(a)
    )
    assert cli.main(["export", "model.ckpt", "hl.pt"]) == 0
    assert [str(p) for p in (*calls[0][0], calls[0][1])] == ["model.ckpt", "hl.pt"]
    assert calls[0][2:] == ("torchscript", None, "cpu", "native", None)
    assert "hl.pt" in capsys.readouterr().out
    words = [
        "--runtime",
        "aoti",
        "--dtype",
        "float64",
        "--device",
        "cuda",
        "--cpu-isa",
        "x86-64-v3",
    ]
    assert cli.main(["export", "model.ckpt", "hl.pt2", *words]) == 0
    assert calls[1][2:] == ("aoti", "float64", "cuda", "x86-64-v3", None)


@pytest.mark.parametrize("option", [["--device", "cuda"], ["--cpu-isa", "x86-64-v3"]])
def test_torchscript_has_no_options_of_compiled_code(option, capsys):
    assert cli.main(["export", "model.ckpt", "hl.pt", *option]) == 2
    assert "add --runtime aoti" in capsys.readouterr().err


def test_missing_trajectory_is_one_line(tmp_path, capsys):
    assert cli.main(["analyze", str(tmp_path / "none.h5md")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "none.h5md" in err


def test_help_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys; from lmp_hl import cli; cli.main(['--help']); "
        "print([m for m in ('torch', 'matplotlib', 'ase', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
