"""Potential -> `hl.pt`: one scripted, self-describing, self-testing file."""

import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers, covalent_radii
from torch import Tensor, nn

from . import __version__, keys
from .ensemble import Ensemble
from .graph import graph_inputs
from .model_file import FORMAT_VERSION, load
from .nn.heads import HistogramEnergy
from .potential import Potential
from .stages import Stages

# largest deviation of the self-test: rounding on other hardware, not another model
TOLERANCE = {"float32": 2e-4, "float64": 1e-9}


class ExportedPotential(nn.Module):
    """An Ensemble with everything its file must say, as attributes that C++ can read."""

    format_version: int
    elements: list[str]
    masses: list[float]
    cutoff: float
    num_layers: int
    dtype: str
    units: str
    fields: list[str]
    field_units: list[str]
    card: str
    selftest_inputs: dict[str, Tensor]
    selftest_outputs: dict[str, Tensor]
    selftest_tolerance: float

    def __init__(self, ensemble: Ensemble, elements: Sequence[str], card: dict[str, Any]) -> None:
        super().__init__()
        first = ensemble.potentials()[0]
        self.format_version = FORMAT_VERSION
        self.elements = list(elements)
        self.masses = [float(atomic_masses[atomic_numbers[element]]) for element in elements]
        self.cutoff = float(first.backbone.radial.cutoff)
        self.stages = Stages(ensemble)
        self.num_layers = self.stages.num_layers
        dtype = next(first.parameters()).dtype
        self.dtype = str(dtype).removeprefix("torch.")
        self.units = "metal"
        self.fields = self.stages.fields
        self.field_units = [keys.FIELD_UNITS[field] for field in self.fields]
        self.selftest_tolerance = TOLERANCE[self.dtype]
        self.card = json.dumps(card, indent=1)
        self.selftest_inputs = graph_inputs(
            self_test_structure(elements), elements, self.cutoff, self.num_layers, self.dtype
        )
        outputs = ensemble(dict(self.selftest_inputs), True, False)
        told = (keys.EDGE_GRADIENTS, *self.fields)
        self.selftest_outputs = {name: outputs[name].detach() for name in told}

    def forward(
        self, inputs: dict[str, Tensor], with_fields: bool, keep_graph: bool
    ) -> dict[str, Tensor]:
        """Inputs of keys.py -> outputs of keys.py, see Ensemble.forward."""
        return self.stages.ensemble(inputs, with_fields, keep_graph)


def self_test_structure(elements: Sequence[str]) -> Atoms:
    """A small irregular cluster that holds every element twice, at about bond lengths."""
    generator = torch.Generator().manual_seed(7)
    symbols = [element for element in elements for _ in range(2)]
    radius = max(float(covalent_radii[atomic_numbers[element]]) for element in elements)
    side = max(2, round(len(symbols) ** (1 / 3) + 0.5))
    grid = torch.cartesian_prod(*[torch.arange(float(side))] * 3)[: len(symbols)]
    noise = torch.rand(grid.shape, generator=generator) - 0.5
    positions = (2.2 * radius) * (grid + 0.3 * noise)
    return Atoms(symbols, positions=positions.double().numpy())


def export_potential(
    potential: Potential | Ensemble, elements: Sequence[str], card: dict[str, Any], path: str | Path
) -> Path:
    """Script a potential, write it, and read it back.

    Args:
        potential: trained and calibrated; or several.
        elements: chemical symbols in the order of its species indices.
        card: what the file should say about its origin; histogram and version are added.
        path: of the file to write; replaced only when everything went well.

    Returns:
        The path.
    """
    content = to_bytes(make_exported(potential, elements, card))
    return replace_file(Path(path), content, check=load)


def make_exported(
    potential: Potential | Ensemble, elements: Sequence[str], card: dict[str, Any]
) -> ExportedPotential:
    """The module a model file holds; arguments of export_potential."""
    ensemble = potential if isinstance(potential, Ensemble) else Ensemble([potential])
    ensemble = ensemble.eval().requires_grad_(False)
    potential = ensemble.potentials()[0]
    head, *others = potential.energy_head.parts()
    card = {**card, "lmp_hl": __version__, "optional_inputs": []}
    if isinstance(head, HistogramEnergy):
        card["histogram"] = {
            "num_bins": head.num_bins,
            "bin_width": float(head.bin_width),
            "sigma": head.sigma_in_bins,
            "target": head.target,
            "entropy_floor": head.entropy_floor(),
            "bins": "uniform, centred on the atom's anchor energy",
            "num_members": 1 + len(others),
        }
    for method in potential.uncertainty_methods():
        card.update(method.card())
    return ExportedPotential(ensemble, elements, card).eval()


def to_bytes(exported: ExportedPotential) -> bytes:
    """Content of an `hl.pt`."""
    # torch aborts the whole process when a disk is full, so it writes into memory
    buffer = io.BytesIO()
    scripted = torch.jit.script(exported)
    torch.jit.save(scripted, buffer, _extra_files={"card.json": exported.card})
    return buffer.getvalue()


def replace_file(
    path: Path, content: bytes, check: Callable[[Path], object] = lambda temporary: None
) -> Path:
    """Write a file whole or not at all.

    Args:
        path: of the file; missing folders are made.
        content: what to write.
        check: gets the path of the finished temporary file beside it, and raises if it is wrong.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
            temporary = Path(file.name)
        try:
            temporary.write_bytes(content)
            temporary.chmod(0o666 & ~_umask())  # a temporary file is its owner's alone
            check(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; make room or choose another place"
        ) from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
