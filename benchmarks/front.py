"""Error against cost of potentials, each trained, scored and timed here: one command.

    python benchmarks/front.py --data DIR                          # everything
    python benchmarks/front.py --data DIR --rows Cu/local Cu/snap  # some of it
    python benchmarks/front.py --list
    python benchmarks/front.py --data DIR --score-only             # train nothing
    python benchmarks/front.py --data DIR --minutes 5              # of one core for each training

A row is element/potential/runtime (front_rows.py). What it needs and is not there is made: the
maker's environment, a training within --minutes of one core, the exported file. That file is scored
on the test frames and timed, in processor time of one thread; all files of an element are timed in
turn, --repeats times, whenever one of them is new, so that every ratio is of one run on one
machine. All of it is kept under --out, and the same command goes on where it was stopped. A row
that cannot be had stands in the table with the reason. --minutes 0 trains nothing to speak of:
speed alone.
"""

import argparse
import fnmatch
import json
import os
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import front_evaluate
from front_peers import MAKERS, environment
from front_rows import CRYSTALS, MINUTES, ROWS, Row
from front_tables import write_results
from front_training import Training, recipe, train
from provenance import provenance
from uncertainty_data import write_split

HERE = Path(__file__).resolve().parent
Result = dict[str, Any]


def select(patterns: Sequence[str]) -> list[Row]:
    """Rows whose name has a part that matches one of the patterns."""
    return [r for r in ROWS if any(fnmatch.fnmatch(r.full, f"*{p}*") for p in patterns)]


def write_json(path: Path, content: object) -> None:
    """Replace a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def _path(row: Row, out: Path, minutes: float) -> Path:
    return out / f"{minutes:g}min" / "rows" / f"{row.full.replace('/', '-')}.json"


def stored(row: Row, out: Path, minutes: float) -> Result:
    """The row's numbers, or {"failed": why there are none}."""
    path = _path(row, out, minutes)
    if not path.is_file():
        return {"failed": "not made"}
    found: Result = json.loads(path.read_text())
    if "failed" not in found and found.get("recipe") != recipe((row.element, row.name)):
        return {"failed": "made with other settings"}
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, ValueError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def make(
    rows: Sequence[Row], data: Path, out: Path, minutes: float, jobs: int, score_only: bool
) -> None:
    """Train and score what is missing (with score_only: train nothing, score everything again)."""
    wanted = [r for r in rows if score_only or "failed" in stored(r, out, minutes)]
    failed: dict[Training, str] = {}
    if not score_only:
        trainings = {(r.element, r.name): r.potential.maker for r in wanted}
        for maker in set(trainings.values()) & set(MAKERS):  # one pip at a time
            try:
                environment(maker, out)
            except ValueError as error:
                failed |= {t: str(error) for t, name in trainings.items() if name == maker}
        pool = ThreadPoolExecutor(jobs)
        try:
            futures: dict[Training, Future[None]] = {
                t: pool.submit(train, t, data, out, minutes) for t in trainings if t not in failed
            }
            for training, future in futures.items():
                error = future.exception()
                if error is not None:
                    failed[training] = _reason(error)
                    print(f"{'-'.join(training)}: {failed[training]}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt starts no further training
    for row in wanted:
        reason = failed.get((row.element, row.name))
        if reason is None:
            try:
                split = write_split(f"mlearn-{row.element}", data, out)
                numbers = front_evaluate.score(row, split, out, minutes)
            except Exception as error:  # one bad row does not stop the others
                reason = _reason(error)
        result: Result = {"failed": reason}
        if reason is None:
            used = recipe((row.element, row.name))
            result = {**numbers, "recipe": used, "made": provenance()}
        write_json(_path(row, out, minutes), result)
        print(f"{row.full}: {result.get('failed', 'scored')}", flush=True)


def clock(element: str, out: Path, minutes: float, repeats: int) -> Result:
    """Time all files of an element in turn; {"rows": name -> times, "made": ...}.

    Measurements are kept after each one and begin anew when a file is not the one they were made
    with, or is missing among them.
    """
    path = out / f"{minutes:g}min" / f"timings-{element}.json"
    subjects, hashes = {}, {}
    for row in ROWS:
        found = stored(row, out, minutes)
        if row.element == element and "failed" not in found:
            subjects[row.full] = front_evaluate.subject_of(row, out, minutes)
            hashes[row.full] = subjects[row.full].hash
    kept: Result = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("hashes") != hashes:
        kept = {"hashes": hashes, "rows": {name: [] for name in hashes}, "load": []}
    for number in range(1, repeats + 1):
        for name, subject in subjects.items():
            times = kept["rows"][name]
            if len(times) >= number:
                continue
            try:
                microseconds, peak = front_evaluate.measure(subject)
            except ValueError as error:
                times.append({"failed": str(error)})
            else:
                times.append({"us": microseconds, "MiB": peak})
                print(f"{name}: {microseconds:.1f} µs", flush=True)
            kept["load"].append(round(os.getloadavg()[0], 1))
            kept["made"] = provenance()
            write_json(path, kept)
    return kept


def main() -> None:
    """Train, score, time and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data sets (uncertainty_data.py)")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="patterns of element/potential/runtime"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of one core, a training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing (default 5)")
    parser.add_argument("--list", action="store_true", help="name the rows and what is there")
    parser.add_argument("--score-only", action="store_true", help="score again, train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/front"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    out, rows = args.out.resolve(), select(args.rows)
    if not rows:
        parser.error(f"no row matches {' or '.join(args.rows)}; --list names them all")
    if args.minutes < 0:
        parser.error(f"--minutes must be >= 0, got {args.minutes:g}")
    if args.list:
        for row in rows:
            result = stored(row, out, args.minutes)
            print(f"{row.full:36} {result.get('failed', 'scored')}")
        return
    if args.data is None:
        parser.error("--data is needed to train and to score")
    out.mkdir(parents=True, exist_ok=True)
    make(rows, args.data.resolve(), out, args.minutes, args.jobs, args.score_only)
    for element in CRYSTALS:
        if not any(row.element == element for row in rows):
            continue
        timings = clock(element, out, args.minutes, args.repeats)
        found = {r: stored(r, out, args.minutes) for r in ROWS if r.element == element}
        for path in write_results(element, found, timings, args.minutes, args.results):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
