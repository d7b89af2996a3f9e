"""Measure how converged the silicon labels are and whether they are consistent.

    python check_labels.py --work si_work cutoff derivatives kpoints

Takes frames that make_data.py has sampled in the same work folder. ``cutoff`` compares the
production settings with finer ones; ``derivatives`` compares a force and a stress component with
central differences of the energy; ``kpoints`` compares the Gamma point with a 2 x 2 x 2 mesh,
which takes many times as long as a label. The README quotes the output.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from ase.units import GPa
from labels import Labelling, single_point, start_worker

PRODUCTION = Labelling()
FINE = replace(PRODUCTION, cutoff=400.0, rel_cutoff=60.0, eps_default=1e-12, eps_scf=1e-7)
FRAMES = ("train_strained_00", "train_liquid_00")
DISPLACEMENT = 0.02  # Å
STRAIN = 0.004


def label_all(jobs: list[tuple[Atoms, Labelling]], arguments: argparse.Namespace) -> list[dict]:
    """Label configurations in processes of their own, in order."""
    with ProcessPoolExecutor(
        arguments.workers, multiprocessing.get_context("spawn"), initializer=start_worker
    ) as pool:
        results = [
            pool.submit(
                single_point, atoms, settings, arguments.work / f"check/{k}", arguments.cp2k
            )
            for k, (atoms, settings) in enumerate(jobs)
        ]
        return [result.result() for result in results]


def sampled(name: str, arguments: argparse.Namespace) -> Atoms:
    """A configuration that make_data.py has sampled."""
    return read(arguments.work / "sampled" / f"{name}.xyz")


def report_difference(name: str, num_atoms: int, label: dict, reference: dict) -> None:
    """Print energy, force and stress differences of two labels of one configuration."""
    delta = np.subtract(label["forces"], reference["forces"])  # (num_atoms, 3), eV/Å
    size = np.sqrt(np.mean(np.square(reference["forces"])))
    energy = (label["energy"] - reference["energy"]) / num_atoms  # eV/atom
    print(
        f"  {name}: energy {1e3 * energy:+.4f} meV/atom,"
        f" forces RMS {1e3 * np.sqrt(np.mean(delta**2)):.3f} max {1e3 * np.abs(delta).max():.3f}"
        f" meV/Å (RMS force {1e3 * size:.0f}), stress max"
        f" {np.abs(np.subtract(label['stress'], reference['stress'])).max() / GPa:.5f} GPa,"
        f" {label['seconds']:.0f} s against {reference['seconds']:.0f} s",
        flush=True,
    )


def check_cutoff(arguments: argparse.Namespace) -> None:
    """Production settings against fine ones; also for the difference between two frames."""
    frames = [sampled(name, arguments) for name in FRAMES]
    labels = label_all([(a, s) for a in frames for s in (PRODUCTION, FINE)], arguments)
    print(f"cutoff {PRODUCTION.cutoff:.0f} Ry against {FINE.cutoff:.0f} Ry")
    for k, (name, atoms) in enumerate(zip(FRAMES, frames, strict=True)):
        report_difference(name, len(atoms), *labels[2 * k : 2 * k + 2])


def check_derivatives(arguments: argparse.Namespace) -> None:
    """Force and stress components against central differences of the energy."""
    liquid, strained = sampled(FRAMES[1], arguments), sampled(FRAMES[0], arguments)
    jobs = [(liquid, PRODUCTION), (strained, PRODUCTION)]
    for sign in (1, -1):
        moved = liquid.copy()
        moved.positions[0, 0] += sign * DISPLACEMENT
        jobs.append((moved, PRODUCTION))
    for i, j in ((0, 0), (1, 2)):
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * STRAIN / 2
            strain[j, i] += sign * STRAIN / 2
            strained_more = strained.copy()
            strained_more.set_cell(strained.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
            jobs.append((strained_more, PRODUCTION))
    labels = label_all(jobs, arguments)
    energy = [label["energy"] for label in labels]
    difference = -(energy[2] - energy[3]) / (2 * DISPLACEMENT)
    print(
        f"force on atom 0 along x, {FRAMES[1]}: {labels[0]['forces'][0][0]:.5f} eV/Å,"
        f" from energies at ±{DISPLACEMENT} Å {difference:.5f} eV/Å"
    )
    # dE = V sum_ij stress_ij strain_ij, positive in tension: ASE's sign. A pair of equal shear
    # components ε/2 gives V stress_ij ε, just as one diagonal component ε does.
    for k, component, name in ((4, 0, "xx"), (6, 3, "yz")):
        difference = (energy[k] - energy[k + 1]) / (2 * STRAIN * strained.get_volume())
        print(
            f"stress {name}, {FRAMES[0]}: {labels[1]['stress'][component] / GPa:.4f} GPa,"
            f" from energies at strain ±{STRAIN} {difference / GPa:.4f} GPa",
            flush=True,
        )


def check_kpoints(arguments: argparse.Namespace) -> None:
    """Gamma point against a 2 x 2 x 2 Monkhorst-Pack mesh."""
    mesh = replace(PRODUCTION, kpoints=(2, 2, 2))
    frames = [sampled(name, arguments) for name in arguments.kpoint_frames]
    labels = label_all([(a, s) for a in frames for s in (PRODUCTION, mesh)], arguments)
    print("Gamma point against 2 x 2 x 2")
    for k, (name, atoms) in enumerate(zip(arguments.kpoint_frames, frames, strict=True)):
        report_difference(name, len(atoms), *labels[2 * k : 2 * k + 2])


CHECKS = {"cutoff": check_cutoff, "derivatives": check_derivatives, "kpoints": check_kpoints}


def main() -> None:
    """Run the checks named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="+", choices=CHECKS)
    parser.add_argument("--work", type=Path, required=True, help="work folder of make_data.py")
    parser.add_argument("--workers", type=int, default=1, help="CP2K processes at a time")
    parser.add_argument("--cp2k", default="cp2k.psmp", help="CP2K executable")
    parser.add_argument("--kpoint-frames", nargs="+", default=["train_crystal_00"], metavar="NAME")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    for name in arguments.checks:
        CHECKS[name](arguments)


if __name__ == "__main__":
    main()
