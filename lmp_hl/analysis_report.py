"""`lmp-hl analyze`: an analysis as text, JSON, CSV and figures, and configurations to label."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lmp_hl import keys
from lmp_hl.analysis import MIN_ATOMS, Analysis, Array, analyze, finite

MAX_DRAWN_ATOMS: Final = 40_000


def write_tables(result: Analysis, folder: Path) -> list[Path]:
    """analysis.json with everything and frames.csv with the table; returns both."""
    from lmp_hl.evaluate import write_json

    paths = [folder / "analysis.json", folder / "frames.csv"]
    write_json(paths[0], result.as_dict())
    with open(paths[1], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(result.rows[0]))
        writer.writeheader()
        for row in result.rows:
            lists = {k: " ".join(map(str, v)) for k, v in row.items() if isinstance(v, list)}
            writer.writerow(row | lists)
    return paths


def write_figures(result: Analysis, folder: Path) -> list[Path]:
    """One figure per question; returns the files written."""
    from lmp_hl import plots

    time = result.column("time")
    label = {n: plots.field_label(n, result.units[n]) for n in result.fields}
    time_label = f"time ({result.units['time']})" if result.units["time"] else "time"
    paths = []
    for n in result.fields:
        paths.append(
            plots.distribution_over_time(
                time, result.edges[n], result.counts[n],
                {"median": result.column(f"{n}_median"), "95 %": result.column(f"{n}_q95"),
                 "largest": result.column(f"{n}_max")},
                folder / f"{n}_over_time.png", label[n], result.remark, time_label,
            )
        )  # fmt: skip
    curves = {"mean": "mean", "95 %": "q95", "largest": "max"}
    paths.append(
        plots.time_series(
            time,
            {n: {c: result.column(f"{n}_{k}") for c, k in curves.items()} for n in result.fields},
            label, result.thresholds, folder / "time_series.png", time_label,
        )
    )  # fmt: skip
    share = result.column("extrapolating")
    if np.isfinite(share).any():
        promised = {} if result.coverage is None else {"share": 1 - result.coverage}
        most = promised.get("share", math.nan)
        paths.append(
            plots.time_series(
                time, {"share": {"share": share}}, {"share": "share of the atoms"}, promised,
                folder / "extrapolating.png", time_label, "Atoms flagged extrapolating",
                f"promised in frames like those of validation: at most {most:.0%}",
            )
        )  # fmt: skip
    steps = result.region_steps
    title = f"mean of {len(steps)} frames, steps {steps[0]:,} to {steps[-1]:,}"
    if len(steps) == 1:
        title = f"step {steps[0]:,}"
    paths.append(
        plots.profile(
            result.profile.groups, result.profile.fields, result.density, label,
            folder / f"profile_{result.axis}.png", result.axis, title,
        )
    )  # fmt: skip
    if result.neighborhoods is not None:
        near = result.neighborhoods
        paths.append(plots.rdf(near.distance, near.rdf, folder / "rdf.png"))
        known = near.coordination.count >= MIN_ATOMS
        paths.append(
            plots.by_coordination(
                near.coordination.groups[known].astype(np.int64),
                {n: {k: v[known] for k, v in c.items()}
                 for n, c in near.coordination.fields.items()},
                near.coordination.count[known], label, folder / "coordination.png",
                "within 1.3 times the sum of covalent radii",
            )
        )  # fmt: skip
    frame = result.last
    sized = [n for n in result.fields if n == keys.FORCE_STD]
    for n in dict.fromkeys([result.fields[0], result.best, *sized]):
        values = finite(frame, n)
        drawn = _drawn(values)
        clock = f"{frame.time:.4g} {result.units['time']}".strip()
        parts = [plots.field_label(n).capitalize(), f"step {frame.step:,}", clock]
        if len(drawn) < len(values):
            parts.append(f"{len(drawn):,} of {len(values):,} atoms, the most uncertain among them")
        paths.append(
            plots.atoms_3d(
                frame["position"][drawn], values[drawn], folder / f"atoms_{n}.png", frame.cell,
                frame.origin, label[n], ", ".join(parts), limits=color_limits(values),
            )
        )  # fmt: skip
    return paths


def color_limits(values: Array) -> tuple[float, float]:
    """Median and 99.5 % quantile: ends of a colour map in which a minority stands out."""
    return float(np.median(values)), float(np.quantile(values, 0.995))


def _drawn(values: Array) -> NDArray[np.int64]:
    """Atoms to draw: all, or of very many the most uncertain half and a random half."""
    if len(values) <= MAX_DRAWN_ATOMS:
        return np.arange(len(values))
    order = np.argsort(-values, kind="stable")
    half = MAX_DRAWN_ATOMS // 2
    others = np.random.default_rng(0).choice(order[half:], half, replace=False)
    return np.sort(np.concatenate([order[:half], others]))


def print_summary(result: Analysis, written: list[Path]) -> None:
    """First and last frame side by side, and where the files are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lmp_hl.plots.style import UNIT_LABELS

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    first, last = result.rows[0], result.rows[-1]
    table = Table(
        title=f"{result.path.name}: {len(result.rows)} frames, {last['num_atoms']:,} atoms, steps "
        f"{first['step']:,} to {last['step']:,}",
        box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
    )  # fmt: skip
    table.add_column("field")
    for head in ("mean", "95 %", "largest", "threshold", "atoms above", "most uncertain IDs"):
        table.add_column(head, justify="right")
    for n in result.fields:
        mark = "▸ " if n == result.best and result.ranking else "  "
        pairs = [
            f"{first[f'{n}_{k}']:.3g} → {last[f'{n}_{k}']:.3g}" for k in ("mean", "q95", "max")
        ]
        unit = UNIT_LABELS.get(result.units[n], result.units[n])
        above = f"{first[f'{n}_above']:.1%} → {last[f'{n}_above']:.1%}"
        table.add_row(
            f"{mark}{n} {unit}", *pairs, f"{result.thresholds[n]:.3g}", above,
            " ".join(map(str, last[f"{n}_ids"][:3])),
        )  # fmt: skip
    console.print(table)
    for n in (n for n in result.fields if n in (result.best, keys.FORCE_STD)):
        if n not in result.crossings:
            console.print(f"  {n}: no atom above {result.thresholds[n]:.3g} in any frame")
            continue
        c = result.crossings[n]
        where = ", ".join(f"{x:.1f}" for x in c.position)
        when = f"{c.time:.4g} {result.units['time']}".strip()
        console.print(
            f"  {n} first above {result.thresholds[n]:.3g}: step {c.step:,} ({when}), atom {c.id} "
            f"{c.element} at ({where}) Å with {c.value:.3g}"
        )
    if result.usual and result.usual_coverage:
        whose = "" if result.usual == result.fields else f" of {', '.join(result.usual)}"
        console.print(
            f"  threshold{whose}: above the largest value in {result.usual_coverage:.0%} of frames "
            "like the validation frames"
        )
    if math.isfinite(first["extrapolating"]):
        promise = (
            ""
            if result.coverage is None
            else (
                f"; at most {1 - result.coverage:.0%} is usual in frames like the validation frames"
            )
        )
        console.print(
            f"  atoms extrapolating: {first['extrapolating']:.1%} → {last['extrapolating']:.1%}"
            + promise
        )
    console.print(f"  {result.remark}" + (" (▸ best)" if result.ranking else ""), style="dim")
    console.print(f"  wrote {len(written)} files in {written[0].parent}/:")
    for k in range(0, len(written), 4):
        console.print(f"    {'  '.join(p.name for p in written[k : k + 4])}")


def select_configurations(
    result: Analysis,
    field: str,
    folder: Path,
    number: int,
    radius: float | None,
    model_path: Path | None,
) -> None:
    """Write configurations with atoms above a field's threshold to label (select.py); print them.

    Args:
        result: of the trajectory.
        field: by which atoms are uncertain.
        folder: of selected.xyz.
        number: how many at most.
        radius: Å, of environments; None: whole frames.
        model_path: of a model whose features tell environments apart; None: the geometry does.
    """
    from lmp_hl import model_file, select

    threshold = result.thresholds[field]
    model = None if model_path is None else model_file.load(model_path)
    cutoff = result.cutoff if model is None else model.cutoff
    choices = select.select(result.path, field, threshold, number, radius is None, model)
    out = folder / "selected.xyz"
    written = select.write(result.path, choices, out, radius, cutoff)
    what = "frames" if radius is None else f"environments of {radius:g} Å"
    if not written:
        out.unlink(missing_ok=True)  # of an earlier run: it would be taken for this one's
        print(
            f"  no atom has a {field} above {threshold:.3g}: nothing to label (another threshold: "
            f"--threshold {field}=VALUE)"
        )
        return
    print(f"  {len(written)} {what} to label in {out}, the most uncertain first, then the most")
    print("  different from those before:")
    for choice, atoms in zip(choices, written, strict=True):
        print(f"    {choice}, {len(atoms):,} atoms")


def run(
    path: Path | str,
    out: Path | str | None = None,
    axis: str = "z",
    thresholds: Mapping[str, float] | None = None,
    progress: bool = True,
    number: int | None = None,
    radius: float | None = None,
    model_path: Path | None = None,
) -> Analysis:
    """Analyse, print and write; the verb `lmp-hl analyze`.

    Configurations to label are selected by the field of the first threshold given, else by the one
    that ranked errors best on the validation frames.
    """
    if number is None and (radius is not None or model_path is not None):
        raise ValueError("--environment and --model are about selection; add --select NUMBER")
    path = Path(path)
    result = analyze(path, axis, thresholds, progress)
    folder = Path(out) if out is not None else path.with_name(f"{path.stem}-analysis")
    folder.mkdir(parents=True, exist_ok=True)
    written = write_tables(result, folder) + write_figures(result, folder)
    print_summary(result, written)
    if number is not None:
        field = next(iter(thresholds or {}), result.best)
        select_configurations(result, field, folder, number, radius, model_path)
    return result
