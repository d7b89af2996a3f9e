"""A small crystal that LAMMPS runs without a model, for tests of the trajectory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

BIN = Path(sys.prefix) / "bin"

# 256 atoms of a binary Lennard-Jones crystal, with computes to write
CRYSTAL = """
units metal
atom_modify map yes
boundary {boundary}
lattice fcc 3.615
region b {region}
create_box 2 b
create_atoms 1 box
set group all type/fraction 2 0.3 4711
mass 1 63.546
mass 2 58.69
pair_style lj/cut 5
pair_coeff * * 0.1 2.3
velocity all create {temperature} 1234
compute pe all pe/atom
compute s all stress/atom NULL
compute n all coord/atom cutoff 3.0
thermo 100
"""


def crystal(region="block 0 4 0 4 0 4", boundary="p p p", temperature=600):
    return CRYSTAL.format(region=region, boundary=boundary, temperature=temperature)


def lmp(folder, script, ranks=1, ok=True, **options):
    """Run LAMMPS on `script` in `folder`; return everything it printed."""
    (folder / "in.lmp").write_text(script)
    command = [str(BIN / "lmp"), "-in", "in.lmp", "-log", "none", "-nocite"]
    if ranks > 1:
        command = [str(BIN / "mpirun"), "-np", str(ranks), *command]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, **options
    )
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def error_line(output):
    """The one line that LAMMPS prints about an error."""
    lines = [line for line in output.splitlines() if line.startswith("ERROR")]
    assert len(lines) == 1, output[-2000:]
    return lines[0]


def read_dump(path):
    """LAMMPS text dump as a list of (step, {column: values}), without the column of text."""
    frames = []
    for block in path.read_text().split("ITEM: TIMESTEP\n")[1:]:
        lines = block.splitlines()
        start = next(k for k, line in enumerate(lines) if line.startswith("ITEM: ATOMS"))
        names = lines[start].split()[2:]
        left = [k for k, name in enumerate(names) if name != "element"]
        rows = np.array(
            [[line.split()[k] for k in left] for line in lines[start + 1 :]], float
        ).reshape(-1, len(left))
        columns = dict(zip([names[k] for k in left], rows.T, strict=True))
        frames.append((int(lines[0]), columns))
    return frames


CONTINUE = """
read_restart at.restart
pair_style lj/cut 5
pair_coeff * * 0.1 2.3
compute pe all pe/atom
fix nve all nve
"""
