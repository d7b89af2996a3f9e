"""Where the time of a training goes, and when it was as good as it became.

    python benchmarks/training_profile.py runs/3bpa ...

Reads metrics.csv of finished runs; of the data only what every epoch does again is measured: one
pass over the loader, which shuffles frames and joins their graphs.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

from provenance import one_line, provenance

from lmp_hl.training import frames as fr
from lmp_hl.training.config import load_config
from lmp_hl.training.notebook import read_metrics
from lmp_hl.training.train import baseline_energies, make_loader

RESULTS = Path(__file__).resolve().parent / "results"
CLOSE = 1.05  # of the final error


def loading(run: Path, repeats: int) -> float:
    """Seconds that an epoch spends on loading, median."""
    config = load_config(run / "config.yaml")
    splits = fr.load_splits(config.data, config.seed)
    model, baseline = config.model, baseline_energies(splits)
    graphs = [
        fr.GraphDataset(frames, splits.elements, baseline, model.cutoff, model.layers, model.dtype)
        for frames in (splits.train, splits.valid)
    ]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for dataset in graphs:
            for _batch in make_loader(dataset, config, shuffle=True):
                pass
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(run: Path, repeats: int) -> str:
    """One line of the table."""
    metrics = read_metrics(run / "metrics.csv")
    seconds = [m["seconds"] for m in metrics]
    epoch = statistics.median(b - a for a, b in itertools.pairwise(seconds))
    final = metrics[-1]["valid_forces_rmse"]
    close = next(m for m in metrics if m["valid_forces_rmse"] <= CLOSE * final)
    loader = loading(run, repeats)
    cells = [
        run.name, f"{len(metrics)}", f"{seconds[-1] / 60:.1f}",
        f"{max(0.0, seconds[0] - epoch):.0f}",
        f"{epoch:.2f}", f"{loader:.3f} ({100 * loader / epoch:.1f} %)", f"{final:.1f}",
        f"{close['seconds'] / 60:.1f} ({close['epoch']:.0f})",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of trainings")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    head = [
        "run", "epochs", "minutes", "start and compiling, s", "epoch, s", "of that loading, s",
        "force error of validation frames, meV/Å", "within 5 % after, minutes (epoch)",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [row(run, args.repeats) for run in args.runs]
    text = "\n".join([*lines, "", one_line(provenance())]) + "\n"
    print(text)
    (args.results / "training.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
