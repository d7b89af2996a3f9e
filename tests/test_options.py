"""What a user may ask of the pair style: how it runs, heat flux, and what stops it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lammps_cases import MASSES, cluster, crystal, export, read_dump, reference, run_lammps

# float64, the same sums in another order, over some ten steps
TOLERANCE = 1e-9
KINETIC = 1.0364269e-4  # eV per u (Å/ps)², LAMMPS's mvv2e of units metal

SYSTEMS = {"large": crystal(4, triclinic=True, repeat=5), "cluster": cluster(3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options")
    for layers in (1, 2):
        export(path / f"layers{layers}.pt", layers)
    for name, atoms in SYSTEMS.items():
        atoms.write(path / f"{name}.data")
    return path


def start(layers: int, options: str = "", name: str = "large") -> str:
    boundary = " ".join("p" if p else "f" for p in SYSTEMS[name].periodic)
    return f"""
clear
units metal
boundary {boundary}
box tilt large
read_data {name}.data
pair_style mliap model layers{layers}.pt {options}
pair_coeff * * Si O NULL
"""


# swaps change what atoms are between two neighbour lists, hot atoms move from rank to rank
SWAPPED = """
velocity all create 3000 11
fix 1 all nve
fix 2 all atom/swap 3 5 29494 3000 ke yes types 1 2
timestep 0.001
neighbor 0.6 bin
neigh_modify every 1 delay 0 check yes
compute u all hlgauss/atom entropy
run 20
write_dump all custom {out} id type x y z fx fy fz c_u modify format float %.17g
"""
WAYS = {
    "default": "",
    "device": "edges device",
    "portions": "memory 0.05",
    "extended": "comm extended",
    "device-portions": "edges device memory 0.05",
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def swapped(request: pytest.FixtureRequest, folder: Path) -> dict[tuple[str, int], np.ndarray]:
    n = request.param
    cases = [(way, layers) for way in WAYS for layers in (1, 2)]
    script = "".join(
        start(layers, WAYS[way]) + SWAPPED.format(out=f"{way}.{layers}.{n}")
        for way, layers in cases
    )
    result = run_lammps(script, folder, n)
    assert result.returncode == 0, result.stdout[-3000:]
    return {(way, layers): read_dump(folder / f"{way}.{layers}.{n}") for way, layers in cases}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "default"])
def test_options_change_how_a_run_is_made_and_not_what_it_gives(
    swapped: dict[tuple[str, int], np.ndarray], way: str, layers: int
) -> None:
    want, got = swapped["default", layers], swapped[way, layers]
    assert (want[:, 1] != np.array(SYSTEMS["large"].types)).any()  # something was swapped
    np.testing.assert_array_equal(got[:, :2], want[:, :2])
    # steps of a hot many-body system enlarge a difference in the last digit
    np.testing.assert_allclose(got[:, 2:], want[:, 2:], rtol=0, atol=1e-8)


HEAT = """
velocity all create 900 7
compute ke all ke/atom
compute pe all pe/atom
compute s all centroid/stress/atom NULL virial
compute flux all heat/flux ke pe s
thermo_style custom step c_flux[1] c_flux[2] c_flux[3]
run 0
write_dump all custom heat.dump id vx vy vz fx fy fz c_pe modify format float %.17g
print "$(c_flux[1]:%.17g) $(c_flux[2]:%.17g) $(c_flux[3]:%.17g)" file heat.txt
"""


def test_heat_flux_is_the_rate_at_which_energy_moves(folder: Path) -> None:
    """J = d/dt sum_i r_i e_i of a cluster, with de_i/dt from energies a little before and after."""
    result = run_lammps(start(1, name="cluster") + HEAT, folder, 2)
    assert result.returncode == 0, result.stdout[-3000:]
    atoms = SYSTEMS["cluster"]
    rows = read_dump(folder / "heat.dump")
    velocities, forces, energies = rows[:, 1:4], rows[:, 4:7], rows[:, 7]
    h = 1e-4  # ps; the truncation error is of order h²
    moved = [
        reference(type(atoms)(x, atoms.species, atoms.cell, atoms.periodic), 1)["energies"]
        for x in (atoms.positions - h * velocities, atoms.positions + h * velocities)
    ]
    masses = np.array(MASSES)[atoms.species]
    kinetic = 0.5 * KINETIC * masses * (velocities**2).sum(1)
    power = (moved[1] - moved[0]) / (2 * h) + (forces * velocities).sum(1)
    flux = ((energies + kinetic)[:, None] * velocities).sum(0)
    flux += (atoms.positions * power[:, None]).sum(0)
    got = np.loadtxt(folder / "heat.txt")
    np.testing.assert_allclose(got, flux, rtol=0, atol=1e-5 * np.abs(flux).max())
    # the centroid term matters here: without it the flux is another
    assert np.abs((atoms.positions * power[:, None]).sum(0)).max() > 0.05 * np.abs(flux).max()


REFUSED = {
    "heat flux of messages": (
        start(2, name="cluster") + "compute ke all ke/atom\ncompute pe all pe/atom\n"
        "compute s all stress/atom NULL virial\ncompute flux all heat/flux ke pe s\n"
        "thermo_style custom step c_flux[1]\nrun 0\n",
        ["compute heat/flux", "layers2.pt", "strictly local"],
    ),
    "heat flux of shared virials": (
        start(1, name="cluster") + "compute ke all ke/atom\ncompute pe all pe/atom\n"
        "compute s all stress/atom NULL virial\ncompute flux all heat/flux ke pe s\n"
        "thermo_style custom step c_flux[1]\nrun 0\n",
        ["wanted 'compute centroid/stress/atom'", "stress/atom"],
    ),
    "centroid virials of messages": (
        start(2, name="cluster") + "compute s all centroid/stress/atom NULL virial\n"
        "dump 1 all custom 1 none.dump c_s[1]\nrun 0\n",
        ["centroid/stress/atom"],
    ),
    "not a number": (
        start(1) + "variable far atom 'x*exp(1000*(id==7))'\nset atom 7 x v_far\nrun 0\n",
        ["Non-numeric"],
    ),
    "extended ghosts of several cutoffs": (
        start(2, "comm extended") + "neighbor 2.0 multi\ncomm_modify mode multi\nrun 0\n",
        ["comm_modify mode single", "layers2.pt"],
    ),
    "memory": (start(1, "memory -3"), ["memory must be positive", "-3"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(folder: Path, name: str) -> None:
    script, words = REFUSED[name]
    result = run_lammps(script, folder)
    assert result.returncode != 0
    for word in words:
        assert word in result.stdout + result.stderr


# write_restart sends atoms that have crossed a border to the rank they are on now
MOVED = """
velocity all create 3000 11
fix 1 all nve
timestep 0.001
neighbor 0.9 bin
neigh_modify every 1000 delay 1000 check no
compute u all hlgauss/atom entropy
compute umax all reduce max c_u
run 20
"""
RESTART = "write_restart moved.restart\n"


def test_fields_of_atoms_that_changed_ranks_are_not_read(folder: Path) -> None:
    refused = run_lammps(start(1) + MOVED + RESTART + 'print "read $(c_umax)"\n', folder, 2)
    assert refused.returncode != 0 and "\nread " not in refused.stdout
    assert "before commands that move atoms between ranks" in refused.stdout + refused.stderr
    again = 'run 0\nprint "read $(c_umax/v_before:%.12f)"\n'
    before = "variable before equal $(c_umax)\n"
    result = run_lammps(start(1) + MOVED + before + RESTART + again, folder, 2)
    assert result.returncode == 0, result.stdout[-3000:]
    assert float(result.stdout.split("\nread ")[1].split()[0]) == pytest.approx(1, abs=TOLERANCE)


def test_features_are_exchanged_under_every_kind_of_communication(folder: Path) -> None:
    """One ghost cutoff per type, tiles instead of bricks: the ghosts differ, the forces do not."""
    script = ""
    for k, lines in enumerate(
        ("", "neighbor 2.0 multi\ncomm_modify mode multi", "comm_style tiled\nbalance 1.0 rcb")
    ):
        script += start(2) + lines + f"\nrun 0\nwrite_dump all custom comm.{k} id fx fy fz"
        script += " modify format float %.17g\n"
    result = run_lammps(script, folder, 3)
    assert result.returncode == 0, result.stdout[-3000:]
    want = read_dump(folder / "comm.0")
    for k in (1, 2):
        np.testing.assert_allclose(read_dump(folder / f"comm.{k}"), want, rtol=0, atol=TOLERANCE)


# the address space is limited when LAMMPS and torch are loaded: what remains is too little for all
# atoms at once and plenty for a part of them
SHORT_OF_MEMORY = """
import resource
from mpi4py import MPI
from lammps import lammps

lmp = lammps(cmdargs=["-log", "none"])
lmp.file("in.memory")
lmp.command("run 0")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + {mib} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
lmp.command("pair_style mliap model layers1.pt memory 100000")
lmp.command("pair_coeff * * Si O NULL")
lmp.command("run 0")
print("energy", repr(lmp.get_thermo("pe")))
"""


def test_a_run_that_is_short_of_memory_goes_on_in_portions(folder: Path) -> None:
    # 125,000 atoms, for which all at once take about 450 MiB
    script = start(1) + "replicate 10 10 10\n"
    (folder / "in.memory").write_text(script)
    energies = []
    for mib in (100_000, 350):
        result = subprocess.run(
            [sys.executable, "-c", SHORT_OF_MEMORY.format(mib=mib)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        warned = "out of memory on cpu" in result.stdout
        assert warned == (mib == 350), result.stdout[-3000:]
        energies.append(float(result.stdout.split("energy")[-1].split()[0]))
    assert energies[0] == pytest.approx(energies[1], rel=1e-12)
