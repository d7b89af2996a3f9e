"""Configurations of examples/accuracy and the pages of benchmarks/accuracy.py and size.py."""

import importlib
from pathlib import Path

import pytest

from lmp_hl.training.config import DataConfig, load_config
from lmp_hl.training.frames import read_frames
from lmp_hl.training.stress_labels import stress_offset

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
CONFIGS = sorted((ROOT / "examples" / "accuracy").glob("*.yaml"))


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark script as a module, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_documented_configurations_name_files_of_the_public_sets(benchmark, path):
    moved = benchmark("hlgauss_vs_scalar").moved
    data = moved(load_config(path), path.parent, DATA).data
    assert data.test
    if not DATA.is_dir():
        pytest.skip(f"no {DATA.name} folder beside the project")
    files = [*data.train, *data.test.values()]
    files += [data.reference_energies] if isinstance(data.reference_energies, Path) else []
    assert [file for file in files if not file.is_file()] == []


def test_the_stress_that_copper_lacks_is_the_documented_one():
    train = DATA / "mlearn" / "Cu" / "train.xyz"
    if not train.is_file():
        pytest.skip("needs mlearn's copper")
    found = stress_offset(read_frames(train, DataConfig(train=(train,)), "train"))
    documented = load_config(ROOT / "examples" / "accuracy" / "cu.yaml").data.stress_offset
    assert found.explains
    assert found.value == pytest.approx(documented, abs=1e-4)


def test_a_set_without_stress_has_none_in_the_table(benchmark):
    accuracy = benchmark("accuracy")
    interval = {"value": 1.234, "low": 1.0, "high": 2.0}
    errors = {"energy_rmse_meV_per_atom": interval, "forces_rmse_meV_per_Angstrom": interval}
    lines = accuracy.table({"acac": {"tests": {"300 K": {"lmp-hl": errors}}}})
    assert lines[-1] == "| acac | 300 K | lmp-hl | 1.23 [1.00, 2.00] | 1.2 [1.0, 2.0] | - |"


def test_memory_of_an_atom_and_gain_of_ranks_are_differences_and_ratios(benchmark):
    size = benchmark("size")
    found = {
        ("hl.pt", cells, ranks): [{"atoms": atoms, "us": us / ranks, "MiB": 100 + atoms / 1024}]
        for cells, atoms, us in ((6, 1000, 50.0), (13, 9000, 55.0))
        for ranks in (1, 2)
    }
    made = benchmark("provenance").provenance()
    text = size.page("Cu", found, made)
    assert "| hl.pt | 9,000 | 55.0 (55.0-55.0) | 1.10 | 109 | 27.5 (27.5-27.5) | 2.00 |" in text
    assert "`hl.pt`: 1.0 kB of memory an atom." in text
