"""Runs in a peer's own environment: predictions on frames, time per step, number of parameters.

    python front_inside.py predict mace FILE frames.xyz predictions.npz
    python front_inside.py time allegro FILE crystal.xyz SECONDS
    python front_inside.py count deepmd FILE

Timed is the call of the model with a graph that is made once: neighbour list and integration,
which LAMMPS also does, are not counted.
"""

import json
import sys
import time

import numpy as np
import torch

WARM_CALLS = 3
LEAST_CALLS = 3


class Mace:
    """MACE's ASE calculator, from its pickled or its scripted model."""

    def __init__(self, path):
        from mace.calculators import MACECalculator

        self.calculator = MACECalculator(model_paths=path, device="cpu", default_dtype="float32")

    def step(self, atoms):
        """A function that evaluates energy and forces of one graph."""
        model = self.calculator.models[0]
        graph = self.calculator._atoms_to_batch(atoms)
        for key in graph.keys:
            if torch.is_tensor(graph[key]) and graph[key].is_floating_point():
                graph[key] = graph[key].float()
        graph = graph.to_dict()
        return lambda: model(dict(graph), compute_stress=False)

    def num_parameters(self):
        """Trained ones."""
        return sum(p.numel() for p in self.calculator.models[0].parameters())


class Allegro:
    """NequIP's ASE calculator, from a compiled model."""

    def __init__(self, path):
        from nequip.integrations.ase import NequIPCalculator

        self.calculator = NequIPCalculator.from_compiled_model(path, device="cpu")

    def step(self, atoms):
        """A function that evaluates energy, forces and stress of one graph."""
        graph = self.calculator.atoms_to_data(atoms)
        return lambda: self.calculator.call_model(dict(graph))


def predict(model, frames, target):
    """Energy, forces and stress (ASE's sign) of every frame, the atoms in one long array."""
    energies, forces, stresses = [], [], []
    for atoms in frames:
        atoms.calc = model.calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
        stresses.append(atoms.get_stress(voigt=False))
    np.savez(target, energy=energies, forces=np.concatenate(forces), stress=stresses)


def measure(model, atoms, seconds):
    """µs of processor time per atom and step."""
    step = model.step(atoms)
    for _ in range(WARM_CALLS):
        step()
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while calls < LEAST_CALLS or time.perf_counter() - start < seconds:
        step()
        calls += 1
    return 1e6 * (time.process_time() - cpu) / calls / len(atoms)


def count(maker, path):
    """Number of trained parameters in a file that a training wrote."""
    if maker == "mace":
        return Mace(path).num_parameters()
    if maker == "lmp-hl":
        return count_ours(path)
    if maker == "deepmd":
        import deepmd.pt  # noqa: F401  its operators

        model = torch.jit.load(path, map_location="cpu")
        return sum(p.numel() for p in model.parameters())
    from nequip.model.saved_models.load_utils import load_saved_model
    from nequip.utils.global_state import set_global_state

    set_global_state(allow_tf32=False)
    return sum(p.numel() for p in load_saved_model(path).parameters())


def count_ours(path):
    """The same of a checkpoint of lmp-hl, whose fitted uncertainty is not counted."""
    from lmp_hl.training.checkpoint import load_checkpoint

    potential, _, _ = load_checkpoint(path)
    methods = [method for method in potential.uncertainty_methods() if not method.trained]
    fitted = {id(p) for method in methods for p in method.parameters()}
    return sum(p.numel() for p in potential.parameters() if id(p) not in fitted)


def main():
    """Read the command line."""
    torch.set_num_threads(1)
    task, maker, path, *rest = sys.argv[1:]
    if task == "count":
        print(json.dumps(count(maker, path)))
        return
    from ase.io import read  # of DeePMD-kit, which only counts here, it is no dependency

    model, frames = {"mace": Mace, "allegro": Allegro}[maker](path), read(rest[0], ":")
    if task == "predict":
        predict(model, frames, rest[1])
    else:
        print(json.dumps(measure(model, frames[0], float(rest[1]))))


if __name__ == "__main__":
    main()
