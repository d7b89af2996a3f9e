"""Make the silicon data of this example: sample configurations, label them with CP2K, write them.

    python make_data.py --work si_work --workers 2

Configurations come from classical potentials in LAMMPS (structures.py); energies, forces and
stresses from PBE in CP2K (labels.py). The script resumes where it stopped: sampled configurations
and labels are one small file each below ``--work``.

Needs the Python packages ase, numpy, lammps and mpi4py, and the program CP2K.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from labels import Labelling, label_frame, start_worker, write_atomically
from structures import SPLITS, Frame, plan, sample


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
