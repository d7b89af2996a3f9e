"""The whole job on silicon: train, export, run in LAMMPS on two MPI ranks, analyse.

    python examples/silicon/quickstart.py

Every step is a command that you can run yourself; it is printed before it starts. A step whose
result is newer than what it was made from is not repeated.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Step:
    """One command, skipped when `makes` is newer than every file in `needs`."""

    def __init__(self, title: str, command: list[str], needs: list[Path], makes: Path) -> None:
        self.title = title
        self.command = command
        self.needs = needs
        self.makes = makes

    def up_to_date(self) -> bool:
        """Whether the result is there and newer than its sources."""
        if not self.makes.is_file():
            return False
        made = self.makes.stat().st_mtime
        return all(need.stat().st_mtime <= made for need in self.needs)

    def run(self, number: str) -> float:
        """Run it, or say that it is not needed; returns seconds."""
        print(f"\n{number} {self.title}", flush=True)
        if self.up_to_date():
            print(f"  up to date: {shown(self.makes)}", flush=True)
            return 0.0
        print(f"  $ {shlex.join(shown(word) for word in self.command)}", flush=True)
        start = time.time()
        code = subprocess.run(self.command).returncode
        if code != 0:
            raise SystemExit(f"quickstart: '{self.title}' ended with exit code {code}; see above")
        if not self.makes.is_file():
            raise SystemExit(f"quickstart: '{self.title}' made no {shown(self.makes)}; see above")
        os.utime(self.makes)
        return time.time() - start


def shown(word: object) -> str:
    """A path relative to where the user is, anything else as it is."""
    text = str(word)
    relative = os.path.relpath(text) if text.startswith("/") else text
    return relative if len(relative) < len(text) else text


def main() -> None:
    """Run all steps and print what was made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "quickstart", help="folder of the results"
    )
    parser.add_argument(
        "--config", type=Path, default=HERE / "silicon.yaml", help="training configuration"
    )
    parser.add_argument(
        "--cells", type=int, default=8, help="size of the slab; 8 cells are 4,096 atoms"
    )
    parser.add_argument("--steps", type=int, default=300, help="MD steps")
    parser.add_argument("--ranks", type=int, default=2, help="MPI ranks")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    scripts = Path(sys.executable).parent
    tool = str(scripts / "lmp-hl")
    config = out / "train.yaml"
    write_config(args.config.resolve(), config, out / "train")
    model, trajectory = out / "hl.pt", out / "traj.h5md"
    test, heldout = HERE / "test.xyz", HERE / "heldout.xyz"
    checkpoint = out / "train" / "model.ckpt"
    lammps = [
        *(str(scripts / "mpirun"), "-np", str(args.ranks), str(scripts / "lmp")),
        *("-in", str(HERE / "in.silicon"), "-log", str(out / "log.lammps")),
        *("-var", "model", str(model), "-var", "traj", str(trajectory)),
        *("-var", "cells", str(args.cells), "-var", "steps", str(args.steps)),
    ]
    steps = [
        Step(
            "train on DFT frames",
            [tool, "train", str(config), "--resume"],
            [config, HERE / "train.xyz", HERE / "valid.xyz"],
            checkpoint,
        ),
        Step(
            "export the model", [tool, "export", str(checkpoint), str(model)], [checkpoint], model
        ),
        Step("molecular dynamics with LAMMPS", lammps, [model, HERE / "in.silicon"], trajectory),
        Step(
            "analyse the trajectory",
            [tool, "analyze", str(trajectory), "--out", str(out / "analysis")],
            [trajectory],
            out / "analysis" / "analysis.json",
        ),
        Step(
            "evaluate on frames with and without surfaces",
            [
                *(tool, "evaluate", str(model), str(heldout), "--seen", str(test)),
                *("--json", str(out / "evaluation" / "evaluation.json")),
                *("--csv", str(out / "evaluation" / "atoms.csv")),
                *("--figures", str(out / "evaluation")),
            ],
            [model, test, heldout],
            out / "evaluation" / "evaluation.json",
        ),
    ]
    # a run of another configuration cannot be resumed: it is out of date as a whole
    if checkpoint.is_file() and not steps[0].up_to_date():
        shutil.rmtree(out / "train")
    seconds = []
    for number, step in enumerate(steps, start=1):
        seconds.append(step.run(f"[{number}/{len(steps)}]"))
        if step.makes == model:
            subprocess.run([tool, "info", str(model)], check=True)
    summary(out, steps, seconds)


def write_config(source: Path, target: Path, folder: Path) -> None:
    """The configuration with folders and paths resolved; the file stays if nothing changed."""
    from dataclasses import replace

    from lmp_hl.training.config import load_config, to_yaml

    text = to_yaml(replace(load_config(source), output_dir=folder))
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def summary(out: Path, steps: list[Step], seconds: list[float]) -> None:
    """What was made and where."""
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    print(f"\nquickstart finished in {sum(seconds):.0f} s; results in {shown(out)}:")
    for step in steps:
        print(f"  {shown(step.makes):<48} {step.title}")
    for figure in sorted(out.rglob("*.png")):
        print(f"  {shown(figure)}")
    held, seen = evaluation["sets"]["held out"], evaluation["sets"]["seen"]
    for text, numbers in (("slabs, never seen", held), ("frames like the training's", seen)):
        rmse = numbers["forces_rmse_meV_per_Angstrom"]["value"]
        ratio = numbers["calibration"]["force_std"]["size_ratio"]["value"]
        print(f"  {text:<26} force RMSE {rmse:.0f} meV/Å, force_std predicted/true {ratio:.2f}")


if __name__ == "__main__":
    main()
