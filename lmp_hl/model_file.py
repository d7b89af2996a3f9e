"""An exported model, `hl.pt` or `hl.pt2`, on the Python side: opened, checked, run, described.

`hl.pt` is TorchScript for any device; `hl.pt2` is code compiled for one (runtime.py). Both say the
same about themselves and are evaluated through the same `Model`.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import stages
from .runtime import BUILD_RECORD, TORCHSCRIPT_RECORD, Build, CompiledStages

FORMAT_VERSION = 4


class Model:
    """A loaded `hl.pt` or `hl.pt2`.

    Attributes:
        path: where it came from.
        elements: chemical symbols in the model's order.
        cutoff: Å.
        num_layers: 1 strictly local, more message passing.
        dtype: "float32" or "float64", of edge vectors and network.
        fields: per-atom fields it can return (keys.py), with `field_units`.
        card: everything else it says about itself.
        hash: SHA-256 of the file, hexadecimal.
        runtime: what evaluates it, for a reader.
    """

    def __init__(
        self,
        path: Path,
        module: torch.jit.ScriptModule,
        device: str,
        digest: str,
        build: Build | None,
    ) -> None:
        self.path = path
        self.module = module
        self.build = build
        self.compiled: stages.Runtime | None = None
        self.device = device
        self.hash = digest
        self.runtime = build.describe() if build else "TorchScript, for any device"
        self.elements: list[str] = list(module.elements)
        self.masses: list[float] = list(module.masses)
        self.cutoff: float = module.cutoff
        self.num_layers: int = module.num_layers
        self.dtype: str = module.dtype
        self.units: str = module.units
        self.fields: list[str] = list(module.fields)
        self.field_units: list[str] = list(module.field_units)
        self.card: dict[str, Any] = json.loads(module.card)

    def evaluate(self, inputs: dict[str, Tensor], with_fields: bool = True) -> dict[str, Tensor]:
        """Outputs of the model (keys.py) for the inputs of keys.py, on the CPU."""
        on_host = ("layer_nodes", "layer_edges")
        moved = {k: v if k in on_host else v.to(self.device) for k, v in inputs.items()}
        outputs: dict[str, Tensor]
        if self.compiled is not None:
            outputs = stages.evaluate(self.compiled, moved, with_fields)
        else:
            outputs = self.module(moved, with_fields, False)
        return {k: v.detach().cpu() for k, v in outputs.items()}


def load(path: str | Path, device: str = "cpu") -> Model:
    """Open an exported model and run its self-test.

    A model file is a program: open only files from people you trust.

    Args:
        path: `hl.pt` or `hl.pt2`.
        device: torch device to evaluate on.

    Raises:
        ValueError: no such file; truncated or not a model; a newer format; compiled for something
            else than what is here; the self-test gives other numbers than when it was exported.
    """
    model = _read(Path(path), device)
    if model.build is not None:
        model.build.check(path, device)
        model.compiled = CompiledStages(path, model.module, device)
    self_test(model)
    return model


def _read(path: Path, device: str) -> Model:
    """The model without the compiled code, if it has any."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such model file; export one with lmp-hl export model.ckpt {path}"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: truncated, or not a TorchScript file (its first or last bytes are not those "
            f"of one); export it again with lmp-hl export"
        )
    build, content = None, path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    try:
        archive = torch._C.PyTorchFileReader(io.BytesIO(content))
        if BUILD_RECORD in archive.get_all_records():
            build = Build.parse(archive.get_record(BUILD_RECORD).decode(), path)
            content, device = archive.get_record(TORCHSCRIPT_RECORD), "cpu"
        module = torch.jit.load(io.BytesIO(content), map_location=device)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a TorchScript model that torch can open ({line:.200})"
        ) from None
    version = getattr(module, "format_version", None)
    if not isinstance(version, int):
        raise ValueError(
            f"{path}: a TorchScript file, but not of lmp-hl (no format_version); export one with "
            f"lmp-hl export"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: model format {version} is newer than this lmp-hl, which reads up to "
            f"{FORMAT_VERSION}; update lmp-hl"
        )
    return Model(path, module.eval(), device, digest, build)


def self_test(model: Model) -> float:
    """Evaluate the structure stored in the model and compare with the stored outputs.

    Returns:
        The largest deviation relative to max(1, largest expected value) of any output.

    Raises:
        ValueError: a deviation above the tolerance stored in the model.
    """
    outputs = model.evaluate(dict(model.module.selftest_inputs), with_fields=True)
    worst = 0.0
    for key, expected in model.module.selftest_outputs.items():
        expected = expected.cpu().double()
        error = (outputs[key].double() - expected).abs().max() / max(
            1.0, float(expected.abs().max())
        )
        worst = max(worst, float(error))
        if not error <= model.module.selftest_tolerance:
            raise ValueError(
                f"{model.path}: self-test failed: {key} differs by {float(error):.2g} from the "
                f"value at export (tolerance {model.module.selftest_tolerance:g}) on "
                f"{model.device} with torch {torch.__version__}; export the model again with this "
                f"version"
            )
    return worst


def describe(path: str | Path) -> str:
    """The model's card as text for a terminal, also of a model compiled for another machine."""
    model = _read(Path(path), "cpu")
    card = model.card
    training, config, calibration = card["training"], card["config"], card["calibration"]
    metrics = training["metrics"]
    reach = (
        "strictly local" if model.num_layers == 1 else f"{model.num_layers} message-passing layers"
    )
    lines = [
        ("name", card["name"]),
        (
            "file",
            f"{path} ({Path(path).stat().st_size / 2**20:.2f} MiB, "
            f"format {model.module.format_version})",
        ),
        ("sha256", model.hash),
        (
            "elements",
            " ".join(f"{e} ({m:.3f} u)" for e, m in zip(model.elements, model.masses, strict=True)),
        ),
        ("cutoff", f"{model.cutoff:g} Å, {reach}"),
        ("runtime", model.runtime),
        ("precision", f"{model.dtype} network, float64 energies"),
        ("units", f"{model.units} (eV, Å)"),
        *([("ensemble", _ensemble(card["ensemble"]))] if "ensemble" in card else []),
        ("head", _head(card)),
        (
            "fields",
            ", ".join(f"{f} [{u}]" for f, u in zip(model.fields, model.field_units, strict=True)),
        ),
        (
            "trained on",
            f"{training['train_frames']} frames, {training['train_atoms']} atoms; validated on "
            f"{training['valid_frames']} frames; {config['training']['epochs']} epochs in "
            f"{training['seconds']:.0f} s",
        ),
        (
            "validation",
            f"energy {metrics['valid_energy_rmse']:.2f} meV/atom, forces "
            f"{metrics['valid_forces_rmse']:.1f} meV/Å (RMSE)",
        ),
        (
            "calibration",
            f"{calibration['validation_atoms']} validation atoms"
            + _size(calibration)
            + _recalibrated(calibration),
        ),
        ("promises", _promises(card)),
        ("rank of error", _ranking(calibration["ranking"])),
        *([("largest", _largest(calibration))] if "largest" in calibration else []),
        ("versions", ", ".join(f"{k} {v}" for k, v in card["versions"].items())),
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def _ensemble(about: dict[str, Any]) -> str:
    text = f"{len(about['members'])} members, the first of which the lines below are about; "
    if "calibration" not in about:
        return text + "ensemble_force_std is not calibrated (export with --valid)"
    found = about["calibration"]
    return (
        f"{text}ensemble_force_std is calibrated, times {found['force_factor']:.3g}, on "
        f"{found['frames']} frames ({found['atoms']} atoms) of {found['file']}, of which is also "
        f"the rank of error"
    )


def _head(card: dict[str, Any]) -> str:
    if card["config"]["model"]["head"] == "scalar":
        return "scalar energy"
    bins = card["histogram"]
    target = bins.get("target", "hlgauss")
    kernel = f"sigma {bins['sigma']:g} bins" if target == "hlgauss" else f"{target} target"
    members = bins.get("num_members", 1)
    committee = f"committee of {members} heads: " if members > 1 else ""
    return (
        f"{committee}HL-Gauss energy, {bins['num_bins']} bins of "
        f"{1e3 * bins['bin_width']:.3g} meV around each atom's anchor, {kernel}, entropy floor "
        f"{bins['entropy_floor']:.3f} nat"
    )


def _recalibrated(calibration: dict[str, Any]) -> str:
    if "recalibrated" not in calibration:
        return ""
    later = calibration["recalibrated"]
    return f"; done anew on {later['data']}, {later['date']}"


def _promises(card: dict[str, Any]) -> str:
    if "conformal" not in card:
        return "none (force_bound and extrapolating need at least 4 validation frames)"
    found = card["conformal"]
    return (
        f"force_bound is {found['force_bound_over_force_std']:.2f} force_std, above "
        f"{found['coverage']:.0%} of the errors; extrapolating is a distance beyond "
        f"{found['extrapolating_beyond_distance']:.2f}, at most {1 - found['coverage']:.0%} of the "
        "atoms; both in frames like the validation frames only"
    ).replace("%", " %")


def _size(calibration: dict[str, Any]) -> str:
    if "size_ratio" not in calibration:  # without the default method
        return ""
    return f"; predicted/true force error {calibration['size_ratio']:.2f} (cross-validated)"


def _largest(calibration: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.3g}" for name, value in calibration["largest"].items())
    return (
        f"{values} (in {calibration['largest_coverage']:.0%} of frames like the validation frames "
        "no atom is above)"
    ).replace("%", " %")


def _ranking(ranking: dict[str, float]) -> str:
    ordered = sorted(ranking.items(), key=lambda item: -item[1])
    return (
        ", ".join(f"{name} {value:.2f}" for name, value in ordered)
        + " (Spearman, validation atoms)"
    )
