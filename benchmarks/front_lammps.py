"""Predictions and time per step of a pair style in LAMMPS, from the very file a run would use."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import front_process
import numpy as np
from ase import Atoms
from ase.calculators.lammps import Prism
from ase.data import atomic_masses, atomic_numbers
from ase.io.lammpsdata import write_lammps_data
from ase.units import GPa
from front_rows import Crystal
from numpy.typing import NDArray

Array = NDArray[np.float64]

WARM_STEPS = 5
BAR = 1e-4 * GPa  # eV/Å³

FRAME = """
clear
units metal
box tilt large
read_data frame{k}.data
{pair}
thermo_style custom step pe pxx pyy pzz pxy pxz pyz
run 0 post no
print "frame {k} {values}"
write_dump all custom frame{k}.dump id fx fy fz modify sort id format float %.17g
"""

VALUES = "$(pe:%.17g) " + " ".join(f"$(p{c}:%.17g)" for c in ("xx", "yy", "zz", "yz", "xz", "xy"))

CRYSTAL = """
units metal
lattice {lattice} {constant}
region box block 0 {cells[0]} 0 {cells[1]} 0 {cells[2]}
create_box 1 box
create_atoms 1 box
mass 1 {mass}
{pair}
velocity all create 600 77
fix nve all nve
thermo 1000000
run {warm}
"""
TIMING = (
    CRYSTAL
    + """
timer timeout {seconds} every 1
run 1000000
"""
)


def pair_lines(style: str, element: str) -> str:
    """pair_style and pair_coeff of a model file."""
    return f"pair_style {style}\npair_coeff * * {element}"


def predict(
    words: Sequence[str],
    pair: str,
    frames: Sequence[Atoms],
    folder: Path,
    variables: Mapping[str, str],
) -> dict[str, Array]:
    """Energies (num_frames,), forces (num_atoms in all, 3), stresses (num_frames, 3, 3).

    eV and Å, stress positive in tension. LAMMPS wants the first cell vector along x and the second
    in the xy plane: frames are turned there and results back.

    Args:
        words: that start LAMMPS on one rank.
        pair: lines of input.
        frames: of one element.
        folder: for the files.
        variables: of the environment.

    Raises:
        ValueError: LAMMPS failed.
    """
    script, prisms = "", []
    for k, atoms in enumerate(frames):
        prisms.append(Prism(atoms.cell.array, atoms.pbc))
        symbols = sorted(set(atoms.symbols))
        with open(folder / f"frame{k}.data", "w") as file:
            write_lammps_data(
                file, atoms, specorder=symbols, masses=True, prismobj=prisms[-1], units="metal"
            )
        script += FRAME.format(k=k, pair=pair, values=VALUES)
    (folder / "in.frames").write_text(script)
    done = front_process.run([*words, "-in", "in.frames", "-log", "none"], folder, variables)
    found = re.findall(r"^frame \d+ (.*)$", done.output, re.M)
    if len(found) != len(frames):
        raise ValueError(f"LAMMPS stopped: {front_process.reason_in(done.output)}")
    numbers = np.array([[float(word) for word in line.split()] for line in found])
    forces, stresses = [], []
    for k, (prism, row) in enumerate(zip(prisms, numbers, strict=True)):
        table = np.loadtxt(folder / f"frame{k}.dump", skiprows=9, ndmin=2)
        forces.append(prism.vector_to_ase(table[:, 1:]))
        xx, yy, zz, yz, xz, xy = -BAR * row[1:]
        tensor = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        stresses.append(prism.tensor2_to_ase(tensor))
        for name in (f"frame{k}.data", f"frame{k}.dump"):
            (folder / name).unlink()
    return {"energy": numbers[:, 0], "forces": np.concatenate(forces), "stress": np.array(stresses)}


def measure(
    words: Sequence[str],
    pair: str,
    element: str,
    crystal: Crystal,
    seconds: float,
    folder: Path,
    variables: Mapping[str, str],
) -> tuple[float, float]:
    """µs per atom and step of NVE at 300 K, and the peak memory of the process in MiB.

    Processor time: LAMMPS says how long its loop took and what share of that it computed.

    Raises:
        ValueError: LAMMPS failed.
    """
    script = TIMING.format(
        lattice=crystal.lattice,
        constant=crystal.constant,
        cells=crystal.cells,
        mass=atomic_masses[atomic_numbers[element]],
        pair=pair,
        warm=WARM_STEPS,
        seconds=seconds,
    )
    (folder / "in.timing").write_text(script)
    done = front_process.run([*words, "-in", "in.timing", "-log", "none"], folder, variables)
    return times_of_runs(done.output, 2)[-1], done.peak


def times_of_runs(output: str, number: int) -> list[float]:
    """Processor time of every `run` of one rank, µs per atom and step.

    Raises:
        ValueError: not so many are in the output: LAMMPS failed.
    """
    loops = re.findall(
        r"^Loop time of (\S+) on 1 procs for (\d+) steps with (\d+) atoms", output, re.M
    )
    shares = re.findall(r"^(\S+)% CPU use with", output, re.M)
    if len(loops) != number or len(shares) != number:
        raise ValueError(f"LAMMPS stopped: {front_process.reason_in(output)}")
    if any(int(atoms) == 0 for _, _, atoms in loops):
        raise ValueError("all atoms were lost: the potential does not hold the crystal together")
    return [
        1e4 * float(took) * float(share) / int(steps) / int(atoms)
        for (took, steps, atoms), share in zip(loops, shares, strict=True)
    ]
