"""Errors of the documented configurations (examples/accuracy) on public data: one command.

    python benchmarks/accuracy.py --data DIR               # all of them
    python benchmarks/accuracy.py --data DIR 3bpa acac     # some

Trains what is missing under --out (an interrupted run is resumed), exports hl.pt and scores that
file on the configuration's test files; SNAP and quadratic SNAP of Zuo et al. (2020), which were
trained on the same frames, are scored on mlearn's. Intervals (95 %) are from resampling frames;
energies of test frames that a training frame equals in energy are left out.
"""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import front_data
import front_evaluate
import torch
from ase import Atoms
from front_rows import CRYSTALS, Row
from hlgauss_vs_scalar import moved
from provenance import ROOT, one_line, provenance

from lmp_hl.evaluate import predict
from lmp_hl.export import export_potential
from lmp_hl.model_file import load
from lmp_hl.training.checkpoint import load_checkpoint
from lmp_hl.training.config import TrainConfig, load_config, to_yaml
from lmp_hl.training.frames import read_frames
from lmp_hl.training.train import train

CONFIGS = ROOT / "examples" / "accuracy"
RESULTS = Path(__file__).resolve().parent / "results"
Result = dict[str, Any]
QUANTITIES = {
    "energy_rmse_meV_per_atom": ("energy, meV/atom", ".2f"),
    "forces_rmse_meV_per_Angstrom": ("forces, meV/Å", ".1f"),
    "stress_rmse_meV_per_Angstrom3": ("stress, meV/Å³", ".2f"),
}


def read_labelled(path: Path, config: TrainConfig) -> list[Atoms]:
    """Frames with the stress that the configuration trains on."""
    frames = front_data.read_all(path)
    for atoms in frames:
        if "stress" in atoms.calc.results:
            atoms.calc.results["stress"][:3] += config.data.stress_offset  # Voigt
    return frames


def score(config: TrainConfig, out: Path) -> Result:
    """Train (or find) one model; its errors on every test file, and those of SNAP."""
    checkpoint = out / "model.ckpt"
    if not checkpoint.is_file():
        path = out.with_suffix(".yaml")
        path.write_text(to_yaml(config), encoding="utf-8")
        train(path, resume=(out / "checkpoints" / "last.ckpt").is_file())
    potential, elements, card = load_checkpoint(checkpoint)
    file = export_potential(potential, elements, card, out / "hl.pt")
    model = load(file)
    seen = [a for path in config.data.train for a in front_data.read_all(path)]
    result: Result = {
        "hash": hashlib.sha256(file.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in potential.parameters()),
        "seconds": card["training"]["seconds"],
        "tests": {},
    }
    for test, path in config.data.test.items():
        frames = read_labelled(path, config)
        known = front_data.known_energy(frames, seen)
        p = predict(model, read_frames(path, config.data, test, elements), test)
        predicted = {"energy": p.energy, "forces": p.forces, "stress": p.stress}
        found = {"lmp-hl": front_evaluate.errors(predicted, frames, known)}
        element = path.parent.name
        for name, label in (("snap", "SNAP"), ("qsnap", "quadratic SNAP")):
            if element in CRYSTALS:
                subject = front_evaluate.subject_of(Row(element, name, "lammps"), out, 0.0)
                found[label] = front_evaluate.errors(
                    front_evaluate.predict(subject, frames), frames, known
                )
        result["tests"][test] = found
    return result


def about(config: TrainConfig, result: Result) -> str:
    """One line on what was trained and how long it took."""
    model, training, loss = config.model, config.training, config.loss
    return (
        f"{model.preset}, {model.channels} channels, l up to {model.l_max}, {model.cutoff:g} Å, "
        f"{result['parameters']:,} weights; {training.epochs} epochs of batch "
        f"{training.batch_size}, loss weights {loss.energy:g} / {loss.forces:g} / {loss.stress:g}, "
        f"seed {config.seed}; {result['seconds'] / 60:.0f} minutes on one core, shared with others"
    )


def table(results: dict[str, Result]) -> list[str]:
    """One line a test and potential."""
    head = ["set", "test", "potential", *(label for label, _ in QUANTITIES.values())]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, result in results.items():
        for test, found in result["tests"].items():
            for potential, errors in found.items():
                cells = [name, test, potential]
                for key, (_, form) in QUANTITIES.items():
                    s = errors.get(key)
                    interval = s and f"{s['value']:{form}} [{s['low']:{form}}, {s['high']:{form}}]"
                    cells.append(interval or "-")
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(results: dict[str, Result]) -> str:
    """Everything that was made so far as Markdown."""
    lines = [
        "# Accuracy of the documented configurations",
        "",
        "RMSE on test frames, 95 % intervals from resampling frames; HL-Gauss head, configurations "
        "in examples/accuracy. Energies of test frames that a training frame equals in energy are "
        "left out.",
        "",
        *table(results),
        "",
    ]
    for name, result in results.items():
        made = result["made"]
        lines.append(f"- `{name}`: {result['about']}; commit {made['commit']}.")
    latest = max((result["made"] for result in results.values()), key=lambda made: made["date"])
    return "\n".join([*lines, "", one_line(latest)]) + "\n"


def main() -> None:
    """Train, score, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(names))
    if unknown:
        parser.error(f"no configuration {', '.join(unknown)}; there are {', '.join(names)}")
    torch.set_num_threads(1)
    out, path = args.out.resolve(), args.results / "accuracy.json"
    out.mkdir(parents=True, exist_ok=True)
    for name in args.names or names:
        config = moved(load_config(CONFIGS / f"{name}.yaml"), CONFIGS, args.data.resolve())
        config = dataclasses.replace(config, output_dir=out / name)
        result = score(config, out / name)
        result |= {"about": about(config, result), "made": provenance()}
        results = json.loads(path.read_text()) if path.is_file() else {}  # others may run beside
        results = dict(sorted((results | {name: result}).items()))
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(results), encoding="utf-8")
        print("\n".join(table({name: result})), flush=True)


if __name__ == "__main__":
    main()
