"""lmp-hl convert: ASE, LAMMPS and OVITO get what the trajectory holds."""

from __future__ import annotations

import ase.io
import h5py
import numpy as np
import pytest
from ase.calculators.calculator import PropertyNotImplementedError
from crystal import crystal, lmp, read_dump

from lmp_hl import cli
from lmp_hl.convert import convert
from lmp_hl.h5md import open_trajectory

COLUMNS = "id type element mass x xu v f image c_pe c_s d_mark"
DUMPED = "id type element mass x y z xu yu zu ix iy iz vx vy vz fx fy fz c_pe c_s[*] d_mark"


@pytest.fixture(scope="module")
def tilted(tmp_path_factory):
    """Double precision frames of a triclinic box that moves, one of them short of atoms."""
    folder = tmp_path_factory.mktemp("tilted")
    lmp(
        folder,
        crystal("prism 1 5 -1 3 0 4 0.5 -0.3 -0.2", temperature=1500)
        + f"""
fix mark all property/atom d_mark
set group all d_mark 0.25
fix run all npt temp 900 900 0.1 tri 0 0 1
fix traj all hlgauss/h5md 10 traj.h5md {COLUMNS} precision double
dump d all custom 10 dump.txt {DUMPED}
dump_modify d sort id element Cu Ni format float %.17g
run 20
group gone id 100:120
delete_atoms group gone compress no
run 10
""",
    )
    return folder


def numbers(dumped, names):
    return np.stack([dumped[name] for name in names.split()], 1)


def test_extended_xyz_has_the_numbers_of_the_run_in_units_of_ase(tilted, tmp_path):
    target = tmp_path / "traj.extxyz"
    assert convert(tilted / "traj.h5md", target) == 4
    frames = ase.io.read(target, ":")
    ps = 1e3 * ase.units.fs
    with open_trajectory(tilted / "traj.h5md") as trajectory:
        boxes, times = trajectory.box, trajectory.times
    for k, (atoms, (step, dumped)) in enumerate(
        zip(frames, read_dump(tilted / "dump.txt"), strict=True)
    ):
        assert len(atoms) == (256 if k < 3 else 235)
        assert atoms.info["step"] == step and atoms.info["time"] == pytest.approx(times[k])
        assert atoms.pbc.all() and atoms.info["Origin"].shape == (3,)
        np.testing.assert_array_equal(atoms.cell, boxes[k])
        exact = {"rtol": 1e-14, "atol": 1e-13}
        np.testing.assert_allclose(atoms.positions, numbers(dumped, "x y z"), **exact)
        np.testing.assert_allclose(atoms.get_forces(), numbers(dumped, "fx fy fz"), **exact)
        np.testing.assert_allclose(
            atoms.get_velocities() * ps, numbers(dumped, "vx vy vz"), rtol=1e-13, atol=1e-12
        )
        np.testing.assert_array_equal(atoms.arrays["id"], dumped["id"])
        np.testing.assert_array_equal(atoms.numbers, np.where(dumped["type"] == 1, 29, 28))
        np.testing.assert_allclose(atoms.get_masses(), dumped["mass"])
        for name in ("c_pe", "d_mark"):
            np.testing.assert_allclose(atoms.arrays[name], dumped[name], **exact)
        np.testing.assert_allclose(
            atoms.arrays["c_s"][:, 5], dumped["c_s[6]"], rtol=1e-12, atol=1e-7
        )
        np.testing.assert_array_equal(atoms.arrays["image"], numbers(dumped, "ix iy iz"))
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_potential_energy()  # nobody wrote a total energy


def test_dump_is_read_by_ase_with_the_cell_of_the_trajectory(tilted, tmp_path):
    target = tmp_path / "traj.lammpstrj"
    assert cli.main(["convert", str(tilted / "traj.h5md"), str(target)]) == 0
    with open_trajectory(tilted / "traj.h5md") as trajectory:
        for k, atoms in enumerate(ase.io.read(target, ":", format="lammps-dump-text")):
            frame = trajectory[k]
            np.testing.assert_allclose(atoms.cell, frame.cell, atol=1e-12)
            np.testing.assert_allclose(atoms.get_celldisp().ravel(), frame.origin, atol=1e-12)
            np.testing.assert_array_equal(atoms.positions, frame["position"])
            np.testing.assert_array_equal(atoms.numbers, frame["species"])
            np.testing.assert_allclose(atoms.get_forces(), frame["force"], rtol=1e-15)
            np.testing.assert_array_equal(atoms.arrays["c_pe"], frame["c_pe"])
    # every column of LAMMPS's own dump is there under the same name with the same numbers
    for (step, ours), (expected, theirs) in zip(
        read_dump(target), read_dump(tilted / "dump.txt"), strict=True
    ):
        assert step == expected and set(ours) == set(theirs)
        for name, values in theirs.items():
            np.testing.assert_allclose(
                ours[name], values, rtol=1e-12, atol=1e-7 if "c_s" in name else 1e-13
            )
    ours, theirs = (
        (f / name).read_text().splitlines()
        for f, name in ((tmp_path, "traj.lammpstrj"), (tilted, "dump.txt"))
    )
    assert [x for x in ours if "BOX" in x] == [x for x in theirs if "BOX" in x]


def test_lammps_itself_continues_from_the_dump(tilted, tmp_path):
    """`rerun` gives the energies and forces of the run, `read_dump` its box and velocities."""
    convert(tilted / "traj.h5md", tmp_path / "traj.dump", slice(None, 3))
    setup = crystal("prism 0 4 0 4 0 4 0.1 0.1 0.1")
    lmp(
        tmp_path,
        setup
        + """
dump d all custom 10 again.txt id fx fy fz c_pe
dump_modify d sort id format float %.17g
rerun traj.dump dump x y z box yes
undump d
read_dump traj.dump 20 x y z vx vy vz box yes replace yes
write_dump all custom last.txt id type xu yu zu vx vy vz modify sort id format float %.17g
print "BOX $(lx:%.15g) $(ly:%.15g) $(lz:%.15g) $(xy:%.15g) $(xz:%.15g) $(yz:%.15g)" file box.txt
""",
    )
    run = read_dump(tilted / "dump.txt")[:3]
    for (step, again), (expected, first) in zip(
        read_dump(tmp_path / "again.txt"), run, strict=True
    ):
        assert step == expected
        for name in ("fx", "fy", "fz", "c_pe"):  # other neighbour lists: sums in another order
            np.testing.assert_allclose(again[name], first[name], rtol=1e-9, atol=1e-10)
    ((_, last),) = read_dump(tmp_path / "last.txt")
    for name in ("vx", "vy", "vz"):
        np.testing.assert_array_equal(last[name], run[2][1][name])
    with open_trajectory(tilted / "traj.h5md") as trajectory:
        cell = trajectory.box[2]
    box = np.array((tmp_path / "box.txt").read_text().split()[1:], float)
    np.testing.assert_allclose(
        box, [*cell.diagonal(), cell[1, 0], cell[2, 0], cell[2, 1]], rtol=1e-13
    )


def test_chosen_frames_single_precision_and_uncertainty(tilted, tmp_path):
    """Nine digits give single precision back; fields are arrays of the atoms."""
    path = tmp_path / "single.h5md"
    with h5py.File(tilted / "traj.h5md") as old, h5py.File(path, "w") as new:
        for name in ("h5md", "particles", "parameters"):
            old.copy(name, new)
        group = new["particles/trajectory"]
        for name in [n for n in group if n != "box" and group[n]["value"].dtype == np.float64]:
            values = group[name]["value"]
            data, attributes = values[:].astype(np.float32), dict(values.attrs)
            del group[name]["value"]
            group[name]["value"] = data
            group[name]["value"].attrs.update(attributes)
        group["force_std"] = group["c_pe"]
        del group["position_unwrapped"]
    words = ["--start", "-3", "--step", "2"]
    for target in (tmp_path / "a.xyz", tmp_path / "a.dump"):
        assert cli.main(["convert", str(path), str(target), *words]) == 0
    with open_trajectory(path) as trajectory:
        chosen = [trajectory[1], trajectory[3]]
    for frame, atoms in zip(chosen, ase.io.read(tmp_path / "a.xyz", ":"), strict=True):
        np.testing.assert_array_equal(atoms.positions.astype(np.float32), frame["position"])
        np.testing.assert_array_equal(
            atoms.arrays["force_std"].astype(np.float32), frame["force_std"]
        )
    for frame, (step, dumped) in zip(chosen, read_dump(tmp_path / "a.dump"), strict=True):
        assert step == frame.step
        np.testing.assert_array_equal(dumped["force_std"].astype(np.float32), frame["force_std"])
        assert "xu" not in dumped


def test_orthogonal_box_empty_frames_and_reduced_units(tmp_path):
    lmp(
        tmp_path,
        """
units lj
boundary p f p
lattice fcc 0.8
region b block 0 3 0 3 0 3
create_box 2 b
create_atoms 1 box
mass * 1.0
pair_style zero 2.5
pair_coeff * *
group few id 900
fix traj few hlgauss/h5md 5 traj.h5md type x
run 5
group few id 4 2
run 5
""",
    )
    for name in ("a.dump", "a.xyz"):
        assert convert(tmp_path / "traj.h5md", tmp_path / name) == 3
    header, *_ = (tmp_path / "a.dump").read_text().split("ITEM: ATOMS")
    assert "NUMBER OF ATOMS\n0\n" in header and "ITEM: BOX BOUNDS pp ff pp\n0.0" in header
    assert "id type x y z\n2 1 " in (tmp_path / "a.dump").read_text()
    last = ase.io.read(tmp_path / "a.xyz", "-1")
    assert last.arrays["id"].tolist() == [2, 4] and last.pbc.tolist() == [True, False, True]


def test_bad_input_is_one_line_and_leaves_the_old_file(tilted, tmp_path, capsys, monkeypatch):
    old = tmp_path / "old.xyz"
    old.write_text("precious")
    source = str(tilted / "traj.h5md")
    for words, expected in (
        ([source, str(tmp_path / "a.pdb")], "unknown ending '.pdb'; wanted .xyz"),
        ([source, str(old), "--start", "9"], "has 4 frames; start, stop and step leave none"),
        ([source, str(tmp_path / "nowhere" / "a.xyz")], "cannot write"),
        ([str(tmp_path / "missing.h5md"), str(old)], "no such trajectory"),
    ):
        assert cli.main(["convert", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and expected in err and len(err.splitlines()) == 1

    def dies(self, index):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmp_hl.h5md.Trajectory.to_ase", dies)
    with pytest.raises(ValueError, match="No space left on device; make room"):
        convert(source, old)
    assert old.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["old.xyz"]
