"""Cost in LAMMPS of uncertainty at every step, and of the ways to run a model, beside SNAP's.

    python benchmarks/cost.py --element Cu local/hl.pt local/hl.pt2 mp/hl.pt mp/hl.pt2

The crystal of front_rows.py (864 Cu atoms, say) at 300 K, one MPI rank, one thread; all variants
are run `--repeats` times in turn, so all meet the same machine. SNAP and quadratic SNAP of Zuo et
al. (2020), built into LAMMPS, stand beside as the yardstick. Processor time, medians and ranges;
read them as ratios to the same file without uncertainty, or to SNAP.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import front_evaluate
import front_lammps
from front_peers import environment, lammps_command
from front_rows import CRYSTALS, Row
from provenance import one_line, provenance

from lmp_hl.model_file import load

RESULTS = Path(__file__).resolve().parent / "results"
NEVER, ALWAYS = "never", "every step"

UNCERTAINTY = """
compute u all hlgauss/atom entropy force_std force_entropy distance
compute umax all reduce max c_u[1] c_u[2] c_u[3] c_u[4]
variable umax equal c_umax[2]
fix stop all halt 1 v_umax > 1e9
"""

Variant = tuple[str, str]  # file or potential, what is asked of it


def variants(models: list[Path], element: str) -> dict[Variant, str]:
    """Lines of input of every variant."""
    found = {}
    for model in models:
        name = "/".join(model.parts[-2:])
        for words, style, extra in (
            (NEVER, "", ""), (ALWAYS, "", UNCERTAINTY), ("comm extended", " comm extended", ""),
        ):  # fmt: skip
            if style and load(model).num_layers == 1:
                continue  # its messages are the same
            pair = front_lammps.pair_lines(f"mliap model {model}{style}", element)
            found[name, words] = pair + extra
    for potential in ("snap", "qsnap"):
        subject = front_evaluate.subject_of(Row(element, potential, "lammps"), Path(), 0.0)
        found[subject.row.potential.about, "-"] = subject.pair
    return found


def page(element: str, times: dict[Variant, list[float]], steps: dict[str, object]) -> str:
    """Markdown table with ratios to the same file without uncertainty and to SNAP."""
    middle = {key: statistics.median(values) for key, values in times.items()}
    snap = next(value for (_, asked), value in middle.items() if asked == "-")
    lines = [
        f"{CRYSTALS[element].num_atoms} {element} atoms, one thread, "
        f"{len(next(iter(times.values())))} measurements of each in turn",
        "",
        "| potential | uncertainty | µs/atom/step, median (range) | of never | of SNAP |",
        "|---|---|---|---|---|",
    ]
    for (name, asked), values in times.items():
        never = middle.get((name, NEVER))
        ratio = f"{middle[name, asked] / never:.3f}" if never and asked != NEVER else "-"
        spread = f"{middle[name, asked]:.1f} ({min(values):.1f}-{max(values):.1f})"
        of_snap = f"{middle[name, asked] / snap:.2f}"
        lines.append(f"| {name} | {asked} | {spread} | {ratio} | {of_snap} |")
    return "\n".join([*lines, "", one_line(steps)]) + "\n"


def main() -> None:
    """Measure in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="hl.pt")
    parser.add_argument("--element", choices=CRYSTALS, default="Cu")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    chosen = variants([model.resolve() for model in args.models], args.element)
    here = environment("lmp-hl", Path())
    times: dict[Variant, list[float]] = {key: [] for key in chosen}
    crystal = CRYSTALS[args.element]
    for _ in range(args.repeats):
        for key, pair in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                microseconds, _ = front_lammps.measure(
                    lammps_command(here), pair, args.element, crystal, args.seconds,
                    Path(folder), dict(os.environ),
                )  # fmt: skip
            times[key].append(microseconds)
            print(f"{', '.join(key)}: {microseconds:.1f} µs", flush=True)
    made = provenance()
    text = page(args.element, times, made)
    print(text)
    (args.results / "cost.md").write_text(text, encoding="utf-8")
    rows = [{"potential": n, "uncertainty": asked, "us": t} for (n, asked), t in times.items()]
    (args.results / "cost.json").write_text(json.dumps({"rows": rows, "made": made}) + "\n")


if __name__ == "__main__":
    main()
