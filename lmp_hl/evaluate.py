"""`lmp-hl evaluate`: a model file against labelled frames, as text, JSON, CSV and figures."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from lmp_hl import keys
from lmp_hl.metrics import Interval
from lmp_hl.predictions import CONTROLS, Predictions, coordination, predict, read
from lmp_hl.report import EXTRAPOLATING, MEANINGS, report

__all__ = [
    "CONTROLS",
    "Predictions",
    "coordination",
    "predict",
    "print_report",
    "read",
    "report",
    "run",
    "write_csv",
    "write_figures",
    "write_json",
]

# kinds of scores by the question they answer
ATOMS = (
    "pooled",
    "within_element",
    "within_config_type",
    "within_site",
    "large_error",
    "risk_coverage",
)
FRAMES = ("per_frame", "auroc_mean", "auroc_max")
CALIBRATION = (
    "size_ratio",
    "reliability_slope",
    "miscalibration_area",
    "ence",
    "gaussian_nll_nats",
    "energy_score_meV_per_Angstrom",
    "sharpness_meV_per_Angstrom",
)
TITLES = {
    "size_ratio": "predicted/true size",
    "gaussian_nll_nats": "NLL, nat",
    "energy_score_meV_per_Angstrom": "energy score, meV/Å",
    "sharpness_meV_per_Angstrom": "sharpness, meV/Å",
    "ence": "ENCE",
    "large_error": "large error",
    "risk_coverage": "risk-coverage",
    "auroc_mean": "AUROC, frame mean",
    "auroc_max": "AUROC, frame max",
}


def write_json(path: Path | str, numbers: Mapping[str, Any]) -> None:
    """The report as JSON; numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple | np.ndarray):
            return [plain(v) for v in value]
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        return value.item() if isinstance(value, np.generic) else value

    _write(path, json.dumps(plain(numbers), indent=1) + "\n")


def write_csv(path: Path | str, sets: Mapping[str, Predictions]) -> None:
    """One line per atom: labels, predictions, force error, fields and controls (eV, Å, nat)."""
    first = next(iter(sets.values()))
    head = ["set", "frame", "atom", "element", "config_type"]
    head += [f"f{x}{end}" for end in ("_true", "") for x in "xyz"]
    head += ["force_error", *first.signals]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(head)
    for name, p in sets.items():
        start = np.concatenate([[0], np.cumsum(p.num_atoms)])
        numbers = np.column_stack([p.forces_true, p.forces, p.error, *p.signals.values()])
        kinds = p.kinds
        for k, row in enumerate(numbers):
            frame = int(p.frame[k])
            symbol = chemical_symbols[p.numbers[k]]
            writer.writerow(
                [name, frame, k - start[frame], symbol, kinds[k], *(f"{v:.9g}" for v in row)]
            )
    _write(path, text.getvalue())


def _write(path: Path | str, text: str) -> None:
    """Write a file as a whole: when that fails, an older one is still there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {path}: {error.strerror}; make room or choose another place"
        ) from error


def write_figures(
    folder: Path | str, sets: Mapping[str, Predictions], numbers: Mapping[str, Any]
) -> list[Path]:
    """Parity, uncertainty against error for each field, and rankings; returns the files written."""
    from lmp_hl import plots

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # seen first, so that held-out points lie on top
    ordered = dict(sorted(sets.items(), key=lambda item: item[0] != "seen"))
    first = next(iter(sets.values()))
    paths = [
        plots.parity(
            {n: (p.energy_true / p.num_atoms, p.energy / p.num_atoms) for n, p in ordered.items()},
            {n: (p.forces_true, p.forces) for n, p in ordered.items()},
            folder / "parity.png",
        )
    ]
    for name in (n for n in first.fields if n != EXTRAPOLATING):  # a flag is no axis
        paths.append(
            plots.uncertainty_error(
                {n: (p.fields[name], p.error) for n, p in ordered.items()},
                folder / f"error_{name}.png",
                plots.field_label(name, first.field_units[name]),
                "size" if name in first.sizes else "bound" if name == keys.FORCE_BOUND else "rank",
                kinds={n: p.kinds for n, p in ordered.items()},
            )
        )
    panels = {}
    for kind, scores in _scores(numbers).items():
        panels[_title(kind)] = (
            {n: Interval(s["value"], s["low"], s["high"]) for n, s in scores.items()},
            0.5 if kind == "large_error" or kind.startswith("auroc") else 0.0,
        )
    paths.append(plots.rankings(panels, list(first.fields), folder / "rankings.png"))
    return paths


def _scores(numbers: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Kind -> signal -> score, of the data and of its separation from seen frames."""
    separation = numbers.get("separation", {})
    return {
        **next(iter(numbers["ranking"].values())),
        **{f"auroc_{how}": scores for how, scores in separation.items()},
    }


def _title(kind: str) -> str:
    return TITLES.get(kind, kind.replace("_", " "))


def print_report(numbers: Mapping[str, Any], console: Any = None) -> None:
    """The numbers as aligned tables on a rich console (stdout by default), each explained."""
    from rich.console import Console

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)  # a log file has no right margin
    _print_errors(numbers, console)
    _print_calibration(numbers, console)
    which = next(iter(numbers["ranking"]))
    of = "" if which == "data" else f" ({which} frames)"
    _print_scores(numbers, ATOMS, f"Which atoms are wrong?{of}", console)
    _print_scores(numbers, FRAMES, f"Which frames are wrong?{of}", console)
    if "separation_by_error" in numbers:
        mean, largest = (_cell(s, ".2f") for s in numbers["separation_by_error"].values())
        console.print(
            f"  the true force error itself separates with AUROC {mean} (mean), {largest} (max)"
        )
    console.print(
        "  ± half the 95 % interval from resampling frames; ▸ best field; a control is what anybody"
        " has without an uncertainty, with the better of its two signs.",
        style="dim",
    )


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    made.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        made.add_column(column, justify="right")
    return made


def _cell(s: Mapping[str, float], form: str = ".3g") -> str:
    # held together by a space that does not break: headings may
    return f"{s['value']:{form}}\u00a0±{(s['high'] - s['low']) / 2:{form}}"


def _print_errors(numbers: Mapping[str, Any], console: Any) -> None:
    sets = numbers["sets"]
    sizes = [n for n in next(iter(sets.values()))["calibration"] if n not in numbers["controls"]]
    stress = any("stress_rmse_meV_per_Angstrom3" in s for s in sets.values())
    errors = _table(
        "Errors (RMSE)",
        "set", "frames", "atoms", "energy meV/atom", "forces meV/Å",
        *(["stress meV/Å³"] if stress else []),
        *(f"{n} predicted/true" for n in sizes),
    )  # fmt: skip
    for name, s in sets.items():
        errors.add_row(
            name, f"{s['num_frames']:,}", f"{s['num_atoms']:,}",
            _cell(s["energy_rmse_meV_per_atom"]), _cell(s["forces_rmse_meV_per_Angstrom"]),
            *([_cell(s["stress_rmse_meV_per_Angstrom3"]) if "stress_rmse_meV_per_Angstrom3" in s
               else "-"] if stress else []),
            *(_cell(s["calibration"][n]["size_ratio"], ".2f") for n in sizes),
        )  # fmt: skip
        for part in ("by_element", "by_config_type"):
            if len(s[part]) > 1:
                for label, values in s[part].items():
                    errors.add_row(
                        f"  {label}", "", f"{values['num_atoms']:,}", "",
                        f"{values['forces_rmse_meV_per_Angstrom']:.3g}", *([""] if stress else []),
                        *(f"{values['size_ratio'][n]:.2f}" for n in sizes), style="dim",
                    )  # fmt: skip
    console.print(errors)


def _print_calibration(numbers: Mapping[str, Any], console: Any) -> None:
    """One table for each field with a size; the constants beside it are what it has to beat."""
    sets = numbers["sets"]
    first = next(iter(sets))
    sizes = list(sets[first]["calibration"])
    constants = [n for n in sizes if n in numbers["controls"]]
    for field in (n for n in sizes if n not in constants):
        made = _table(f"Is the size of {field} right?", "")
        for name in sets:
            made.add_column(name, justify="right")
        for constant in constants:
            made.add_column(f"({constant})", justify="right", style="dim")
        made.add_column("meaning", style="dim")
        for kind in CALIBRATION:
            made.add_row(
                _title(kind),
                *(_cell(s["calibration"][field][kind]) for s in sets.values()),
                *(f"{sets[first]['calibration'][c][kind]['value']:.3g}" for c in constants),
                MEANINGS[kind],
            )
        if "growth" in numbers:
            empty = [""] * (len(sets) - 1)
            growth = numbers["growth"]
            made.add_row(
                "growth", _cell(growth[field]), *empty,
                *(f"{growth[c]['value']:.3g}" for c in constants), MEANINGS["growth"],
            )  # fmt: skip
        console.print(made)
    for name, s in sets.items():
        stated = numbers.get("coverage")
        promise = (
            f" (promised for frames like the validation frames: {stated:.0%})" if stated else ""
        )
        for kept, share in s["promises"].items():
            console.print(f"  {name}: {kept.replace('_', ' ')}: {_cell(share, '.1%')}{promise}")
        for field, size in s["energy_calibration"].items():
            rank = f", rank {_cell(size['spearman'], '.2f')}" if "spearman" in size else ""
            ratio = _cell(size["size_ratio"], ".2f")
            console.print(f"  {name}: {field}, frames' energies: predicted/true {ratio}{rank}")


def _print_scores(
    numbers: Mapping[str, Any], kinds: tuple[str, ...], title: str, console: Any
) -> None:
    """Signals by kinds of scores, what each kind means, and the lead over the best control."""
    from rich.table import Table

    columns = {kind: s for kind, s in _scores(numbers).items() if kind in kinds}
    if not columns:
        return
    table = _table(title, "signal", *map(_title, columns))
    signals = list(next(iter(columns.values())))
    best = numbers["best_field"]
    for name, following in zip(signals, [*signals[1:], ""], strict=True):
        control = name in numbers["controls"]
        table.add_row(
            f"{name} (control)" if control else name,
            *(
                ("[bold green]▸\u00a0" if best[kind] == name else "\u00a0\u00a0")
                + _cell(scores[name], ".2f")
                for kind, scores in columns.items()
            ),
            style="dim" if control else "",
            end_section=not control and following in numbers["controls"],
        )
    console.print(table)
    notes = Table.grid(padding=(0, 2, 0, 0))
    for kind, scores in columns.items():
        lead = ""
        if best[kind] is not None:
            over = _cell(scores[best[kind]]["over_best_control"], "+.2f").replace("±+", "±")
            lead = f"{best[kind]} leads the best control by {over}"
        notes.add_row("", f"[bold]{_title(kind)}[/]", f"[dim]{MEANINGS[kind]}[/]", lead)
    console.print(notes)
    console.print()


def run(
    model_path: Path | str,
    data_path: Path | str,
    seen_path: Path | str | None = None,
    json_path: Path | str | None = None,
    csv_path: Path | str | None = None,
    figures: Path | str | None = None,
    num_resamples: int = 400,
    progress: bool = True,
    **label_keys: str,
) -> dict[str, Any]:
    """Load, evaluate, print and write what was asked for; the verb `lmp-hl evaluate`."""
    from lmp_hl import model_file

    model = model_file.load(model_path)
    paths = {"data": data_path} if seen_path is None else {"held out": data_path, "seen": seen_path}
    frames = {name: read(path, model.elements, **label_keys) for name, path in paths.items()}
    sets = {n: predict(model, f, str(paths[n]), progress) for n, f in frames.items()}
    numbers = report(next(iter(sets.values())), sets.get("seen"), num_resamples)
    numbers = {
        "model": str(model_path),
        "files": {n: str(p) for n, p in paths.items()},
        "coverage": model.card.get("conformal", {}).get("coverage"),
        **numbers,
    }
    print_report(numbers)
    if json_path is not None:
        write_json(json_path, numbers)
    if csv_path is not None:
        write_csv(csv_path, sets)
    if figures is not None:
        write_figures(figures, sets, numbers)
    return numbers
