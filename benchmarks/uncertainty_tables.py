"""Tables of benchmarks/uncertainty.py, from the JSON of every row."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from provenance import one_line
from uncertainty_figures import figures
from uncertainty_scores import (
    WITHIN,
    Result,
    by_method,
    cell_of,
    constants_of,
    intervals_of,
    kinds_of,
    ranking,
    sets_of,
    sizes_of,
)

from lmp_hl.evaluate import TITLES
from lmp_hl.report import MEANINGS

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
                values = [n["value"] for n in intervals_of(results, s, quantity)]
                spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
                row.append(f"{np.mean(values):{form}}{spread}" if values else "-")
        for cost, form in (
            ("seconds", ".0f"), ("training_over_twin", ".2f"), ("inference_over_twin", ".2f"),
        ):  # fmt: skip
            row.append(cell_of([{"value": r["cost"][cost]} for r in results], form, False))
        rows.append(row)
    return _markdown(head, rows)


def _size_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    far = len(which) > 1
    order = " / ".join(which)
    head = ["method", "field", *(["growth"] if far else [])]
    head += [f"{title} {order}" for title in SIZES.values()]

    def line(name: str, field: str, results: Sequence[Result]) -> list[str]:
        growth = [r["report"]["growth"][field] for r in results if "growth" in r["report"]]
        row = [name, field, *([cell_of(growth, ".2f")] if far else [])]
        for kind in SIZES:
            numbers = [intervals_of(results, s, "calibration", field, kind) for s in which]
            form = ".0f" if kind.endswith("Angstrom") else ".2f"
            form = ".3f" if kind == "miscalibration_area" else form
            row.append(_pair([cell_of(n, form, kind in WITH_INTERVAL) for n in numbers]))
        return row

    rows = [
        line(f"`{name}`", f, results)
        for name, results in groups.items()
        for f in sizes_of(results[0])
    ]
    name, results = next(iter(groups.items()))
    rows += [line(f"*control* (of `{name}`)", c, results) for c in constants_of(results[0])]
    return _markdown(head, rows)


def _ranking_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    name, results = next(iter(groups.items()))
    kinds = kinds_of(results[0])
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
                scores = ranking(results, s, kind, signal)
                cell = cell_of(scores, ".2f", s == sets[-1])
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
                numbers = [
                    intervals_of(results, s, "energy_calibration", field, kind) for s in which
                ]
                cells.append(" / ".join(cell_of(n, ".2f") for n in numbers))
            rows.append([f"`{name}`", field, *cells])
    if not rows:
        return []
    title = "Sizes of the errors of frames' energies."
    return [title, "", *_markdown(["method", "field", f"z {order}", f"Spearman {order}"], rows)]


def _promise_table(groups: Mapping[str, Sequence[Result]], which: Sequence[str]) -> list[str]:
    rows = []
    for name, results in groups.items():
        for promise in next(iter(results[0]["report"]["sets"].values())).get("promises", {}):
            kept = [intervals_of(results, s, "promises", promise) for s in which]
            cells = " / ".join(cell_of(k, ".3f") for k in kept)
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
    within = next(k for k in WITHIN if k in kinds_of(first))
    for signal in ("entropy", "force_std"):
        head += [f"{signal} {within.replace('_', ' ')} {order}", f"{signal} AUROC"]
    head += [f"z {order}", "growth"]
    rows = []
    for name, results in groups.items():
        row = [f"`{name}`", results[0]["about"]]
        for quantity in ("energy_rmse_meV_per_atom", "forces_rmse_meV_per_Angstrom"):
            row.append(
                " / ".join(cell_of(intervals_of(results, s, quantity), ".2f") for s in which)
            )
        for signal in ("entropy", "force_std"):
            ranks = [ranking(results, s, within, signal) for s in which]
            row.append(" / ".join(cell_of(r, ".2f") for r in ranks))
            row.append(cell_of(ranking(results, "OOD", "auroc_mean", signal), ".2f"))
        numbers = [
            intervals_of(results, s, "calibration", "force_std", "size_ratio") for s in which
        ]
        row.append(" / ".join(cell_of(n, ".2f") for n in numbers))
        growth = [r["report"].get("growth", {}).get("force_std") for r in results]
        row.append(cell_of([g for g in growth if g], ".2f"))
        rows.append(row)
    return _markdown(head, rows)


def tables(dataset: str, results: Sequence[Result]) -> str:
    """The Markdown page of one data set."""
    groups = by_method(results, ablations=False)
    missing = [r for r in results if "failed" in r]
    lines = [f"# Uncertainty methods on {dataset}", ""]
    if groups:
        first = next(iter(groups.values()))[0]
        which = list(sets_of(first))
        settings = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in first["settings"].items())
        frames = ", ".join(
            f"{s}: {first['report']['sets'][n]['num_frames']} frames, "
            f"{first['report']['sets'][n]['num_atoms']} atoms"
            for s, n in sets_of(first).items()
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
            *(f"- {TITLES.get(k, k.replace('_', ' '))}: {MEANINGS[k]}" for k in kinds_of(first)),
            "",
            "Bold: better than the best trivial control with 95 % confidence, for every seed. A "
            "control takes the better of its two signs.",
            "",
            *_ranking_table(groups, which),
        ]
        ablations = by_method(results, ablations=True)
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
        groups = by_method(found, ablations=False)
        if groups:
            written += figures(groups, stem)
    return written
