"""Real small networks in LAMMPS: model files, structures, and what Python says of a dumped frame.

A dump file is both the input of a run (`read_dump`) and its result, so that one LAMMPS process with
one loaded model can go through many structures, and a result can be checked from its file alone.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms as AseAtoms
from conftest import ELEMENTS, calibrated, make_card, make_potential, make_structure
from lammps_cases import MASSES, Atoms, cluster, crystal, run_lammps
from test_agreement import BAR_PER_EV_A3, FIELDS, FLOAT64

from lmp_hl import keys
from lmp_hl.calculator import HLCalculator
from lmp_hl.export import export_potential
from lmp_hl.graph import graph_inputs

# every law is tested for each of these model files; `make test-all` adds the compiled ones
RUNTIMES = os.environ.get("LMP_HL_TEST_RUNTIMES", "pt").split()
MODELS = [f"{preset}.{runtime}" for runtime in RUNTIMES for preset in ("local", "mp")]
SYMBOLS = ELEMENTS[:2]


def write_models(folder: Path) -> None:
    """Export the models: MODELS, and per preset one of 15 Å and one of three elements."""
    for preset in ("local", "mp"):
        export_potential(calibrated(preset), SYMBOLS, make_card(), folder / f"{preset}.pt")
        wide = make_potential(preset, num_elements=2, cutoff=15.0)
        export_potential(wide, SYMBOLS, make_card(), folder / f"wide_{preset}.pt")
        many = make_potential(preset, num_elements=3)
        export_potential(many, ELEMENTS, make_card(), folder / f"three_{preset}.pt")


# --- structures ----------------------------------------------------------------------------------


def slab() -> Atoms:
    """Four layers of atoms in a box that is mostly vacuum along z."""
    atoms = crystal(31, repeat=4)
    cell = atoms.cell + np.diag([0, 0, 33.0])
    return Atoms(atoms.positions + np.array([0, 0, 4.0]), atoms.species, cell, (True, True, False))


def liquid() -> Atoms:
    """Atoms at random places at least 1.7 Å apart."""
    rng = np.random.default_rng(32)
    side, points = 9.7, np.empty((0, 3))
    while len(points) < 45:
        point = side * rng.random(3)
        delta = points - point
        delta -= side * np.round(delta / side)
        if np.all(np.linalg.norm(delta, axis=1) > 1.7):
            points = np.vstack([points, point])
    return Atoms(points, rng.integers(0, 2, len(points)), side * np.eye(3))


def with_unseen_type() -> Atoms:
    """Every fourth atom is of a third type, which models of two elements do not see."""
    atoms = crystal(37)
    atoms.types[::4] = 3
    return atoms


def three_elements() -> Atoms:
    """Si, O and Cu in a triclinic box."""
    made = make_structure(ELEMENTS, 20, seed=33)
    cell, rotation = made.cell.standard_form()
    species = [ELEMENTS.index(symbol) for symbol in made.symbols]
    return Atoms(made.positions @ rotation.T, species, cell[:])


STRUCTURES = {
    "bulk": crystal(34),
    "liquid": liquid(),
    "slab": slab(),
    "unseen": with_unseen_type(),
    "sheared": crystal(38, triclinic=True),
    "molecule": cluster(35),  # one of its atoms is alone
    "isolated": Atoms([[4.0, 5.0, 6.0]], [1], 30 * np.eye(3), (False, False, False)),
    "triclinic": crystal(36, triclinic=True, repeat=4),
    "small_cell": Atoms(  # every cell vector is shorter than the cutoff
        [[0.1, 0.2, 0.3], [1.2, 0.9, 1.6], [2.2, 2.6, 0.9]],
        [0, 1, 1],
        [[2.9, 0, 0], [0.4, 3.1, 0], [-0.3, 0.5, 3.0]],
    ),
    # every cell vector is shorter than a cutoff of 15 Å
    "thin": Atoms(
        [[0.5, 1.0, 2.0], [1.7, 2.0, 1.2], [7.0, 8.0, 6.0], [4.0, 3.0, 11.0]],
        [0, 1, 0, 1],
        [[11.0, 0, 0], [2.0, 12.0, 0], [-1.5, 1.0, 12.5]],
    ),
    "three_elements": three_elements(),
}


def write_start(path: Path, atoms: Atoms, ids: np.ndarray | None = None) -> None:
    """Write a structure as a dump file that `read_dump` takes; IDs count from 1 unless given."""
    ids = np.arange(1, len(atoms.types) + 1) if ids is None else ids
    cell = atoms.cell
    xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
    low = [min(0, xy, xz, xy + xz), min(0, yz), 0]
    high = [cell[0, 0] + max(0, xy, xz, xy + xz), cell[1, 1] + max(0, yz), cell[2, 2]]
    bounds = np.stack([low, high], 1)
    triclinic = bool(xy or xz or yz)
    if triclinic:
        bounds = np.column_stack([bounds, [xy, xz, yz]])
    lines = ["ITEM: TIMESTEP", "0", "ITEM: NUMBER OF ATOMS", str(len(ids))]
    lines.append(f"ITEM: BOX BOUNDS {'xy xz yz ' if triclinic else ''}pp pp pp")
    lines += [" ".join(map(repr, row)) for row in bounds.tolist()]
    lines.append("ITEM: ATOMS id type x y z")
    for i, kind, x in zip(ids, atoms.types, atoms.positions.tolist(), strict=True):
        lines.append(f"{i} {kind} {x[0]!r} {x[1]!r} {x[2]!r}")
    path.write_text("\n".join(lines) + "\n")


# --- what LAMMPS wrote ---------------------------------------------------------------------------


@dataclass
class Frame:
    """One frame of a dump: box and columns, sorted by atom ID."""

    step: int
    cell: np.ndarray  # (3, 3) rows in Å
    pbc: list[bool]
    columns: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def vectors(self, *names: str) -> np.ndarray:
        return np.stack([self.columns[name] for name in names], 1)

    @property
    def positions(self) -> np.ndarray:
        return self.vectors("x", "y", "z")


def read_frames(path: Path) -> list[Frame]:
    """All frames of a `dump custom` file."""
    frames = []
    for block in path.read_text().split("ITEM: TIMESTEP\n")[1:]:
        lines = block.splitlines()
        flags = lines[3].split()[3:]
        bounds = np.array([[float(word) for word in line.split()] for line in lines[4:7]])
        xy, xz, yz = bounds[:, 2] if bounds.shape[1] == 3 else (0.0, 0.0, 0.0)
        low = bounds[:, 0] - [min(0, xy, xz, xy + xz), min(0, yz), 0]
        high = bounds[:, 1] - [max(0, xy, xz, xy + xz), max(0, yz), 0]
        cell = np.diag(high - low)
        cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
        names = lines[7].split()[2:]
        rows = np.array([[float(word) for word in line.split()] for line in lines[8:]])
        rows = rows.reshape(-1, len(names))
        rows = rows[np.argsort(rows[:, names.index("id")])]
        columns = dict(zip(names, rows.T, strict=True))
        frames.append(Frame(int(lines[0]), cell, [f == "pp" for f in flags[-3:]], columns))
    return frames


COLUMNS = "id type x y z fx fy fz c_e c_s[*] c_u[*] proc"
PRINT = " ".join(f"$({n}:%.17g)" for n in ["pe", "vol", *(f"c_p[{k}]" for k in range(1, 7))])


def write(out: str, columns: str = COLUMNS) -> str:
    """Commands that write everything about the present step to out.dump and out.thermo."""
    return f"""
write_dump all custom {out}.dump {columns} modify format float %.17g
print "{PRINT}" file {out}.thermo
"""


def start(
    model: str,
    before: str = "",
    pair: str = "",
    elements: str = "Si O NULL",
    fields: bool = True,
    options: str = "",
) -> str:
    """Commands from `clear` to an empty box with one model loaded and every result computed."""
    pair = pair or f"pair_style mliap model {model} {options}\npair_coeff * * {elements}"
    return f"""
clear
units metal
atom_modify map yes
{before}
region box block 0 9 0 9 0 9
create_box 3 box
mass 1 {MASSES[0]}
mass 2 {MASSES[1]}
mass 3 {63.546 if elements.endswith("Cu") else 40.0}
{pair}
timestep 0.0002
neighbor 0.9 bin  # LAMMPS refuses tiles when ghosts reach further than the box is long
compute e all pe/atom
compute s all stress/atom NULL virial
{"compute u all hlgauss/atom " + " ".join(FIELDS) if fields else ""}
compute p all pressure NULL virial
thermo_style custom step temp pe c_p[*]
"""


def load(name: str, boundary: str | None = None, source: str | None = None) -> str:
    """Commands that put a structure in the place of what is in the box."""
    atoms = STRUCTURES[name]
    boundary = boundary or " ".join("p" if p else "f" for p in atoms.periodic)
    shape = "triclinic" if np.any(np.tril(atoms.cell, -1)) else "ortho"
    return f"""
delete_atoms group all
if "$(xy^2+xz^2+yz^2) > 0" then "change_box all xy final 0 xz final 0 yz final 0"
change_box all boundary p p p x final 0 9 y final 0 9 z final 0 9
change_box all {shape}
change_box all boundary {boundary}
read_dump {source or name + ".start"} 0 x y z box yes purge yes replace no add keep
reset_timestep 0
"""


# --- what Python says ----------------------------------------------------------------------------


@functools.cache
def calculator(path: Path) -> HLCalculator:
    return HLCalculator(path)


def python_results(path: Path, frame: Frame, keep=None) -> dict[str, np.ndarray]:
    """Energies, forces, virials (xx yy zz xy xz yz) of each atom in eV and Å, and every field.

    Args:
        path: model file.
        frame: atom types are 1 + the index of the model's element; higher types are not seen.
        keep: (i, j) -> which edges from atom i to atom j count, by row of the frame; all if None.
    """
    model = calculator(path).model
    seen = np.flatnonzero(frame["type"] <= len(model.elements))
    symbols = np.array(model.elements)[frame["type"][seen].astype(int) - 1]
    atoms = AseAtoms(symbols, frame.positions[seen], cell=frame.cell, pbc=frame.pbc)
    inputs = graph_inputs(atoms, model.elements, model.cutoff, model.num_layers, model.dtype)
    if keep is not None:
        i, j = seen[inputs[keys.EDGE_INDEX].numpy()]
        mask = torch.from_numpy(keep(i, j))
        inputs[keys.EDGE_INDEX] = inputs[keys.EDGE_INDEX][:, mask]
        inputs[keys.EDGE_VECTORS] = inputs[keys.EDGE_VECTORS][mask]
        if keys.LAYER_EDGES in inputs:
            inputs[keys.LAYER_EDGES] = torch.full_like(inputs[keys.LAYER_EDGES], int(mask.sum()))
    outputs = model.evaluate(inputs, with_fields=True)
    i, j = seen[inputs[keys.EDGE_INDEX].numpy()]
    r = inputs[keys.EDGE_VECTORS].double().numpy()
    g = outputs[keys.EDGE_GRADIENTS].double().numpy()

    num_atoms = len(frame["id"])
    forces, virials = np.zeros((num_atoms, 3)), np.zeros((num_atoms, 6))
    np.add.at(forces, i, g)
    np.add.at(forces, j, -g)
    outer = -0.5 * (r[:, :, None] * g[:, None] + g[:, :, None] * r[:, None])
    voigt = outer[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    np.add.at(virials, i, 0.5 * voigt)
    np.add.at(virials, j, 0.5 * voigt)
    results = {"forces": forces, "virials": virials}
    for name in (keys.ENERGY, *FIELDS):
        results[name] = np.zeros(num_atoms)
        results[name][seen] = outputs[name].double().numpy()
    return results


def close(got, expected, what: str) -> None:
    """Equal within the rounding of float64, relative to the largest value."""
    expected = np.asarray(expected)
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT64 * scale, err_msg=what)


def check_frame(path: Path, frame: Frame, keep=None) -> None:
    """Whatever of energies, forces, virials and fields a frame holds equals Python's."""
    want = python_results(path, frame, keep)
    columns = frame.columns
    if "fx" in columns:
        close(frame.vectors("fx", "fy", "fz"), want["forces"], "forces")
    if "c_e" in columns:
        close(frame["c_e"], want[keys.ENERGY], "energy of each atom")
    if "c_s[1]" in columns:  # LAMMPS gives -virial times its unit of pressure
        virials = -frame.vectors(*(f"c_s[{k}]" for k in range(1, 7))) / BAR_PER_EV_A3
        close(virials, want["virials"], "virial of each atom")
    for k, field in enumerate(FIELDS, start=1):
        if f"c_u[{k}]" in columns:
            close(frame[f"c_u[{k}]"], want[field], field)


def read_totals(folder: Path, out: str) -> np.ndarray:
    """Energy and the six components of the virial, eV, that `write` wrote."""
    energy, volume, *pressure = np.loadtxt(folder / f"{out}.thermo")
    return np.array([energy, *(np.array(pressure) * volume / BAR_PER_EV_A3)])


def check_totals(path: Path, frame: Frame, totals: np.ndarray, keep=None) -> None:
    """Energy and virial equal the sums over Python's atoms."""
    want = python_results(path, frame, keep)
    close(totals[0], want[keys.ENERGY].sum(), "energy")
    close(totals[1:], want["virials"].sum(0), "virial")


def check(folder: Path, out: str, model: str, keep=None) -> Frame:
    """Everything that `write` wrote equals Python at the positions written; returns the frame."""
    (frame,) = read_frames(folder / f"{out}.dump")
    check_frame(folder / model, frame, keep)
    check_totals(folder / model, frame, read_totals(folder, out), keep)
    return frame


def run(script: str, folder: Path, num_ranks: int) -> str:
    """Run a script that must succeed; what LAMMPS printed."""
    result = run_lammps(script, folder, num_ranks)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    return result.stdout
