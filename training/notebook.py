"""The record of a run: one aligned line per epoch, and the same numbers in metrics.csv."""

import csv
import time
from pathlib import Path

import lightning as L

# columns of metrics.csv with their units
COLUMNS = {
    "epoch": "",
    "seconds": "s",
    "learning_rate": "",
    "train_loss": "eV²",
    "train_energy_rmse": "meV/atom",
    "train_forces_rmse": "meV/Å",
    "train_stress_rmse": "meV/Å³",
    "train_outside": "% targets outside the support",
    "train_spread": "predicted/true",
    "valid_loss": "eV²",
    "valid_energy_rmse": "meV/atom",
    "valid_forces_rmse": "meV/Å",
    "valid_stress_rmse": "meV/Å³",
}
SHOWN = {
    "epoch": ("epoch", "", 6, ".0f"),
    "train_energy_rmse": ("E train", "meV/at", 9, ".2f"),
    "train_forces_rmse": ("F train", "meV/Å", 9, ".1f"),
    "valid_energy_rmse": ("E valid", "meV/at", 9, ".2f"),
    "valid_forces_rmse": ("F valid", "meV/Å", 9, ".1f"),
    "train_outside": ("outside", "%", 8, ".2f"),
    "train_spread": ("spread", "p/t", 7, ".2f"),
    "learning_rate": ("lr", "", 9, ".1e"),
    "seconds": ("time", "s", 7, ".0f"),
}


class Notebook(L.Callback):
    """One aligned line per epoch on the terminal, the same numbers as a row in metrics.csv."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.started = 0.0
        self.elapsed = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the rows before the epoch that starts now, and go on after them."""
        self.started = time.time()
        if not trainer.is_global_zero:
            return
        rows = read_metrics(self.path) if self.path.is_file() else []
        rows = [row for row in rows if row["epoch"] < trainer.current_epoch]
        self.elapsed = rows[-1]["seconds"] if rows else 0.0
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({k: _plain_number(v) for k, v in row.items()} for row in rows)
        for line in (0, 1):
            pl_module.print(" ".join(f"{spec[line]:>{spec[2]}}" for spec in SHOWN.values()))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the epoch that ends now."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        metrics["epoch"] = trainer.current_epoch
        metrics["seconds"] = self.elapsed + time.time() - self.started
        metrics["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        if not trainer.is_global_zero:
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writerow({k: _plain_number(v) for k, v in metrics.items()})
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.current_epoch % self.every == 0 or last:
            pl_module.print(
                " ".join(
                    f"{format(metrics[name], spec[3]) if name in metrics else '-':>{spec[2]}}"
                    for name, spec in SHOWN.items()
                )
            )


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv; columns of an epoch that had no value are absent."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _plain_number(value: float) -> str:
    return f"{value:.7g}"
