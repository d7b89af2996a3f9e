"""The YAML of a training run: defaults, round trip, and errors that name what is wrong."""

import dataclasses
from pathlib import Path

import pytest

from lmp_hl.training.config import DataConfig, LossConfig, TrainConfig, load_config, to_yaml

FULL = """
name: water
seed: 3
output_dir: ../runs/water
data:
  train: [a.xyz, sub/b.xyz]
  valid: /data/v.xyz
  test: {300K: t3.xyz, 600K: t6.xyz}
  stress_key: null
  reference_energies: {H: -13.6, O: -430}
  elements: [O, H]
  max_frames: 50
model: {preset: mp, head: scalar, cutoff: 4, num_layers: 3, bin_width: 0.05, dtype: float64}
loss: {forces: 1e2}
training: {learning_rate: 1e-3, accelerator: cpu, num_threads: 2}
"""


def write(folder, text):
    path = folder / "train.yaml"
    path.write_text(text)
    return path


def test_short_file_gives_the_defaults(tmp_path):
    config = load_config(
        write(tmp_path, "name: si\ndata: {train: si.xyz}\nmodel:\n  # all defaults\n")
    )
    assert config == TrainConfig(
        name="si",
        output_dir=tmp_path / "runs" / "si",
        data=DataConfig(train=(tmp_path / "si.xyz",)),
    )


def test_every_kind_of_value_is_read(tmp_path):
    config = load_config(write(tmp_path, FULL))
    assert config.data.train == (tmp_path / "a.xyz", tmp_path / "sub" / "b.xyz")
    assert config.data.valid == (Path("/data/v.xyz"),)
    assert config.data.test == {"300K": tmp_path / "t3.xyz", "600K": tmp_path / "t6.xyz"}
    assert config.data.stress_key is None
    assert config.data.reference_energies == {"H": -13.6, "O": -430.0}
    assert config.data.elements == ("O", "H")
    assert config.output_dir == tmp_path / "../runs/water"
    assert isinstance(config.model.cutoff, float)
    # YAML 1.1 takes numbers without a point for text
    assert (config.loss.forces, config.training.learning_rate) == (100.0, 1e-3)
    assert config.model.layers == 3


@pytest.mark.parametrize("text", [FULL, "name: si\ndata: {train: si.xyz}"])
def test_resolved_copy_reads_back_the_same_from_anywhere(tmp_path, text):
    config = load_config(write(tmp_path, text))
    (tmp_path / "elsewhere").mkdir()
    assert load_config(write(tmp_path / "elsewhere", to_yaml(config))) == config


def test_reference_energies_may_be_a_file(tmp_path):
    text = "name: a\ndata: {train: a.xyz, reference_energies: iso.xyz}"
    assert load_config(write(tmp_path, text)).data.reference_energies == tmp_path / "iso.xyz"


def test_the_tree_is_frozen(tmp_path):
    config = load_config(write(tmp_path, FULL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.cutoff = 6.0


def test_presets_know_their_layers(tmp_path):
    for preset, layers in [("local", 1), ("mp", 2)]:
        text = f"name: a\ndata: {{train: a.xyz}}\nmodel: {{preset: {preset}}}"
        assert load_config(write(tmp_path, text)).model.layers == layers


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("model: {cutof: 5}", r"unknown key 'model.cutof'; did you mean 'model.cutoff'\?"),
        ("trainin: {epochs: 5}", r"unknown key 'trainin'; did you mean 'training'\?"),
        (
            "loss: {virial: 1}",
            r"unknown key 'loss.virial'; known: energy, .*forces, stress",
        ),
        ("model: {cutoff: five}", r"model.cutoff must be a number, got 'five' \(text\)"),
        ("model: {cutoff: .nan}", r"model.cutoff must be a number, got nan"),
        ("model: {channels: 6.5}", r"model.channels must be a whole number, got 6.5 \(number\)"),
        (
            "model: {channels: true}",
            r"model.channels must be a whole number, got True \(true/false\)",
        ),
        ("model: {num_layers: x}", r"model.num_layers must be a whole number or null, got 'x'"),
        ("model: {head: hl-gauss}", r"model.head must be 'hlgauss' or .*'scalar', got 'hl-gauss'"),
        ("model: 3", r"model must be a mapping with the keys preset, .*, got 3 \(whole number\)"),
        ("model: {cutoff: -5.0}", r"model.cutoff must be > 0 Å, got -5.0"),
        ("model: {l_max: 1}", r"model.l_max must be 2 to 4, got 1"),
        ("model: {num_layers: 2}", r"model.num_layers must be 1 or null .* got 2"),
        ("model: {preset: mp, num_layers: 1}", r"model.num_layers must be >= 2 or null .* got 1"),
        ("training: {ema_decay: 1.0}", r"training.ema_decay must be 0 <= x < 1, got 1.0"),
        ("seed: -1", r"seed must be >= 0, got -1"),
        ("seed: 1\nseed: 2", r"key 'seed' is given twice"),
        ("seed: [", r"not a YAML file"),
        ("seed: null", r"seed must be a whole number, got nothing \(null\)"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path, lines, message):
    path = write(tmp_path, f"name: a\ndata: {{train: a.xyz}}\n{lines}\n")
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}", r"'data.train' is missing"),
        ("{train: []}", r"data.train must be at least one file"),
        ("{train: [a.xyz, 3]}", r"data.train\[1\] must be a path, got 3 \(whole number\)"),
        ("{train: 3}", r"data.train must be a list of paths, got 3"),
        (
            "{train: a.xyz, test: t.xyz}",
            r"data.test must be a mapping of texts to paths, got 't.xyz'",
        ),
        ("{train: a.xyz, valid_fraction: 1}", r"data.valid_fraction must be 0 < x < 1"),
        ("{train: a.xyz, elements: [Si, Xx]}", r"data.elements must be chemical symbols, got 'Xx'"),
        ("{train: a.xyz, elements: [No]}", r"data.elements\[0\] must be a text, got False"),
        ("{train: a.xyz, elements: [H, H]}", r"must be a list with each element once"),
        (
            "{train: a.xyz, reference_energies: {Si: x}}",
            r"data.reference_energies.Si must be a number",
        ),
        ("{train: a.xyz, reference_energies: {si: 1}}", r"chemical symbols, got 'si'"),
        ("{train: a.xyz, force_key: f}", r"did you mean 'data.forces_key'"),
    ],
)
def test_mistakes_in_the_data_section_are_named(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, f"name: a\ndata: {data}\n"))


def test_missing_parts_and_files_are_named(tmp_path):
    for text, message in [
        ("data: {train: a.xyz}", "'name' is missing"),
        ("name: a", "'data' is missing"),
        ("", "the file must be a mapping with the keys name, "),
        ("name: ../a\ndata: {train: a.xyz}", "name must be letters"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_config(write(tmp_path, text))
    with pytest.raises(ValueError, match=r"nowhere.yaml: no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_loss_without_energy_and_forces_is_refused():
    with pytest.raises(ValueError, match="energy or forces > 0"):
        LossConfig(energy=0.0, forces=0.0)
