"""HL-Gauss against its scalar twin: same network, data, loss weights, schedule and seeds.

    python benchmarks/hlgauss_vs_scalar.py benchmarks/3bpa.yaml --data DIR --seeds 0 1 2
    python benchmarks/hlgauss_vs_scalar.py examples/silicon/silicon.yaml --seeds 0 1 2

Trains what is missing (an interrupted run is resumed), evaluates every model on the configuration's
test files and writes a table: RMSE of the frames' energies (whole and per atom) and of the force
components, mean over seeds ± their standard deviation; `HL / twin` is the ratio of the means.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from lmp_hl import metrics
from lmp_hl.evaluate import predict
from lmp_hl.export import export_potential
from lmp_hl.model_file import load
from lmp_hl.training.checkpoint import load_checkpoint
from lmp_hl.training.config import TrainConfig, load_config, to_yaml
from lmp_hl.training.frames import read_frames
from lmp_hl.training.train import train

HEADS = ("hlgauss", "scalar")


def moved(config: TrainConfig, folder: Path, data: Path) -> TrainConfig:
    """The configuration of a YAML in `folder`, with data files at the same place below `data`."""
    section = config.data

    def there(path: Path) -> Path:
        return data / path.relative_to(folder)

    references = section.reference_energies
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            section,
            train=tuple(there(p) for p in section.train),
            valid=None if section.valid is None else tuple(there(p) for p in section.valid),
            test={name: there(p) for name, p in section.test.items()},
            reference_energies=there(references) if isinstance(references, Path) else references,
        ),
    )


def run_one(config: TrainConfig, head: str, seed: int, out: Path) -> dict[str, dict[str, float]]:
    """Train (or find) one model; errors on every test file."""
    name = f"{config.name}-{head}-{seed}"
    config = dataclasses.replace(
        config,
        name=name,
        seed=seed,
        output_dir=out / name,
        model=dataclasses.replace(config.model, head=head),
    )
    result = out / f"{name}.json"
    if result.is_file():
        return json.loads(result.read_text())
    checkpoint = out / name / "model.ckpt"
    if not checkpoint.is_file():
        path = out / f"{name}.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        train(path, resume=(out / name / "checkpoints" / "last.ckpt").is_file())
    potential, elements, card = load_checkpoint(checkpoint)
    model = load(export_potential(potential, elements, card, out / f"{name}.pt"))
    errors: dict[str, dict[str, float]] = {}
    for test, path in config.data.test.items():
        p = predict(model, read_frames(path, config.data, test, elements), test)
        error = p.energy - p.energy_true
        errors[test] = {
            "energy": 1e3 * metrics.rmse(error),
            "energy_per_atom": 1e3 * metrics.rmse(error / p.num_atoms),
            "forces": 1e3 * metrics.rmse(p.forces - p.forces_true),
        }
    errors["training"] = {"seconds": card["training"]["seconds"]}
    result.write_text(json.dumps(errors, indent=1))
    return errors


def table(config: TrainConfig, results: dict[tuple[str, int], dict[str, dict[str, float]]]) -> str:
    """Markdown table: mean over seeds with the standard deviation between them, and the ratio."""
    seeds = sorted({seed for _, seed in results})
    loss, training = config.loss, config.training
    lines = [
        f"`{config.name}`: {config.model.preset}, {config.model.channels} channels, "
        f"{training.epochs} epochs (warm-up {training.warmup_epochs}), "
        f"batch {training.batch_size}, learning rate {training.learning_rate:g}, "
        f"weight decay {training.weight_decay:g}; loss weights energy {loss.energy:g}, "
        f"forces {loss.forces:g}, stress {loss.stress:g} for both heads; "
        f"seeds {', '.join(map(str, seeds))}.",
        "",
        "| test | quantity | HL-Gauss | scalar twin | HL / twin | per seed |",
        "|---|---|---|---|---|---|",
    ]
    rows = (
        ("energy", "energy, meV"),
        ("energy_per_atom", "energy, meV/atom"),
        ("forces", "forces, meV/Å"),
    )
    for test in config.data.test:
        for key, label in rows:
            values = {
                head: np.array([results[head, seed][test][key] for seed in seeds]) for head in HEADS
            }
            cells = [
                f"{v.mean():.2f} ± {v.std(ddof=1) if len(v) > 1 else 0:.2f}"
                for v in values.values()
            ]
            ratio = values["hlgauss"].mean() / values["scalar"].mean()
            each = ", ".join(f"{r:.3f}" for r in values["hlgauss"] / values["scalar"])
            lines.append(f"| {test} | {label} | {cells[0]} | {cells[1]} | {ratio:.3f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the data sets, if not the YAML's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--heads", nargs="+", default=HEADS, choices=HEADS, help="train only these now"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    config = load_config(args.config)
    if args.data is not None:
        config = moved(config, args.config.resolve().parent, args.data.resolve())
    results = {}
    for seed in args.seeds:
        for head in args.heads:
            results[head, seed] = run_one(config, head, seed, args.out.resolve())
    if set(args.heads) == set(HEADS):
        text = table(config, results)
        print(text)
        (args.out / f"{config.name}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
