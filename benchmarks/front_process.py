"""Runs a command on one thread and measures what it took, apart from what runs beside it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A small process in between: a child starts with the peak memory of the process that made it.
LAUNCHER = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024], file)
"""
ONE_THREAD = {
    name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
} | {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Done:
    """What a command printed and took."""

    output: str
    cpu: float  # s, of the processor, all of its processes
    peak: float  # MiB, of its largest process


def run(
    words: Sequence[str | Path],
    folder: Path,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run a command.

    Args:
        words: of the command.
        folder: to run it in.
        env: variables set besides those of this process and one thread.

    Raises:
        ValueError: it failed; the message ends with its reason.
    """
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(report), *map(str, words)],
            cwd=folder,
            env={**os.environ, **ONE_THREAD, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if not report.is_file():
            raise ValueError(f"{Path(words[0]).name} was stopped; the same command makes it again")
        code, cpu, peak = json.loads(report.read_text())
    if code != 0:
        raise ValueError(f"{Path(words[0]).name} failed: {reason_in(done.stdout)}")
    return Done(done.stdout, cpu, peak)


def reason_in(output: str) -> str:
    """The last line that speaks of an error, else the last one with something on it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1][:240]
