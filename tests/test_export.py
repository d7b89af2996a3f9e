"""hl.pt: what is written is what is read, and whatever is no such file is refused with a reason."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from ase.data import atomic_masses, atomic_numbers
from conftest import CUTOFF, ELEMENTS, make_card

from lmp_hl import keys, model_file
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.uncertainty import Scales


@pytest.mark.parametrize(
    ("preset", "head", "num_elements", "dtype"),
    [
        ("local", "hlgauss", 2, "float32"),
        ("mp", "hlgauss", 3, "float64"),
        ("local", "scalar", 1, "float64"),
        ("mp", "scalar", 2, "float32"),
    ],
)
def test_exported_equals_eager(
    potential_factory, structure_factory, tmp_path, preset, head, num_elements, dtype
):
    potential = potential_factory(preset, head, num_elements, 2, dtype)
    elements = ELEMENTS[:num_elements]
    path = export_potential(potential, elements, {}, tmp_path / "deep" / "hl.pt")
    assert [p.name for p in path.parent.iterdir()] == ["hl.pt"]
    model = model_file.load(path)
    layers = 1 if preset == "local" else 2
    assert (model.elements, model.cutoff, model.num_layers) == (list(elements), CUTOFF, layers)
    assert (model.dtype, model.units) == (dtype, "metal")
    assert model.masses == [atomic_masses[atomic_numbers[e]] for e in elements]
    assert model.field_units == [keys.FIELD_UNITS[field] for field in model.fields]

    inputs = graph_inputs(structure_factory(elements, seed=6), elements, CUTOFF, layers, dtype)
    eager, read = potential(inputs, True), model.evaluate(inputs)
    assert set(eager) == set(read) == {*model.fields, keys.EDGE_GRADIENTS}
    # the same operations, but scripting may fuse them: a few roundings
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    for name, expected in eager.items():
        assert read[name].dtype == expected.dtype
        torch.testing.assert_close(read[name], expected.detach(), rtol=tolerance, atol=tolerance)
    without = model.evaluate(inputs, with_fields=False)
    assert set(without) == {keys.ENERGY, keys.EDGE_GRADIENTS}


def test_fields_of_a_scalar_model_have_no_histogram(potential_factory, tmp_path):
    path = export_potential(potential_factory(head="scalar"), ["Si"], {}, tmp_path / "hl.pt")
    model = model_file.load(path)
    assert model.fields == [keys.ENERGY, *Scales.FIELDS]
    assert "histogram" not in model.card


def test_card_says_what_was_given_and_lies_beside_the_code(tiny_model, potential_factory):
    model = model_file.load(tiny_model)
    head = potential_factory(num_elements=2).energy_head
    assert model.card["calibration"] == make_card()["calibration"]
    assert model.card["histogram"]["num_bins"] == head.num_bins == 32
    assert model.card["histogram"]["bin_width"] == float(head.bin_width)
    assert model.card["optional_inputs"] == []
    with zipfile.ZipFile(tiny_model) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("card.json")]
        assert json.loads(archive.read(name)) == model.card


def test_info_prints_the_card(tiny_model):
    text = model_file.describe(tiny_model)
    for piece in (
        "Si (28.085 u) O (15.999 u)",
        "4 Å, strictly local",
        "float64 network",
        "32 bins of 20 meV",
        "entropy floor 1.200 nat",
        "force_std [eV/Angstrom]",
        "5 frames, 45 atoms; validated on 2 frames; 3 epochs",
        "12.35 meV/atom, forces 67.9 meV/Å",
        "force_std 0.47, distance 0.31",
        model_file.load(tiny_model).hash,
    ):
        assert piece in text


def test_edge_gradients_can_be_differentiated_again_when_asked(tiny_model, structure_factory):
    """Forces that depend on a field need gradients of the outputs."""
    module = torch.jit.load(str(tiny_model))
    inputs = graph_inputs(structure_factory(["Si", "O"]), ["Si", "O"], CUTOFF, 1, "float64")
    inputs[keys.EDGE_VECTORS].requires_grad_(True)
    outputs = module(inputs, True, True)
    for name in (keys.EDGE_GRADIENTS, keys.ENTROPY, keys.FORCE_STD):
        (gradient,) = torch.autograd.grad(
            [outputs[name].square().sum()], [inputs[keys.EDGE_VECTORS]], retain_graph=True
        )
        assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0


# files that are no model -------------------------------------------------------------------------
def potential_of(module):
    (potential,) = module.stages.ensemble.members.children()
    return potential


def altered(tiny_model, tmp_path, change):
    module = torch.jit.load(str(tiny_model))
    change(module)
    path = tmp_path / "altered.pt"
    torch.jit.save(module, str(path))
    return path


def test_self_test_notices_a_changed_weight(tiny_model, tmp_path):
    def change(module):
        potential_of(module).energy_head.anchor.linear.bias.data.add_(1e-6)

    path = altered(tiny_model, tmp_path, change)
    with pytest.raises(ValueError, match=r"altered.pt: self-test failed: energy differs by .*e-0"):
        model_file.load(path)


def test_self_test_notices_nan(tiny_model, tmp_path):
    def change(module):
        potential_of(module).methods.scales.distance.median.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"self-test failed: .* differs by nan"):
        model_file.load(altered(tiny_model, tmp_path, change))


def test_self_test_returns_the_deviation(tiny_model):
    assert model_file.self_test(model_file.load(tiny_model)) < 1e-12


def test_newer_format_is_refused(tiny_model, tmp_path):
    def change(module):
        module.format_version = 99

    with pytest.raises(ValueError, match=r"format 99 is newer than this lmp-hl.*update lmp-hl"):
        model_file.load(altered(tiny_model, tmp_path, change))


def zip_of(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such model file; export one"),
        (b"", "truncated, or not a TorchScript file"),
        (b"pair_style mliap model hl.pt\n", "truncated, or not a TorchScript file"),
        (zip_of(readme="hello"), "not a TorchScript model that torch can open"),
    ],
    ids=["missing", "empty", "text", "zip"],
)
def test_what_is_no_model_is_refused(tmp_path, content, message):
    path = tmp_path / "hl.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        model_file.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_model_is_refused(tiny_model, tmp_path, share):
    data = tiny_model.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{path}: truncated"):
        model_file.load(path)


def test_foreign_torchscript_and_eager_weights_are_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), str(path))
    with pytest.raises(ValueError, match=r"not of lmp-hl \(no format_version\)"):
        model_file.load(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a TorchScript model"):
        model_file.load(path)


def test_failed_export_leaves_the_file_that_was_there(potential_factory, tiny_model, tmp_path):
    path = tmp_path / "hl.pt"
    path.write_bytes(tiny_model.read_bytes())
    potential_factory.cache_clear()  # a copy of one's own to break
    broken = potential_factory(num_elements=2)
    potential_factory.cache_clear()
    broken.energy_head.anchor.linear.bias.data.fill_(np.nan)
    with pytest.raises(ValueError, match="self-test failed"):
        export_potential(broken, ELEMENTS[:2], {}, path)
    assert path.read_bytes() == tiny_model.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["hl.pt"]


def test_energy_stays_float64_in_a_float32_model(potential_factory, structure_factory, tmp_path):
    path = export_potential(potential_factory(dtype="float32"), ["Si"], {}, tmp_path / "hl.pt")
    inputs = graph_inputs(structure_factory(["Si"]), ["Si"], CUTOFF, 1, "float32")
    assert model_file.load(path).evaluate(inputs)[keys.ENERGY].dtype == torch.float64
