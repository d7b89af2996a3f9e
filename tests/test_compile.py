"""hl.pt2: the same numbers as TorchScript at any size, refused where its code is not at home."""

import dataclasses
import errno
import re
import subprocess

import pytest
import torch
from conftest import CUTOFF, ELEMENTS, calibrated, make_card, make_potential, make_structure

from lmp_hl import HLCalculator, keys, model_file, runtime, stages
from lmp_hl import compile as compile_module
from lmp_hl.compile import export_compiled
from lmp_hl.ensemble import Ensemble
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs
from lmp_hl.training.checkpoint import CHECKPOINT_FORMAT, export_checkpoint
from lmp_hl.training.config import ModelConfig
from lmp_hl.training.module import build_potential

PRESETS = (pytest.param("local", marks=pytest.mark.slow), "mp")
# the same sums in another order
TOLERANCE = {"float64": 1e-11, "float32": 1e-4}


@pytest.fixture(scope="session")
def scripted_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripted")
    return {
        preset: export_potential(
            calibrated(preset),
            ELEMENTS[:2],
            make_card(),
            folder / f"{preset}.pt",
        )
        for preset in ("local", "mp")
    }


def structures():
    far = make_structure(ELEMENTS[:2], 2, pbc=False)
    far.set_distance(0, 1, CUTOFF + 0.1, fix=0)
    small = make_structure(ELEMENTS[:2], 1, pbc=True)
    small.set_cell(0.8 * CUTOFF * torch.eye(3).numpy())
    return {
        "nothing": far[:0],
        "one atom": far[:1],
        "no edges": far,
        "its own neighbour": small,
        "molecule": make_structure(ELEMENTS[:2], 5, pbc=False),
        "crystal": make_structure(ELEMENTS[:2], 27),
        "one element": make_structure(ELEMENTS[1:2], 8),
    }


def assert_same(got, expected, dtype="float64", where=""):
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert got[key].shape == value.shape
        if value.numel() > 0:
            # relative to the largest: outside its data a random network gives 1e4 eV here
            error = (got[key] - value).abs().max() / value.abs().max().clamp(min=1.0)
            assert float(error) <= TOLERANCE[dtype], (where, key)


@pytest.mark.parametrize("preset", PRESETS)
def test_compiled_gives_what_torchscript_gives(compiled_models, scripted_models, preset):
    compiled = model_file.load(compiled_models[preset])
    scripted = model_file.load(scripted_models[preset])
    for name, structure in structures().items():
        layers = scripted.num_layers
        inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, layers, "float64")
        for with_fields in (True, False):
            expected = scripted.evaluate(inputs, with_fields)
            assert_same(compiled.evaluate(inputs, with_fields), expected, where=name)
    for name in ("elements", "masses", "cutoff", "num_layers", "dtype", "fields", "field_units"):
        assert getattr(compiled, name) == getattr(scripted, name)


@pytest.mark.parametrize("preset", PRESETS)
def test_layers_may_shrink_to_the_owned_atoms(compiled_models, preset):
    potential = calibrated(preset)
    model = model_file.load(compiled_models[preset])
    structure = make_structure(ELEMENTS[:2], 20)
    inputs = graph_inputs(structure, ELEMENTS[:2], CUTOFF, model.num_layers, "float64")
    for nodes in ([20, 7], [20, 1], [20, 0], [7, 7], [1, 0]) if preset == "mp" else ([7], [1], [0]):
        # edges of the first nodes only; their neighbours may be any nodes of the layer before
        center, neighbor = inputs[keys.EDGE_INDEX]
        inside = (neighbor < (20 if len(nodes) == 1 else nodes[0])) | (center >= nodes[-1])
        cut = {**inputs, keys.LAYER_NODES: torch.tensor(nodes)}
        cut[keys.EDGE_INDEX] = inputs[keys.EDGE_INDEX][:, inside]
        cut[keys.EDGE_VECTORS] = inputs[keys.EDGE_VECTORS][inside]
        edges = [int((cut[keys.EDGE_INDEX][0] < n).sum()) for n in nodes]
        cut[keys.LAYER_EDGES] = torch.tensor(edges)
        assert_same(model.evaluate(cut), potential(cut, True))


def test_calculator_runs_on_compiled_code(compiled_models, scripted_models):
    atoms = make_structure(ELEMENTS[:2], 9)
    forces = []
    for paths in (compiled_models, scripted_models):
        atoms.calc = HLCalculator(paths["mp"])
        forces.append(torch.from_numpy(atoms.get_forces()))
        assert atoms.calc.results["entropy"].shape == (9,)
    torch.testing.assert_close(*forces, rtol=1e-11, atol=1e-11)


# the archive -------------------------------------------------------------------------------------
def rewritten(path, new_path, **records):
    """A copy of an archive with records replaced (`hl` and `build`)."""
    names = {"build": runtime.BUILD_RECORD, "hl": runtime.TORCHSCRIPT_RECORD}
    replaced = {names[key]: content for key, content in records.items()}
    reader, writer = (
        torch._C.PyTorchFileReader(str(path)),
        torch._C.PyTorchFileWriter(str(new_path)),
    )
    for name in reader.get_all_records():
        if not name.startswith(".data/"):
            content = replaced.get(name, reader.get_record(name))
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return new_path


def build_of(path):
    record = torch._C.PyTorchFileReader(str(path)).get_record(runtime.BUILD_RECORD)
    return runtime.Build.parse(record.decode(), path)


def test_archive_holds_what_the_plugin_reads(compiled_models, scripted_models, tmp_path):
    reader = torch._C.PyTorchFileReader(str(compiled_models["mp"]))
    lines = reader.get_record("extra/lmp_hl_build.txt").decode().splitlines()
    keys_of_lines = [line.split(" ")[0] for line in lines]
    assert keys_of_lines == ["format", "torch", "device", "device_name", "cpu_features"]
    assert lines[:3] == ["format 4", f"torch {torch.__version__}", "device cpu"]
    inner = tmp_path / "inner.pt"
    inner.write_bytes(reader.get_record("extra/hl.pt"))
    assert "AOTInductor" in model_file.load(inner).card["runtime"]
    folders = {name.split("/")[2] for name in reader.get_all_records() if name.startswith("data/")}
    assert folders == {"layer0", "layer0_vjp", "final", "final_fields"}


def test_info_says_which_runtime(compiled_models, scripted_models, tmp_path):
    assert re.search(
        r"\nruntime +TorchScript, for any device\n", model_file.describe(scripted_models["mp"])
    )
    path = compiled_models["mp"]
    words = rf"\nruntime +AOTInductor, torch {re.escape(torch.__version__)}, for cpu \(made on .*\n"
    assert re.search(words, model_file.describe(path))
    # also where the code cannot run
    build = dataclasses.replace(
        build_of(path), device="cuda", device_name="H100", cuda_capability="9.0"
    )
    other = rewritten(path, tmp_path / "hl.pt2", build=build.text().encode())
    assert "for cuda (made on H100)" in model_file.describe(other)


HERE = re.escape(torch.__version__)


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({"torch": "2.5.1+cpu"}, "cpu", rf"by torch 2.5.1\+cpu, but this is torch {HERE};"),
        (
            {"device": "cuda", "device_name": "H100"},
            "cpu",
            r"for cuda \(H100\), but device cpu was asked for",
        ),
        ({}, "cuda", r"for cpu \(.*\), but device cuda was asked for.* --device cuda "),
        ({"cpu_features": ("avx2", "avx1024")}, "cpu", r"for a CPU like .* lacks .*avx1024;"),
    ],
    ids=["torch", "device of the file", "device wanted", "cpu"],
)
def test_code_for_something_else_is_refused_before_it_is_loaded(
    compiled_models, tmp_path, monkeypatch, change, device, message
):
    path = compiled_models["mp"]
    build = dataclasses.replace(build_of(path), **change)
    other = rewritten(path, tmp_path / "hl.pt2", build=build.text().encode())
    monkeypatch.setattr(model_file, "CompiledStages", None)  # whoever calls it fails
    with pytest.raises(ValueError, match=f"^{other}: compiled {message}") as error:
        model_file.load(other, device)
    assert "lmp-hl export --runtime aoti" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_another_build_of_the_same_torch_is_accepted(compiled_models, tmp_path):
    path = compiled_models["mp"]
    release = torch.__version__.partition("+")[0]
    build = dataclasses.replace(build_of(path), torch=f"{release}+other")
    model_file.load(rewritten(path, tmp_path / "hl.pt2", build=build.text().encode()))


def test_newer_build_record_is_refused(compiled_models, tmp_path):
    text = build_of(compiled_models["mp"]).text().replace("format 4", "format 5")
    other = rewritten(compiled_models["mp"], tmp_path / "hl.pt2", build=text.encode())
    with pytest.raises(ValueError, match="newer lmp-hl than this; update"):
        model_file.load(other)


def test_self_test_notices_code_of_another_model(compiled_models, tmp_path):
    stranger = export_potential(
        make_potential("mp", num_elements=2, seed=1),
        ELEMENTS[:2],
        make_card(),
        tmp_path / "hl.pt",
    )
    other = rewritten(compiled_models["mp"], tmp_path / "hl.pt2", hl=stranger.read_bytes())
    with pytest.raises(ValueError, match=r"self-test failed: \w+ differs"):
        model_file.load(other)


def test_truncated_package_is_refused(compiled_models, tmp_path):
    data = compiled_models["mp"].read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{path}: truncated"):
        model_file.load(path)


# exporting ---------------------------------------------------------------------------------------
def test_comparison_at_export_notices_other_code(compiled_models):
    model = model_file.load(compiled_models["mp"])
    stranger = stages.Stages(Ensemble([make_potential("mp", num_elements=2, seed=1)]))
    compared = compile_module._Compared(stranger, model.compiled, 1e-9)
    inputs = graph_inputs(make_structure(ELEMENTS[:2], 9), ELEMENTS[:2], CUTOFF, 2, "float64")
    with pytest.raises(ValueError, match=r"compiled layer0 differs from the network by .*output 0"):
        stages.evaluate(compared, inputs, True)


def test_missing_compiler_is_named(tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "g++-of-nowhere")}),
        pytest.raises(ValueError, match=r"no g\+\+-of-nowhere; install g\+\+ or set CXX"),
    ):
        export_compiled(make_potential(), ["Si"], make_card(), tmp_path / "hl.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_missing_gpu_is_named(tmp_path):
    with pytest.raises(ValueError, match="torch finds no GPU here"):
        export_compiled(make_potential(), ["Si"], make_card(), tmp_path / "hl.pt2", "cuda")


def test_level_of_x86_is_refused_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="this is aarch64; leave --cpu-isa away"):
        export_compiled(
            make_potential(), ["Si"], make_card(), tmp_path / "hl.pt2", cpu_isa="x86-64-v3"
        )


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("ld: No space left on device")],
)
def test_full_disk_while_compiling_names_the_folder(error, monkeypatch, tmp_path):
    def compile_stages(*args):
        raise error

    monkeypatch.setattr(compile_module, "_compile_stages", compile_stages)
    with pytest.raises(ValueError, match=r"no room to compile in .* or set TMPDIR"):
        export_compiled(make_potential(), ["Si"], make_card(), tmp_path / "hl.pt2")
    assert list(tmp_path.iterdir()) == []


def write_checkpoint(path, dtype="float32", seed=0, **model):
    """A checkpoint as training would leave it, with random weights."""
    sizes = {"cutoff": CUTOFF, "channels": 3, "num_radial": 4, "hidden": 8, "num_bins": 32}
    config = ModelConfig(**{**sizes, "dtype": dtype, **model})
    torch.manual_seed(seed)
    potential = build_potential(config, 2)
    potential.reference_energies.copy_(torch.tensor([-1e5 - 1e-4, 7.0], dtype=torch.float64))
    content = {
        "lmp_hl_checkpoint": CHECKPOINT_FORMAT,
        "state": potential.state_dict(),
        "model": dataclasses.asdict(config),
        "elements": list(ELEMENTS[:2]),
        "card": {},
    }
    torch.save(content, path)
    return path


def test_network_of_float32_is_exported_in_float64(tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt")
    single = model_file.load(export_checkpoint(path, tmp_path / "hl.pt"))
    double = model_file.load(export_checkpoint(path, tmp_path / "hl64.pt", dtype="float64"))
    assert (single.dtype, double.dtype) == ("float32", "float64")
    atoms = make_structure(ELEMENTS[:2], 9)
    a, b = (
        model.evaluate(graph_inputs(atoms, ELEMENTS[:2], CUTOFF, 1, model.dtype))
        for model in (single, double)
    )
    assert b[keys.EDGE_GRADIENTS].dtype == b[keys.ENTROPY].dtype == torch.float64
    for key, value in b.items():
        # float32's rounding of the network's part (1e-7, times some operations), not of the
        # reference energy, which would be 8e-3 eV
        scale = 1.0 if key == keys.ENERGY else max(1.0, float(value.abs().max()))
        torch.testing.assert_close(a[key].double(), value, rtol=0, atol=1e-4 * scale)


def test_reference_energies_are_float64_in_any_network():
    for dtype in ("float32", "float64"):
        potential = make_potential(num_elements=2, dtype=dtype)
        assert potential.reference_energies.dtype == torch.float64
        assert potential.energy_head.bin_width.dtype == torch.float64
        others = {p.dtype for p in potential.parameters()}
        assert others == {getattr(torch, dtype)}


# minutes of compiling ----------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "num_layers"), [("local", None), ("mp", 3)])
def test_compiled_float32(tmp_path, preset, num_layers):
    potential = make_potential(preset, num_elements=3, dtype="float32", num_layers=num_layers)
    path = export_compiled(potential, ELEMENTS, make_card(), tmp_path / "hl.pt2")
    model = model_file.load(path)
    atoms = make_structure(ELEMENTS, 27)
    inputs = graph_inputs(atoms, ELEMENTS, CUTOFF, model.num_layers, "float32")
    assert_same(model.evaluate(inputs), potential(inputs, True), "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu_isa", "absent"), [("x86-64-v2", "ymm"), ("x86-64-v3", "zmm"), ("x86-64-v4", None)]
)
def test_old_cpus_get_no_new_instructions(tmp_path, cpu_isa, absent):
    path = export_compiled(
        make_potential("local"), ["Si"], make_card(), tmp_path / "hl.pt2", cpu_isa=cpu_isa
    )
    assert build_of(path).cpu_features == runtime.CPU_LEVELS[cpu_isa]
    assert f"needs {cpu_isa}\n" in model_file.describe(path)
    reader = torch._C.PyTorchFileReader(str(path))
    for name in reader.get_all_records():
        if name.endswith(".so"):
            library = tmp_path / "code.so"
            library.write_bytes(reader.get_record(name))
            code = subprocess.run(
                ["objdump", "-d", library], capture_output=True, text=True, check=True
            ).stdout
            assert "xmm" in code
            assert absent is None or absent not in code
