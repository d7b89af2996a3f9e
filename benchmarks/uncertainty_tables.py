"""Tables and figures of benchmarks/uncertainty.py, from the JSON of every row."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from provenance import one_line
from uncertainty_rows import ABLATIONS, METHODS

from lmp_hl.evaluate import TITLES
from lmp_hl.plots.style import BLUE, MUTED, RED, STYLE
from lmp_hl.report import MEANINGS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = Mapping[str, Any]

WITHIN: Final = ("within_site", "within_config_type", "within_element")  # the finest there is
KINDS: Final = (
    "pooled", "within_element", "within_config_type", "within_site", "per_frame", "large_error",
    "risk_coverage", "auroc_mean", "auroc_max",
)  # fmt: skip
SIZES: Final = {
    "size_ratio": "z",
    "reliability_slope": "slope",
    "miscalibration_area": "misc. area",
    "ence": "ENCE",
    "gaussian_nll_nats": "NLL, nat",
    "energy_score_meV_per_Angstrom": "energy score, meV/Å",
    "sharpness_meV_per_Angstrom": "sharpness, meV/Å",
}
WITH_INTERVAL: Final = ("size_ratio", "reliability_slope")


# reading ----------------------------------------------------------------------------------------
def _sets(result: Result) -> dict[str, str]:
    """ID and OOD to the report's names for them."""
    names = result["report"]["sets"]
    return {"ID": "seen", "OOD": "held out"} if "held out" in names else {"ID": "data"}


def _numbers(results: Sequence[Result], which: str, *path: str) -> list[Mapping[str, float]]:
    """The intervals at a path of each seed's report["sets"][ID or OOD]; [] where there is none."""
    found = []
    for result in results:
        place: Any = result["report"]["sets"].get(_sets(result).get(which, ""), {})
        for key in path:
            place = place.get(key, {})
        if place:
            found.append(place)
    return found


def _ranking(results: Sequence[Result], which: str, kind: str, signal: str) -> list[Any]:
    """Scores of a signal, each seed's."""
    found = []
    for result in results:
        report = result["report"]
        if kind.startswith("auroc"):
            scores = report.get("separation", {}).get(kind.removeprefix("auroc_"), {})
        else:
            scores = report["ranking"].get(_sets(result).get(which, ""), {}).get(kind, {})
        if signal in scores:
            found.append(scores[signal])
    return found


def _mean(intervals: Sequence[Mapping[str, float]], key: str = "value") -> float:
    values = [float("nan") if s[key] is None else s[key] for s in intervals]
    return float(np.mean(values)) if values else float("nan")


def _cell(intervals: Sequence[Mapping[str, float]], form: str, interval: bool = True) -> str:
    """Mean over seeds ± half the bootstrap interval, mean over seeds."""
    value = _mean(intervals)
    if not math.isfinite(value):
        return "-"
    if not interval:
        return format(value, form)
    return f"{value:{form}} ± {(_mean(intervals, 'high') - _mean(intervals, 'low')) / 2:{form}}"


def _by_method(results: Sequence[Result], ablations: bool) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for name in METHODS:
        chosen = [r for r in results if r["method"] == name and "failed" not in r]
        if chosen and (name in ABLATIONS) == ablations:
            groups[name] = chosen
    return groups


def _constants(result: Result) -> list[str]:
    calibration = next(iter(result["report"]["sets"].values()))["calibration"]
    return [name for name in calibration if name in result["report"]["controls"]]


def _sizes(result: Result) -> list[str]:
    calibration = next(iter(result["report"]["sets"].values()))["calibration"]
    return [name for name in calibration if name not in result["report"]["controls"]]


# tables -----------------------------------------------------------------------------------------
def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _pair(cells: Sequence[str]) -> str:
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _accuracy(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    head = ["method", "what it is", "head", "weights E / F / stress", "seeds"]
    head += [f"energy {s}, meV/atom" for s in which] + [f"forces {s}, meV/Å" for s in which]
    head += ["training, s", "training / twin", "inference / twin"]
    rows = []
    for name, results in groups.items():
        first = results[0]
        loss = first["loss"]
        row = [f"`{name}`", first["about"], first["head"]]
        row += [" / ".join(f"{loss[n]:g}" for n in ("energy", "forces", "stress"))]
        row += [", ".join(str(r["seed"]) for r in results)]
        for quantity, form in (
            ("energy_rmse_meV_per_atom", ".2f"), ("forces_rmse_meV_per_Angstrom", ".1f"),
        ):  # fmt: skip
            for s in which:
                values = [n["value"] for n in _numbers(results, s, quantity)]
                spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
                row.append(f"{np.mean(values):{form}}{spread}" if values else "-")
        for cost, form in (
            ("seconds", ".0f"), ("training_over_twin", ".2f"), ("inference_over_twin", ".2f"),
        ):  # fmt: skip
            row.append(_cell([{"value": r["cost"][cost]} for r in results], form, False))
        rows.append(row)
    return _markdown(head, rows)


def _size_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    far = len(which) > 1
    order = " / ".join(which)
    head = ["method", "field", *(["growth"] if far else [])]
    head += [f"{title} {order}" for title in SIZES.values()]

    def line(name: str, field: str, results: Sequence[Result]) -> list[str]:
        growth = [r["report"]["growth"][field] for r in results if "growth" in r["report"]]
        row = [name, field, *([_cell(growth, ".2f")] if far else [])]
        for kind in SIZES:
            numbers = [_numbers(results, s, "calibration", field, kind) for s in which]
            form = ".0f" if kind.endswith("Angstrom") else ".2f"
            form = ".3f" if kind == "miscalibration_area" else form
            row.append(_pair([_cell(n, form, kind in WITH_INTERVAL) for n in numbers]))
        return row

    rows = [
        line(f"`{name}`", f, results)
        for name, results in groups.items()
        for f in _sizes(results[0])
    ]
    name, results = next(iter(groups.items()))
    rows += [line(f"*control* (of `{name}`)", c, results) for c in _constants(results[0])]
    return _markdown(head, rows)


def _kinds(result: Result) -> list[str]:
    report = result["report"]
    ranked = next(iter(report["ranking"].values()))
    return [k for k in KINDS if k in ranked or ("separation" in report and k.startswith("auroc"))]


def _ranking_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    name, results = next(iter(groups.items()))
    kinds = _kinds(results[0])
    order = " / ".join(which)
    head = ["method", "signal"]
    head += [
        TITLES.get(k, k.replace("_", " ")) + ("" if k.startswith("auroc") else f" {order}")
        for k in kinds
    ]

    def line(label: str, signal: str, results: Sequence[Result]) -> list[str]:
        row = [label, signal]
        for kind in kinds:
            sets = which[-1:] if kind.startswith("auroc") else which
            cells = []
            for s in sets:
                scores = _ranking(results, s, kind, signal)
                cell = _cell(scores, ".2f", s == sets[-1])
                leads = [x["over_best_control"]["low"] for x in scores if "over_best_control" in x]
                better = bool(leads) and all(lead is not None and lead > 0 for lead in leads)
                cells.append(f"**{cell}**" if better else cell)
            row.append(" / ".join(cells))
        return row

    rows = []
    for method, found in groups.items():
        controls = found[0]["report"]["controls"]
        signals = next(iter(next(iter(found[0]["report"]["ranking"].values())).values()))
        rows += [
            line(f"`{method}`", s, found)
            for s in signals
            if s not in controls and s != "excess_entropy"  # ranks as entropy does
        ]
    rows += [line(f"*control* (of `{name}`)", c, results) for c in results[0]["report"]["controls"]]
    return _markdown(head, rows)


def _energy_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    order = " / ".join(which)
    rows = []
    for name, results in groups.items():
        for field in next(iter(results[0]["report"]["sets"].values()))["energy_calibration"]:
            cells = []
            for kind in ("size_ratio", "spearman"):
                numbers = [_numbers(results, s, "energy_calibration", field, kind) for s in which]
                cells.append(" / ".join(_cell(n, ".2f") for n in numbers))
            rows.append([f"`{name}`", field, *cells])
    if not rows:
        return []
    title = "Energies of frames: the variance is the sum over atoms, as if they were independent."
    return [title, "", *_markdown(["method", "field", f"z {order}", f"Spearman {order}"], rows)]


def _promise_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    rows = []
    for name, results in groups.items():
        for promise in next(iter(results[0]["report"]["sets"].values())).get("promises", {}):
            kept = [_numbers(results, s, "promises", promise) for s in which]
            cells = " / ".join(_cell(k, ".3f") for k in kept)
            rows.append([f"`{name}`", promise.replace("_", " "), cells])
    if not rows:
        return []
    title = "Share of the atoms, every frame counting the same, for which a promise was kept."
    return [title, "", *_markdown(["method", "promise", " / ".join(which)], rows)]


def _ablation_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    """What the method's own choices do to accuracy, entropy and force_std."""
    order = " / ".join(which)
    head = ["variant", "what it is", f"energy {order}, meV/atom", f"forces {order}, meV/Å"]
    first = next(iter(groups.values()))[0]
    within = next(k for k in WITHIN if k in _kinds(first))
    for signal in ("entropy", "force_std"):
        head += [f"{signal} {within.replace('_', ' ')} {order}", f"{signal} AUROC"]
    head += [f"z {order}", "growth"]
    rows = []
    for name, results in groups.items():
        row = [f"`{name}`", results[0]["about"]]
        for quantity in ("energy_rmse_meV_per_atom", "forces_rmse_meV_per_Angstrom"):
            row.append(" / ".join(_cell(_numbers(results, s, quantity), ".2f") for s in which))
        for signal in ("entropy", "force_std"):
            ranks = [_ranking(results, s, within, signal) for s in which]
            row.append(" / ".join(_cell(r, ".2f") for r in ranks))
            row.append(_cell(_ranking(results, "OOD", "auroc_mean", signal), ".2f"))
        numbers = [_numbers(results, s, "calibration", "force_std", "size_ratio") for s in which]
        row.append(" / ".join(_cell(n, ".2f") for n in numbers))
        growth = [r["report"].get("growth", {}).get("force_std") for r in results]
        row.append(_cell([g for g in growth if g], ".2f"))
        rows.append(row)
    return _markdown(head, rows)


def tables(dataset: str, results: Sequence[Result]) -> str:
    """The Markdown page of one data set."""
    groups = _by_method(results, ablations=False)
    missing = [r for r in results if "failed" in r]
    lines = [f"# Uncertainty methods on {dataset}", ""]
    if groups:
        first = next(iter(groups.values()))[0]
        which = list(_sets(first))
        settings = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in first["settings"].items())
        frames = ", ".join(
            f"{s}: {first['report']['sets'][n]['num_frames']} frames, "
            f"{first['report']['sets'][n]['num_atoms']} atoms"
            for s, n in _sets(first).items()
        )
        lines += [
            f"Every network: {settings}. Test frames {frames}. Values are means over the seeds; "
            "± is half the 95 % interval from resampling whole frames, in the first table the "
            "standard deviation between seeds.",
            "",
            "## Accuracy and cost",
            "",
            "RMSE. Training is processor time of one thread, the fit included; the twin is `scalar`"
            " of the same seed, without fields in inference.",
            "",
            *_accuracy(groups, which),
            "## Size",
            "",
            *(f"- {title}: {MEANINGS[kind]}" for kind, title in SIZES.items()),
            *([f"- growth: {MEANINGS['growth']}"] if len(which) > 1 else []),
            "",
            *_size_table(groups, which),
            *_promise_table(groups, which),
            *_energy_table(groups, which),
            "## Ranking",
            "",
            *(f"- {TITLES.get(k, k.replace('_', ' '))}: {MEANINGS[k]}" for k in _kinds(first)),
            "",
            "Bold: better than the best trivial control with 95 % confidence, for every seed. A "
            "control takes the better of its two signs.",
            "",
            *_ranking_table(groups, which),
        ]
        ablations = _by_method(results, ablations=True)
        if ablations:
            lines += [
                "## The method itself",
                "",
                "Shorter trainings, each of as many steps as `short`, which has the settings of "
                "`default`.",
                "",
                *_ablation_table(ablations, which),
            ]
    if missing:
        reasons: dict[str, list[str]] = {}
        for r in missing:
            reasons.setdefault(r["failed"], []).append(f"`{r['row']}`")
        lines += ["## Rows that are not there", ""]
        lines += [f"- {reason}: {', '.join(rows)}" for reason, rows in reasons.items()]
        lines.append("")
    made = [r["made"] for r in results if "made" in r]
    if made:
        lines.append(one_line(max(made, key=lambda m: m["date"])))
    return "\n".join(lines) + "\n"


# figures ----------------------------------------------------------------------------------------
COLORS: Final = {"ID": BLUE, "OOD": RED}


def _reliability_figure(groups: Mapping[str, Sequence[Result]], path: Path) -> Path:
    """Predicted against observed size of the error near and far, one panel a method."""
    shown = {n: r[0] for n, r in groups.items() if _sizes(r[0])}
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 0.6, 2.6 * rows + 0.3), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, (name, result) in zip(axes.flat, shown.items(), strict=False):
        field = _sizes(result)[0]
        everything = []
        for which, key in _sets(result).items():
            curve = result["report"]["sets"][key]["calibration"][field]["reliability"]
            x, y = (
                1e3 * np.array(curve[f"{end}_eV_per_Angstrom"]) for end in ("predicted", "observed")
            )
            ax.plot(x, y, "o-", color=COLORS[which], ms=4, lw=1.2, label=which)
            everything += [*x, *np.maximum(y, x.min() / 3)]  # by symmetry some have no error
        ends = [min(everything) / 1.3, max(everything) * 1.3]
        ax.plot(ends, ends, color=MUTED, lw=0.8, zorder=0)
        ax.set(xscale="log", yscale="log", title=name, xlim=ends, ylim=ends)
        ax.text(0.04, 0.94, field, transform=ax.transAxes, fontsize=7.5, color=MUTED, va="top")
    axes.flat[0].legend(loc="lower right")
    figure.supxlabel("predicted error of a force component (meV/Å)", fontsize=9.5)
    figure.supylabel("observed (meV/Å)", fontsize=9.5)
    figure.savefig(path)
    plt.close(figure)
    return path


def _bars(ax: Any, labels: Sequence[str], intervals: Sequence[Any], colors: Sequence[str]) -> None:
    """Horizontal bars with intervals, the first on top."""
    rows = np.arange(len(labels))[::-1]
    for row, s, color in zip(rows, intervals, colors, strict=True):
        value = _mean(s)
        ax.barh(row, value, color=color, height=0.7, alpha=0.85)
        ax.plot([_mean(s, "low"), _mean(s, "high")], [row, row], color="#1f2933", lw=1.2)
    ax.set_yticks(rows, labels)
    ax.grid(axis="y", visible=False)


def _ranking_figure(groups: Mapping[str, Sequence[Result]], path: Path) -> Path:
    """Spearman within the finest group of every method's best field, and of the controls."""
    first = next(iter(groups.values()))
    which, within = list(_sets(first[0])), next(k for k in WITHIN if k in _kinds(first[0]))
    entries: list[tuple[str, str, Sequence[Result], str]] = []
    for name, results in groups.items():
        controls = results[0]["report"]["controls"]
        scores = results[0]["report"]["ranking"][_sets(results[0])[which[-1]]][within]
        fields = [s for s in scores if s not in controls]
        for field in fields:
            if field not in ("excess_entropy", "force_entropy", "ensemble_raw_std"):
                entries.append((f"{name}: {field}", field, results, BLUE))
    entries += [(f"control: {c}", c, first, MUTED) for c in first[0]["report"]["controls"]]
    figure, axes = plt.subplots(
        1, len(which), figsize=(2.6 + 3.0 * len(which), 0.9 + 0.23 * len(entries)),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for ax, s in zip(axes[0], which, strict=True):
        scores = [_ranking(results, s, within, signal) for _, signal, results, _ in entries]
        _bars(ax, [e[0] for e in entries], scores, [e[3] for e in entries])
        best = max(_mean(x) for x, e in zip(scores, entries, strict=True) if e[3] == MUTED)
        ax.axvline(best, color=RED, lw=0.9, ls="--")
        ax.set(title=s, xlabel=f"Spearman {within.replace('_', ' ')}")
    figure.savefig(path)
    plt.close(figure)
    return path


def _growth_figure(groups: Mapping[str, Sequence[Result]], path: Path) -> Path:
    """Growth of every size from ID to OOD frames over the growth of the error."""
    first = next(iter(groups.values()))
    entries = [
        (f"{name}: {field}", [r["report"]["growth"][field] for r in results], BLUE)
        for name, results in groups.items()
        for field in _sizes(results[0])
    ]
    entries += [
        (f"control: {c}", [r["report"]["growth"][c] for r in first], MUTED)
        for c in _constants(first[0])
    ]
    figure, ax = plt.subplots(
        figsize=(6.2, 0.9 + 0.25 * len(entries)), layout="constrained"
    )  # fmt: skip
    _bars(ax, [e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries])
    ax.axvspan(0.7, 1.4, color="#e4e8ed", zorder=0)
    ax.axvline(1.0, color=MUTED, lw=0.8)
    ax.set(xlabel="(predicted OOD / ID) / (true OOD / ID)", xlim=(0, None))
    figure.savefig(path)
    plt.close(figure)
    return path


# all --------------------------------------------------------------------------------------------
def _compact(value: Any) -> Any:
    """Numbers with four digits."""
    if isinstance(value, dict):
        return {
            k: _compact(v) for k, v in value.items() if k not in ("by_element", "by_config_type")
        }
    if isinstance(value, list):
        return [_compact(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_results(datasets: Mapping[str, Sequence[Result]], results: Path) -> list[Path]:
    """Write uncertainty_<dataset>.{md,json,png} of every data set with a scored row.

    Args:
        datasets: name -> every row's numbers or {"row", "method", "failed"}.
        results: folder to write to.
    """
    results.mkdir(parents=True, exist_ok=True)
    written = []
    for dataset, found in datasets.items():
        if all("failed" in result for result in found):
            continue
        stem = results / f"uncertainty_{dataset}"
        stem.with_suffix(".md").write_text(tables(dataset, found), encoding="utf-8")
        text = json.dumps(_compact(list(found)), separators=(",", ":"))
        stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        written += [stem.with_suffix(".md"), stem.with_suffix(".json")]
        groups = _by_method(found, ablations=False)
        if groups:
            with matplotlib.rc_context(STYLE):
                written.append(_reliability_figure(groups, Path(f"{stem}_reliability.png")))
                written.append(_ranking_figure(groups, Path(f"{stem}_ranking.png")))
                if "growth" in next(iter(groups.values()))[0]["report"]:
                    written.append(_growth_figure(groups, Path(f"{stem}_growth.png")))
    return written
