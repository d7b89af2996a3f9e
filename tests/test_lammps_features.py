"""What LAMMPS does around a potential, on real networks: lists, hybrids, derivatives, edited atoms.

One LAMMPS process per model goes through all cases on two ranks; the tests read what it wrote.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from lammps_cases import run_lammps
from lammps_network import (
    COLUMNS,
    MODELS,
    STRUCTURES,
    Frame,
    check,
    check_frame,
    check_totals,
    close,
    load,
    python_results,
    read_frames,
    read_totals,
    run,
    start,
    write,
    write_start,
)
from test_agreement import FIELDS
from test_plugin_input import DRIVER

RANKS = 2

# --- neighbour lists that lack pairs or atoms, atoms put in and taken out ------------------------

GAPS = np.sort(np.random.default_rng(5).choice(2_000_000_000, 27, replace=False)) + 1

# name -> (structure, commands before the run, commands after the results are written)
CASES = {
    "excluded_types": ("liquid", "neigh_modify exclude type 1 2", "neigh_modify exclude none"),
    "excluded_groups": (
        "liquid",
        "group low id <= 20\ngroup high id > 15\nneigh_modify exclude group low high",
        "neigh_modify exclude none\ngroup low delete\ngroup high delete",
    ),
    "unseen": ("unseen", "", ""),
    "gaps": ("bulk", "", ""),
    "edited": (
        "bulk",
        "run 0\nset atom 3*9 type 2\ndisplace_atoms all move 0.4 2.0 -3.1\n"
        "delete_atoms group some\ncreate_atoms 1 single 6.5 0.2 3.3\nchange_box all x scale 1.04 "
        "remap y final 0 7.5 remap\nreplicate 2 1 1",
        "",
    ),
    "wider_ghost_shell": ("bulk", "comm_modify cutoff 13.0", "comm_modify cutoff 0.0"),
    "multi": (
        "bulk",
        "neighbor 0.9 multi\ncomm_modify mode multi",
        "comm_modify mode single\nneighbor 0.9 bin",
    ),
    "plain_search": ("bulk", "neighbor 0.9 nsq", "neighbor 0.9 bin"),
    "skin_0.5": ("sheared", "neighbor 0.5 bin", ""),
    "skin_3.0": ("sheared", "neighbor 3.0 bin", "neighbor 0.9 bin"),
    "shrink_wrapped": ("molecule", "change_box all boundary s m s", ""),
}

GROUP = """
group some type 1
compute g some hlgauss/atom force_std entropy
run 0
write_dump all custom {model}.group.dump id type c_g[*] c_u[*] modify format float %.17g
uncompute g
group some delete
"""

DIFFERENCES = """
fix d all numdiff 1 0.0002
run 0
write_dump all custom {model}.numdiff.dump id fx fy fz f_d[*] modify format float %.17g
unfix d
"""

STRAINS = ("x", "y", "z", "xy", "xz", "yz")
STEP = 2e-4  # Å


def strain(model, name, step):
    """Commands that change one length or tilt of the box by ±step and print the energy."""
    change = f"change_box all {name} delta {{}} remap units box\n"
    change = change if len(name) == 2 else change.replace("delta ", "delta 0 ")
    pe = f'run 0\nprint "$(pe:%.17g)" append {model}.strain_{name}\n'
    return change.format(step) + pe + change.format(-2 * step) + pe + change.format(step)


EXCLUDED = [name for name in CASES if name.startswith("excluded")]
EDGES = ["host", "device"]  # where edges are made of LAMMPS's list


@pytest.fixture(scope="module")
def static(network_folder):
    """Runs all cases of each model."""
    write_start(network_folder / "gaps.start", STRUCTURES["bulk"], GAPS)
    for model in MODELS:
        script = start(model) + "neigh_modify every 1 delay 0 check yes\n"
        for name, (structure, before, after) in CASES.items():
            if name in EXCLUDED:
                continue
            script += load(structure, source="gaps.start" if name == "gaps" else None)
            if name == "edited":
                script += "group some id 5 6 20\n"
            script += f"{before}\nrun 0\n{write(f'{model}.{name}')}{after}\n"
            if name == "edited":
                script += "group some delete\n"
        script += load("bulk") + GROUP.format(model=model)
        script += load("small_cell") + DIFFERENCES.format(model=model)
        script += load("sheared") + "run 0\n" + write(f"{model}.strained")
        script += "".join(strain(model, name, STEP) for name in STRAINS)
        script += "delete_atoms group all\nrun 0\n"
        script += f'print "$(atoms) $(pe:%.17g) $(c_p[1]:%.17g)" file {model}.empty\n'
        for edges in EDGES:
            script += start(model, options=f"edges {edges}")
            for name in EXCLUDED:
                structure, before, after = CASES[name]
                script += f"{load(structure)}{before}\nrun 0\n{write(f'{model}.{edges}.{name}')}"
                script += after + "\n"
        run(script, network_folder, RANKS)
    return network_folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in EXCLUDED])
def test_lammps_equals_python_with(static, name, model):
    frame = check(static, f"{model}.{name}", model)
    assert np.abs(frame["fx"]).max() > 0.1
    if name == "unseen":
        assert (frame["type"] == 3).any()
        for column in ("fx", "c_e", "c_s[1]", "c_u[2]"):
            assert (frame[column][frame["type"] == 3] == 0).all()
    if name == "gaps":
        assert frame["id"].max() > 1e9 and frame["id"].tolist() == GAPS.tolist()
    if name == "edited":
        assert len(frame["id"]) == 2 * (27 - 3 + 1)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("model", MODELS)
def test_excluded_pairs_are_absent_in_both_directions(static, model, edges):
    out = f"{model}.{edges}.excluded_types"
    (frame,) = read_frames(static / f"{out}.dump")
    kind = frame["type"]
    check(static, out, model, lambda i, j: kind[i] == kind[j])
    with pytest.raises(AssertionError):
        check(static, out, model)

    out = f"{model}.{edges}.excluded_groups"
    (frame,) = read_frames(static / f"{out}.dump")
    low, high = frame["id"] <= 20, frame["id"] > 15
    check(static, out, model, lambda i, j: ~(low[i] & high[j] | high[i] & low[j]))


@pytest.mark.parametrize("model", MODELS)
def test_skin_changes_nothing(static, model):
    (thin,), (thick,) = (read_frames(static / f"{model}.skin_{s}.dump") for s in ("0.5", "3.0"))
    for name in thin.columns:
        if name != "proc":
            close(thick[name], thin[name], name)


@pytest.mark.parametrize("model", MODELS)
def test_compute_of_a_group_is_zero_outside_and_unchanged_inside(static, model):
    (frame,) = read_frames(static / f"{model}.group.dump")
    inside = frame["type"] == 1
    assert 0 < inside.sum() < len(inside)
    for k, field in enumerate(("force_std", "entropy"), start=1):
        everywhere = frame[f"c_u[{FIELDS.index(field) + 1}]"]
        np.testing.assert_array_equal(frame[f"c_g[{k}]"], np.where(inside, everywhere, 0.0))


@pytest.mark.parametrize("model", MODELS)
def test_forces_are_minus_energy_gradient_by_fix_numdiff(static, model):
    (frame,) = read_frames(static / f"{model}.numdiff.dump")
    forces = frame.vectors("fx", "fy", "fz")
    differences = frame.vectors("f_d[1]", "f_d[2]", "f_d[3]")
    # truncation: step² times a third derivative of some 100 eV/Å³, about 1e-6 eV/Å
    np.testing.assert_allclose(differences, forces, atol=1e-5 * np.abs(forces).max())


@pytest.mark.parametrize("model", MODELS)
def test_pressure_is_minus_energy_gradient_by_six_strains(static, model):
    (frame,) = read_frames(static / f"{model}.strained.dump")
    xx, yy, zz, xy, xz, yz = read_totals(static, f"{model}.strained")[1:]
    virial = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    places = {"x": (0, 0), "y": (1, 1), "z": (2, 2), "xy": (1, 0), "xz": (2, 0), "yz": (2, 1)}
    slopes, isotropic = {}, 0.0
    for name, place in places.items():
        above, below = np.loadtxt(static / f"{model}.strain_{name}")
        slopes[name] = (above - below) / (2 * STEP)
        change = np.zeros((3, 3))
        change[place] = 1.0
        # rows r @ (1 + strain) with strain = cell⁻¹ dcell; dE = -sum of virial times strain
        expected = -np.sum(virial * (np.linalg.inv(frame.cell) @ change))
        # truncation as for the forces; energies of 100 eV rounded at 1e-14 add 1e-9
        assert slopes[name] == pytest.approx(expected, abs=1e-5 * np.abs(virial).max())
        isotropic += slopes[name] * frame.cell[place]
    # lengths and tilts in proportion: dE / d ln(scale) = -3 P V
    assert isotropic == pytest.approx(-np.trace(virial), abs=1e-4 * np.abs(virial).max())


@pytest.mark.parametrize("model", MODELS)
def test_virials_of_atoms_sum_to_the_pressure(static, model):
    for name in ("unseen", "edited", "skin_0.5", "shrink_wrapped"):
        (frame,) = read_frames(static / f"{model}.{name}.dump")
        energy, volume, *pressure = np.loadtxt(static / f"{model}.{name}.thermo")
        sums = np.array([frame[f"c_s[{k}]"].sum() for k in range(1, 7)])
        close(-sums / volume / 1e4, np.array(pressure) / 1e4, name)
        close(frame["c_e"].sum(), energy, name)


@pytest.mark.parametrize("model", MODELS)
def test_no_atoms_have_no_energy(static, model):
    assert np.loadtxt(static / f"{model}.empty").tolist() == [0, 0, 0]


# --- together with other pair styles -------------------------------------------------------------

MLIAP = "mliap model {model}"
COEFF = "pair_coeff * * mliap Si O NULL\n"
CHARGES = "set type 1 charge 0.6\nset type 2 charge -0.4\n"
WITHOUT_FIELDS = COLUMNS.replace(" c_u[*]", "")

# name -> (structure, the style together with the model, the same alone)
HYBRIDS = {
    "zbl": (
        "liquid",
        f"pair_style hybrid/overlay zbl 1.5 2.5 {MLIAP}\n{COEFF}pair_coeff * * zbl 14.0 14.0",
        "pair_style zbl 1.5 2.5\npair_coeff * * 14.0 14.0",
    ),
    # longer cutoffs than the model's: LAMMPS trims the model's list out of the longer one
    "coul_cut": (
        "liquid",
        f"pair_style hybrid/overlay {MLIAP} coul/cut 6.5\n{COEFF}pair_coeff * * coul/cut",
        "pair_style coul/cut 6.5\npair_coeff * *",
    ),
    "coul_dsf": (
        "sheared",
        f"pair_style hybrid/overlay coul/dsf 0.2 7.0 {MLIAP}\npair_coeff * * coul/dsf\n{COEFF}",
        "pair_style coul/dsf 0.2 7.0\npair_coeff * *",
    ),
    "hybrid": (
        "unseen",
        f"pair_style hybrid {MLIAP} lj/cut 5.0\n{COEFF}pair_coeff * 3 lj/cut 0.05 2.1",
        "pair_style hybrid zero 5.0 lj/cut 5.0\npair_coeff * * zero\n"
        "pair_coeff * 3 lj/cut 0.05 2.1",
    ),
}


@pytest.fixture(scope="module")
def hybrids(network_folder):
    """Evaluates each style with and without each model."""
    for model in MODELS:
        script = ""
        for name, (structure, pair, alone) in HYBRIDS.items():
            script += start(model, "atom_style charge", pair=pair.format(model=model))
            script += load(structure) + CHARGES + "run 0\n" + write(f"{model}.{name}")
            script += f"uncompute u\n{alone}\nrun 0\n"
            script += write(f"{model}.{name}.alone", WITHOUT_FIELDS)
        run(script, network_folder, RANKS)
    return network_folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_adds_the_other_style(hybrids, name, model):
    (total,) = read_frames(hybrids / f"{model}.{name}.dump")
    (other,) = read_frames(hybrids / f"{model}.{name}.alone.dump")
    assert np.abs(other["fx"]).max() > 0.01
    added = [k for k in total.columns if k[:3] in ("fx", "fy", "fz", "c_e", "c_s")]
    columns = {k: v - other[k] if k in added else v for k, v in total.columns.items()}
    rest = Frame(total.step, total.cell, total.pbc, columns)
    check_frame(hybrids / model, rest)
    totals = read_totals(hybrids, f"{model}.{name}")
    totals -= read_totals(hybrids, f"{model}.{name}.alone")
    check_totals(hybrids / model, rest, totals)


def test_two_models_in_one_hybrid_scaled(network_folder):
    first, second = MODELS[0], MODELS[1]
    pair = f"""pair_style hybrid/scaled 0.3 mliap model {first} 1 zero 4 0.7 mliap model {second}
pair_coeff * 3 zero
pair_coeff * * mliap 1 Si O NULL
pair_coeff * * mliap 2 Si O NULL"""
    script = start("", pair=pair, fields=False) + load("sheared") + "run 0\n"
    run(script + write("scaled", WITHOUT_FIELDS), network_folder, RANKS)
    (frame,) = read_frames(network_folder / "scaled.dump")
    want = [python_results(network_folder / model, frame) for model in (first, second)]
    mixed = {k: 0.3 * want[0][k] + 0.7 * want[1][k] for k in ("forces", "energy", "virials")}
    close(frame.vectors("fx", "fy", "fz"), mixed["forces"], "forces")
    close(frame["c_e"], mixed["energy"], "energies")
    totals = read_totals(network_folder, "scaled")
    close(totals, [mixed["energy"].sum(), *mixed["virials"].sum(0)], "energy and virial")


# --- molecules -----------------------------------------------------------------------------------

CHAIN = """chain

5 atoms
3 atom types
4 bonds
1 bond types

0 12 xlo xhi
0 12 ylo yhi
0 12 zlo zhi

Masses

1 28.085
2 15.999
3 40

Atoms # bond

1 1 1 2.0 2.0 2.0
2 1 2 3.4 2.3 2.1
3 1 1 4.2 3.6 2.0
4 1 2 5.7 3.4 2.6
5 1 1 6.4 4.8 2.5

Bonds

1 1 1 2
2 1 2 3
3 1 3 4
4 1 4 5
"""


def chain(model, special):
    return f"""
clear
units metal
atom_style bond
special_bonds {special}
read_data chain.data
pair_style mliap model {model}
pair_coeff * * Si O NULL
bond_style zero
bond_coeff *
compute e all pe/atom
compute s all stress/atom NULL virial
compute u all hlgauss/atom {" ".join(FIELDS)}
compute p all pressure NULL virial
thermo_style custom step pe c_p[*]
run 0
"""


@pytest.mark.parametrize("model", MODELS)
def test_special_bonds_that_keep_neighbours_change_nothing(network_folder, model):
    (network_folder / "chain.data").write_text(CHAIN)
    kept = ["lj/coul 1 1 1", "lj/coul 0.2 0.5 0.5", "lj 0 0 0 coul 1 1 0.5"]
    script = "".join(
        chain(model, special) + write(f"{model}.chain{k}") for k, special in enumerate(kept)
    )
    run(script, network_folder, RANKS)
    for k in range(len(kept)):
        frame = check(network_folder, f"{model}.chain{k}", model)
        assert len(frame["id"]) == 5 and np.abs(frame["fx"]).min() > 0.01


def test_special_bonds_that_drop_neighbours_are_refused(network_folder):
    (network_folder / "chain.data").write_text(CHAIN)
    cases = {
        special: chain(MODELS[0], special).splitlines()
        for special in ("lj/coul 0 1 1", "lj/coul 1 0 1", "lj/coul 1 1 0", "lj 0 1 1")
    }
    (network_folder / "cases.json").write_text(json.dumps([cases, []]))
    (network_folder / "driver.py").write_text(DRIVER)
    subprocess.run([sys.executable, "driver.py"], cwd=network_folder, check=True, timeout=300)
    messages = json.loads((network_folder / "messages.json").read_text())
    assert list(messages) == list(cases)
    for message in messages.values():
        assert "weights of 0" in message and "special_bonds lj/coul 1 1 1" in message


# two atoms are near enough to be bonded
BOND_CREATE = """
units metal
atom_style bond
special_bonds {special}
read_data unbonded.data extra/bond/per/atom 4 extra/special/per/atom 8 extra/bond/types 1
pair_style mliap model {model}
pair_coeff * * Si O NULL
bond_style zero
bond_coeff *
comm_modify cutoff 6
fix 1 all bond/create 1 1 2 1.6 1
fix 2 all nve
timestep 0.000001
thermo_style custom step pe bonds
run 4
write_dump all custom created.dump id type x y z fx fy fz modify format float %.17g
print "$(bonds)" file created.bonds
"""


def test_bonds_created_in_a_run_change_nothing_when_their_neighbours_stay(network_folder):
    unbonded = CHAIN.replace("4 bonds\n1 bond types\n", "").split("Bonds")[0]
    (network_folder / "unbonded.data").write_text(unbonded)
    script = BOND_CREATE.format(model=MODELS[0], special="lj/coul 1 1 1")
    run(script, network_folder, 1)
    assert np.loadtxt(network_folder / "created.bonds") > 0
    (frame,) = read_frames(network_folder / "created.dump")
    check_frame(network_folder / MODELS[0], frame)


def test_bonds_created_in_a_run_that_drop_neighbours_are_refused(network_folder):
    unbonded = CHAIN.replace("4 bonds\n1 bond types\n", "").split("Bonds")[0]
    (network_folder / "unbonded.data").write_text(unbonded)
    script = BOND_CREATE.format(model=MODELS[0], special="lj/coul 0 0 0")
    result = run_lammps(script, network_folder)
    assert "special_bonds lj/coul 1 1 1" in result.stdout and result.returncode != 0
