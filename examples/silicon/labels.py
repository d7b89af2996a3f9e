"""Labels of the silicon data: energies, forces and stresses from PBE in CP2K."""

import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ase import Atoms
from ase.units import Rydberg


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
