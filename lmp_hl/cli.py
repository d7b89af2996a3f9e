"""The command `lmp-hl`: one verb per task; each part is imported when its verb runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmp_hl import __version__

# what wrong input raises, here or in a library; anything else is a bug and keeps its traceback
BAD_INPUT = (ValueError, OSError, ImportError)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _train(args: argparse.Namespace) -> int:
    from lmp_hl import plots
    from lmp_hl.training.notebook import COLUMNS, read_metrics
    from lmp_hl.training.train import train

    folder = train(args.config, resume=args.resume).parent
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0  # one process of several; the first one draws
    rows = read_metrics(folder / "metrics.csv")
    columns = {name: [row.get(name, float("nan")) for row in rows] for name in COLUMNS}
    labels = {
        n.partition("_")[2]: plots.field_label(n.partition("_")[2], u) for n, u in COLUMNS.items()
    }
    print(f"wrote {plots.learning_curves(columns, folder / 'learning_curves.png', labels)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from lmp_hl.training.checkpoint import export_checkpoint

    if args.model.suffix == ".ckpt":
        raise ValueError(f"{args.model}: the last word is the file to write, such as hl.pt")
    if args.runtime != "aoti" and (args.device != "cpu" or args.cpu_isa != "native"):
        raise ValueError(
            "--device and --cpu-isa are of compiled models; a TorchScript hl.pt runs on all "
            "(add --runtime aoti, or leave them away)"
        )
    export_checkpoint(
        args.checkpoints,
        args.model,
        args.runtime,
        args.dtype,
        args.device,
        args.cpu_isa,
        args.valid,
    )
    print(f"wrote {args.model}")
    return 0


def _split(args: argparse.Namespace) -> int:
    from lmp_hl.training.checkpoint import split_checkpoint

    for path in split_checkpoint(args.checkpoint, args.out):
        print(f"wrote {path}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from lmp_hl.model_file import describe

    print(describe(args.model))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from lmp_hl import evaluate

    evaluate.run(
        args.model, args.data, args.seen, args.json, args.csv, args.figures, **_label_keys(args)
    )
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from lmp_hl.training.calibrate import recalibrate

    card = recalibrate(args.model, args.data, args.out, **_label_keys(args))
    found, ensemble = card["calibration"], card.get("ensemble", {}).get("calibration")
    rmse = (ensemble or found)["force_rmse"]
    size = ""
    if "size_ratio" in found:
        size = f"; predicted/true size {found['size_ratio']:.2f} (cross-validated)"
    if ensemble:
        size += f"; ensemble_force_std times {ensemble['force_factor']:.3g}"
    print(
        f"calibrated on {found['validation_frames']} frames, {found['validation_atoms']} atoms: "
        f"force error {1e3 * rmse:.1f} meV/Å{size}\nwrote {args.out or args.model}"
    )
    return 0


def _label_keys(args: argparse.Namespace) -> dict[str, Any]:
    known = ("energy_key", "forces_key", "stress_key")
    return {k: getattr(args, k) for k in known if getattr(args, k) is not None}


def _analyze(args: argparse.Namespace) -> int:
    from lmp_hl import analysis_report

    analysis_report.run(
        args.trajectory, args.out, args.axis, dict(args.threshold), number=args.select,
        radius=args.environment, model_path=args.model,
    )  # fmt: skip
    return 0


def _convert(args: argparse.Namespace) -> int:
    from lmp_hl.convert import convert

    frames = slice(args.start, args.stop, args.step)
    count = convert(args.trajectory, args.out, frames, progress=sys.stderr.isatty())
    print(f"wrote {count} frames to {args.out}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from lmp_hl import doctor

    return doctor.main()


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted FIELD=VALUE, got '{text}'") from None


def _frame_step(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"wanted a positive number of frames, got '{text}'")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lmp-hl",
        description="Categorical (HL-Gauss) potentials: train, export, evaluate, analyse.",
        epilog="lmp-hl VERB --help shows an example of each verb.",
    )
    parser.add_argument("--version", action="version", version=f"lmp-hl {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        name: str, action: Callable[[argparse.Namespace], int], about: str, example: str
    ) -> Any:
        made = verbs.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"example: {example}",
        )
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        made.set_defaults(action=action)
        return made

    def labels(parser: Any) -> None:
        for label in ("energy", "forces", "stress"):
            about = f"label in the file (default {label})"
            parser.add_argument(f"--{label}-key", metavar="KEY", help=about)

    p = verb(
        "train", _train, "train a potential from one YAML file",
        "lmp-hl train silicon.yaml   (then: lmp-hl export runs/silicon/model.ckpt hl.pt)",
    )  # fmt: skip
    p.add_argument("config", type=Path, metavar="CONFIG.yaml")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run exactly")

    p = verb(
        "export", _export, "write a trained checkpoint as a model file for LAMMPS and Python",
        "lmp-hl export runs/silicon/model.ckpt hl.pt   (compiled: --runtime aoti ... hl.pt2; "
        "an ensemble: a.ckpt b.ckpt c.ckpt hl.pt)",
    )  # fmt: skip
    p.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CKPT",
        help="several: one ensemble of them; or an hl.pt, to compile it",
    )  # fmt: skip
    p.add_argument("model", type=Path, metavar="hl.pt")
    p.add_argument(
        "--valid", type=Path, metavar="DATA.xyz",
        help="frames that no member of an ensemble was trained on: calibrates ensemble_force_std",
    )  # fmt: skip
    p.add_argument(
        "--runtime", choices=["torchscript", "aoti"], default="torchscript",
        help="torchscript: hl.pt, for any device; aoti: hl.pt2, compiled for one, faster",
    )  # fmt: skip
    p.add_argument(
        "--dtype", choices=["float32", "float64"], help="of the network (default: as trained)"
    )
    p.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of a compiled model (default cpu)"
    )
    p.add_argument(
        "--cpu-isa", choices=["native", "x86-64-v2", "x86-64-v3", "x86-64-v4"], default="native",
        help="oldest CPU that will run a compiled model: v3 has AVX2, v4 AVX-512 "
        "(default native: like this one)",
    )  # fmt: skip

    p = verb(
        "split", _split,
        "write the heads of a committee as checkpoints; exported as an ensemble, at the price of "
        "as many potentials, they have forces that disagree",
        "lmp-hl split model.ckpt && lmp-hl export model-head*.ckpt hl.pt --valid valid.xyz",
    )  # fmt: skip
    p.add_argument("checkpoint", type=Path, metavar="CKPT")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: beside the checkpoint")

    p = verb("info", _info, "print the card of a model file", "lmp-hl info hl.pt")
    p.add_argument("model", type=Path, metavar="hl.pt")

    p = verb(
        "evaluate", _evaluate,
        "errors on labelled frames, and what each uncertainty is worth beside trivial controls",
        "lmp-hl evaluate hl.pt held_out.xyz --seen test.xyz --json e.json --figures figures/",
    )  # fmt: skip
    p.add_argument("model", type=Path, metavar="hl.pt")
    p.add_argument("data", type=Path, metavar="DATA.xyz", help="frames with energy and forces")
    p.add_argument(
        "--seen", type=Path, metavar="OTHER.xyz",
        help="frames like the training frames: adds how well held-out DATA is told from them",
    )  # fmt: skip
    p.add_argument("--json", type=Path, metavar="F", help="write all numbers")
    p.add_argument("--csv", type=Path, metavar="F", help="write one line per atom")
    p.add_argument("--figures", type=Path, metavar="DIR", help="write figures")
    labels(p)

    p = verb(
        "calibrate", _calibrate,
        "fit the uncertainty of an hl.pt, or of an ensemble, to other frames; energies and forces "
        "stay",
        "lmp-hl calibrate hl.pt new_labels.xyz --out hl-new.pt",
    )  # fmt: skip
    p.add_argument(
        "model", type=Path, metavar="hl.pt",
        help="not compiled; afterwards: lmp-hl export --runtime aoti hl.pt hl.pt2",
    )  # fmt: skip
    p.add_argument(
        "data", type=Path, metavar="DATA.xyz",
        help="at least 4 frames (an ensemble: 5) with energy and forces that it was not trained on",
    )  # fmt: skip
    p.add_argument("--out", type=Path, metavar="NEW.pt", help="default: replace hl.pt")
    labels(p)

    p = verb(
        "analyze", _analyze, "the uncertainty along a trajectory: tables, figures, frames to label",
        "lmp-hl analyze traj.h5md --out figures/ --threshold force_std=0.3",
    )  # fmt: skip
    p.add_argument("trajectory", type=Path, metavar="traj.h5md")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: traj-analysis beside the file")
    p.add_argument("--axis", choices="xyz", default="z", help="of the profile (default z)")
    p.add_argument(
        "--threshold", type=_threshold, action="append", default=[], metavar="FIELD=VALUE",
        help="count atoms above it (default: the model card's 'largest', see lmp-hl info; without "
        "one, median + 5 robust standard deviations of frame 0)",
    )  # fmt: skip

    p.add_argument(
        "--select", type=int, metavar="N",
        help="write the N most uncertain and most different frames as selected.xyz, to be labelled",
    )  # fmt: skip
    p.add_argument(
        "--environment", type=float, metavar="R",
        help="with --select: not frames, but what is within R Å of uncertain atoms",
    )  # fmt: skip
    p.add_argument(
        "--model", type=Path, metavar="hl.pt",
        help="with --select: tell environments apart by its features (default: by the geometry)",
    )  # fmt: skip

    p = verb(
        "convert", _convert, "write a trajectory as extended XYZ or as a LAMMPS dump for OVITO",
        "lmp-hl convert traj.h5md last.extxyz --start -100",
    )  # fmt: skip
    p.add_argument("trajectory", type=Path, metavar="traj.h5md")
    p.add_argument(
        "out", type=Path, metavar="OUT",
        help="extended XYZ in ASE's units (.xyz, .extxyz) or LAMMPS dump (.lammpstrj, .dump)",
    )  # fmt: skip
    for name, about in (
        ("start", "first frame, counted from 0, or from the end if negative"),
        ("stop", "the frame before which to stop"),
        ("step", "take every Nth frame"),
    ):
        p.add_argument(
            f"--{name}", type=_frame_step if name == "step" else int, metavar="N", help=about
        )

    verb("doctor", _doctor, "find out what is wrong with this installation", "lmp-hl doctor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: words after the command's name; those of the process by default.

    Returns:
        0; 1 when doctor found a problem or the reader of the output has gone; 2 after one line on
        stderr when the input is wrong; 130 when interrupted.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return int(args.action(args))
    except BrokenPipeError:
        # the reader of our output (head, less) has gone; do not complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        hint = "; continue with --resume" if args.verb == "train" else ""
        print(f"lmp-hl {args.verb}: interrupted{hint}", file=sys.stderr)
        return 130
    except BAD_INPUT as error:
        if args.debug:
            raise
        print(f"lmp-hl {args.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
