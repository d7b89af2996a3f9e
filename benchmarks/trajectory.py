"""Time and size of a frame: fix hlgauss/h5md beside LAMMPS's dump custom and dump custom/gz.

    python benchmarks/trajectory.py

Copper atoms under `pair_style zero` move freely, so a step costs next to nothing and a frame at
every step is what is timed: id, type, x, v and f of all atoms. Every variant is run in turn,
`--repeats` times, so all meet the same machine and the same neighbours on it. The time is LAMMPS's
own for the loop; what the operating system has not yet brought to the disk is not in it, for any
variant. Writes results/trajectory.json and results/trajectory.md.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lmp_hl import __version__
from lmp_hl.h5md import open_trajectory
from lmp_hl.lammps import command

INPUT = """
units metal
lattice fcc 3.615
region box block 0 {cells} 0 {cells} 0 {cells}
create_box 1 box
create_atoms 1 box
mass 1 63.546
pair_style zero 3.0
pair_coeff * *
velocity all create 600 1234
fix nve all nve
neigh_modify every 1000000 check no
thermo 1000000
{output}
run {frames}
"""

DUMP = "id type x y z vx vy vz fx fy fz"
GZIP = f"dump d all custom/gz 1 out.gz {DUMP}"
H5MD = "fix h all hlgauss/h5md 1 out.h5md id type x v f overwrite"

# name -> (lines, name of what it is compared with)
VARIANTS = {
    "nothing written": ("", ""),
    "dump custom": (f"dump d all custom 1 out.dump {DUMP}", ""),
    "dump custom, sort id": (f"dump d all custom 1 out.dump {DUMP}\ndump_modify d sort id", ""),
    "fix hlgauss/h5md": (H5MD, "dump custom"),
    "fix hlgauss/h5md, precision double": (f"{H5MD} precision double", "dump custom"),
    "dump custom/gz": (GZIP, ""),
    "dump custom/gz, compression_level 1": (f"{GZIP}\ndump_modify d compression_level 1", ""),
    "fix hlgauss/h5md, compress gzip 1": (
        f"{H5MD} compress gzip 1", "dump custom/gz, compression_level 1",
    ),
    "fix hlgauss/h5md, compress gzip 9": (f"{H5MD} compress gzip 9", "dump custom/gz"),
}  # fmt: skip


def measure(lines: str, cells: int, ranks: int, frames: int) -> tuple[float, float, dict[str, str]]:
    """(seconds per frame, MB per frame, versions) of one run that writes `frames` + 1 frames."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.lmp").write_text(INPUT.format(cells=cells, output=lines, frames=frames))
        done = subprocess.run(
            command(ranks, "-in", "in.lmp", "-log", "none", "-nocite"),
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        loop = re.search(r"Loop time of ([\d.eE+-]+) on", done.stdout)
        if done.returncode or not loop:
            raise SystemExit(f"LAMMPS failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        size = sum(path.stat().st_size for path in folder.glob("out.*")) / (frames + 1)
        versions = {"lammps": done.stdout.split("(", 1)[1].split(")")[0], "lmp-hl": __version__}
        if (folder / "out.h5md").exists():
            with open_trajectory(folder / "out.h5md") as trajectory:
                assert trajectory.num_frames == frames + 1
                versions["hdf5"] = trajectory.runs[0]["hdf5_version"]
        return float(loop[1]) / frames, size / 1e6, versions


def write_report(args: argparse.Namespace, versions: dict, load: list, tables: list) -> str:
    """Write what has been measured so far; return it as text."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    text = [
        "# Time and size of a trajectory frame",
        "",
        f"`{' '.join(['python benchmarks/trajectory.py', *sys.argv[1:]])}`: id, type, x, v and f "
        "of all atoms at every step under `pair_style zero`, "
        f"{args.repeats} runs in turn, median (range).",
        "",
        f"{machine}, load average {min(load):.1f} to {max(load):.1f} (above the number of cores, "
        "other work was running and ranks waited for each other); "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + ".",
    ]
    for table in tables:
        text += ["", f"## {table['atoms']:,} atoms, {table['ranks']} rank(s)", ""]
        text += [
            "| output | ms per frame | MB per frame | time |",
            "|---|---|---|---|",
        ]
        for name, row in table["rows"].items():
            other = VARIANTS[name][1]
            ratio = ""
            if other:
                share = statistics.median(row["ms"]) / statistics.median(table["rows"][other]["ms"])
                ratio = f"{share:.2f} of {other}"
            middle, low, high = statistics.median(row["ms"]), min(row["ms"]), max(row["ms"])
            text.append(
                f"| {name} | {middle:.0f} ({low:.0f}-{high:.0f}) | {row['MB']:.1f} | {ratio} |"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "trajectory.md").write_text("\n".join(text) + "\n")
    record = {"machine": machine, "load": load, "versions": versions, "tables": tables}
    (args.out / "trajectory.json").write_text(json.dumps(record, indent=1) + "\n")

    return "\n".join(text)


def main() -> None:
    """Measure in turn, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[29, 63], help="4 cells³ atoms")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--frames", type=int, nargs="+", default=[6, 2], help="one per --cells")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if len(args.frames) != len(args.cells):
        parser.error("--frames wants one number per --cells")

    versions: dict[str, str] = {"python": platform.python_version()}
    tables, load = [], [os.getloadavg()[0]]
    for cells, frames in zip(args.cells, args.frames, strict=True):
        for ranks in args.ranks:
            rows: dict[str, dict[str, list[float] | float]] = {
                name: {"ms": [], "MB": 0.0} for name in VARIANTS
            }
            for _ in range(args.repeats):
                for name, (lines, _other) in VARIANTS.items():
                    seconds, size, found = measure(lines, cells, ranks, frames)
                    rows[name]["ms"].append(1e3 * seconds)
                    rows[name]["MB"] = size
                    versions.update(found)
            load.append(os.getloadavg()[0])
            tables.append({"atoms": 4 * cells**3, "ranks": ranks, "frames": frames, "rows": rows})
            text = write_report(args, versions, load, tables)  # a long run may be interrupted
    print(text)


if __name__ == "__main__":
    main()
