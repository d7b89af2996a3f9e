"""ASE calculator on an exported model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from . import keys
from .graph import graph_inputs
from .model_file import load
from .potential import edge_forces


class HLCalculator(Calculator):
    """Energy, forces, stress and the model's per-atom fields, from the same pass.

    Args:
        path: `hl.pt`.
        device: torch device.

    The fields (entropy, force_std, distance, ...) stand in `atoms.calc.results` as (num_atoms,)
    arrays in the units of `model.field_units`; `energies` are per-atom energies. Of an ensemble,
    `members` are those of each member, (num_atoms, num_members): the total energy is known to about
    `results["members"].sum(0).std(ddof=1)`.

    Raises:
        ValueError: the model cannot be opened (see model_file.load), or an atom's element is
            unknown to it.
    """

    implemented_properties: ClassVar[list[str]] = [  # type: ignore[misc]  # each model adds fields
        "energy",
        "free_energy",
        "energies",
        "forces",
        "stress",
    ]

    def __init__(self, path: str | Path, device: str = "cpu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = load(path, device)
        fields = [name for name in self.model.fields if name != keys.ENERGY]
        self.implemented_properties = [  # type: ignore[misc]  # ASE: per instance
            *type(self).implemented_properties,
            *fields,
        ]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Evaluate the model on the whole structure."""
        super().calculate(atoms, properties, system_changes)
        model = self.model
        inputs = graph_inputs(
            self.atoms, model.elements, model.cutoff, model.num_layers, model.dtype
        )
        outputs = model.evaluate(inputs, with_fields=True)
        gradients = outputs[keys.EDGE_GRADIENTS].double()
        vectors = inputs[keys.EDGE_VECTORS].double()
        energies = outputs[keys.ENERGY].numpy()
        forces = edge_forces(inputs[keys.EDGE_INDEX], gradients, len(energies))
        self.results = {
            "energy": float(energies.sum()),
            "free_energy": float(energies.sum()),
            "energies": energies,
            "forces": forces.numpy(),
        }
        if self.atoms.pbc.all():
            virial = (vectors.T @ gradients).numpy()
            stress = 0.5 * (virial + virial.T) / self.atoms.get_volume()
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
        for field in self.model.fields:
            if field != keys.ENERGY:
                self.results[field] = np.asarray(outputs[field].double())
        if keys.MEMBERS in outputs:
            self.results[keys.MEMBERS] = outputs[keys.MEMBERS].numpy()
