"""Page and figure of benchmarks/front.py, from the JSON of its rows and timings."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
from adjustText import adjust_text
from front_peers import MAKERS
from front_rows import CRYSTALS, Row
from provenance import one_line

from lmp_hl.plots.style import BLUE, GREEN, MUTED, ORANGE, RED, STYLE

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

Result = Mapping[str, Any]

YARDSTICK: Final = "snap/lammps"  # the row whose time the ratios are to
ENERGY, FORCES, STRESS = (
    "energy_rmse_meV_per_atom",
    "forces_rmse_meV_per_Angstrom",
    "stress_rmse_meV_per_Angstrom3",
)
COLORS: Final = {
    "lmp-hl": BLUE, "lammps": MUTED, "deepmd": GREEN, "mace": RED, "allegro": ORANGE,
}  # fmt: skip
NAMES: Final = {
    "lmp-hl": "lmp-hl", "lammps": "SNAP", "deepmd": "DeePMD-kit", "mace": "MACE",
    "allegro": "Allegro",
}  # fmt: skip


def times_of(row: Row, timings: Result) -> list[float]:
    """µs per atom and step of every measurement that succeeded."""
    return [t["us"] for t in timings["rows"].get(row.full, []) if "us" in t]


def failure_of(row: Row, result: Result, timings: Result) -> str | None:
    """Why the row has no numbers, or no time; None if it has both."""
    if "failed" in result:
        return str(result["failed"])
    measured = timings["rows"].get(row.full, [])
    reasons = [t["failed"] for t in measured if "failed" in t]
    return f"not timed: {reasons[0]}" if reasons else None


def on_front(points: Mapping[Row, tuple[float, float]]) -> set[Row]:
    """Rows that no other row is at least as good as in both numbers, and better in one.

    Times and errors that agree in three digits are equal: files of one network differ by rounding.
    """
    places = {row: (float(f"{x:.3g}"), float(f"{y:.3g}")) for row, (x, y) in points.items()}
    return {
        row
        for row, (x, y) in places.items()
        if not any(u <= x and v <= y and (u < x or v < y) for u, v in places.values())
    }


def points_of(found: Mapping[Row, Result], timings: Result) -> dict[Row, tuple[float, float]]:
    """Row -> (median µs per atom and step, force RMSE in meV/Å), of rows that have both."""
    points = {}
    for row, result in found.items():
        times = times_of(row, timings)
        if times and "errors" in result:
            points[row] = (statistics.median(times), result["errors"][FORCES]["value"])
    return points


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}}-{high:{form}})"


def _error(result: Result, name: str, form: str) -> str:
    if name not in result.get("errors", {}):
        return "-"
    s = result["errors"][name]
    return f"{s['value']:{form}} [{s['low']:{form}}, {s['high']:{form}}]"


def _training(result: Result) -> str:
    if "epochs" not in result:
        return "published"
    if "errors" not in result:
        return "untrained"
    return f"{result['cpu'] / 60:.1f} min, {result['epochs']} epochs"


def table(found: Mapping[Row, Result], timings: Result) -> list[str]:
    """One line a row that has numbers."""
    front = on_front(points_of(found, timings))
    yardstick = [t for row in found if row.full.endswith(f"/{YARDSTICK}")
                 for t in times_of(row, timings)]  # fmt: skip
    head = [
        "potential", "file", "timed in", "energy, meV/atom", "forces, meV/Å", "stress, meV/Å³",
        "µs/atom/step", "of SNAP", "MiB", "parameters", "training",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, result in found.items():
        if "failed" in result:
            continue
        times = times_of(row, timings)
        peaks = [t["MiB"] for t in timings["rows"].get(row.full, []) if "MiB" in t]
        ratio = "-"
        if times and yardstick:
            ratio = f"{statistics.median(times) / statistics.median(yardstick):.2f}"
        maker = MAKERS.get(row.potential.maker)
        about = row.potential.about
        cells = [
            f"**{about}**" if row in front else about,
            row.runtime,
            maker.timed if maker else "LAMMPS",
            _error(result, ENERGY, ".2f"),
            _error(result, FORCES, ".1f"),
            _error(result, STRESS, ".2f"),
            _range(times, ".0f"),
            ratio,
            f"{max(peaks):.0f}" if peaks else "-",
            f"{result['parameters']:,}",
            _training(result),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def page(element: str, found: Mapping[Row, Result], timings: Result, minutes: float) -> str:
    """The Markdown page of one element."""
    crystal = CRYSTALS[element]
    loads = timings.get("load", [])
    repeats = max((len(t) for t in timings["rows"].values()), default=0)
    scored = next((r["errors"] for r in found.values() if "errors" in r), None)
    budget = (
        f"within {minutes:g} minutes of processor time of one core, and the number of epochs is "
        "what fitted"
        if minutes > 0
        else "for a single step: only their speed says something"
    )
    lines = [f"# {element}: error against cost", ""]
    if scored:
        lines += [
            f"RMSE on the {scored['num_frames']} test frames of mlearn, 95 % intervals from "
            f"resampling frames; energies of {scored['num_energies']} frames, without those that a "
            "training frame equals in energy.",
        ]
    lines += [
        f"Time: {crystal.num_atoms} atoms ({crystal.lattice}, {' x '.join(map(str, crystal.cells))}"
        f" cells), processor time of one thread, which is the time that passes on a core of its "
        f"own: median (range) of {repeats} measurements, all rows in turn. "
        "The file that is timed is the file that is scored. In LAMMPS the time is that of "
        "NVE at 300 K with everything a step does; a model call in Python leaves out neighbour "
        "list and integration. MiB: peak of the process that was timed. Bold: no other row is "
        "both faster and more accurate in forces.",
        "",
        f"Trained {budget}; one seed, float32, 5 Å where the table names no other cutoff. SNAP and "
        "quadratic SNAP are as published, trained by their authors on these training frames, with "
        "cutoffs of their own.",
        "",
        *table(found, timings),
    ]
    missing = {row: why for row, r in found.items() if (why := failure_of(row, r, timings))}
    if missing:
        reasons: dict[str, list[str]] = {}
        for row, why in missing.items():
            reasons.setdefault(why, []).append(f"`{row.name}/{row.runtime}`")
        lines += ["Not there:", ""]
        lines += [f"- {', '.join(rows)}: {why}" for why, rows in reasons.items()]
        lines.append("")
    versions = {
        ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        for result in found.values()
        if "versions" in result
    }
    if versions:
        lines += [f"Versions: {'; '.join(sorted(versions))}.", ""]
    if loads:
        lines.append(f"Load of the machine while timing: {min(loads)} to {max(loads)}.")
    if "made" in timings:
        lines.append(one_line(timings["made"]))
    return "\n".join(lines) + "\n"


def figure(element: str, found: Mapping[Row, Result], timings: Result, path: Path) -> Path:
    """Force and energy error against time, both logarithmic; a line joins what nothing beats.

    Filled with the interval of its error: the fastest file of a potential; open: the others.
    """
    points = points_of(found, timings)
    fastest: dict[str, Row] = {}
    for row, (x, _) in points.items():
        if row.name not in fastest or x < points[fastest[row.name]][0]:
            fastest[row.name] = row
    with matplotlib.rc_context(STYLE):
        drawing, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
        for panel, name in zip(panels, (FORCES, ENERGY), strict=True):
            place = {r: (x, found[r]["errors"][name]["value"]) for r, (x, _) in points.items()}
            best = sorted(place[row] for row in on_front(place))
            panel.plot(*zip(*best, strict=True), color=MUTED, lw=0.8, zorder=0)
            labelled = set()
            labels = []
            for row, (x, y) in place.items():
                maker, times = row.potential.maker, times_of(row, timings)
                color = COLORS[maker]
                if fastest[row.name] is not row:
                    panel.plot(x, y, "o", color=color, mfc="white", ms=5)
                    continue
                interval = found[row]["errors"][name]
                panel.errorbar(
                    x, y, fmt="o", color=color, ms=6, lw=0.8,
                    xerr=[[x - min(times)], [max(times) - x]],
                    yerr=[[y - min(y, interval["low"])], [max(y, interval["high"]) - y]],
                    label=None if maker in labelled else NAMES[maker],
                )  # fmt: skip
                labelled.add(maker)
                labels.append(panel.text(x, y, row.name, fontsize=7))
            panel.set(xscale="log", yscale="log", xlabel="µs of one core per atom and step")
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(LogLocator(subs=(2, 5)))
                axis.set_minor_formatter("{x:g}")
            thin = {"arrowstyle": "-", "color": MUTED, "lw": 0.5}
            around = tuple(zip(*place.values(), strict=True))
            adjust_text(labels, *around, ax=panel, expand=(1.3, 1.8), arrowprops=thin)
        panels[0].set(ylabel="force RMSE (meV/Å)", title=element)
        panels[1].set(ylabel="energy RMSE (meV/atom)")
        panels[0].legend()
        drawing.savefig(path)
        plt.close(drawing)
    return path


def write_results(
    element: str, found: Mapping[Row, Result], timings: Result, minutes: float, results: Path
) -> list[Path]:
    """Write front_<element>.{md,json} and, where something was scored and timed, the .png."""
    results.mkdir(parents=True, exist_ok=True)
    stem = results / f"front_{element}"
    stem.with_suffix(".md").write_text(page(element, found, timings, minutes), encoding="utf-8")
    content = {
        "minutes": minutes,
        "rows": {row.full: result for row, result in found.items()},
        "timings": timings,
    }
    stem.with_suffix(".json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    written = [stem.with_suffix(".md"), stem.with_suffix(".json")]
    if points_of(found, timings):
        written.append(figure(element, found, timings, stem.with_suffix(".png")))
    return written
