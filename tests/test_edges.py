"""The plugin hands a model the same edges as Python: before any number, its inputs are compared."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms as AseAtoms
from lammps_cases import ELEMENTS, MASSES, Atoms, cluster, crystal, read_dump, run_lammps
from torch import Tensor

from lmp_hl import keys
from lmp_hl.graph import graph_inputs

# of all edges of an atom: their number, and sums that tell sets of vectors and elements apart
PROBES = ["number", "length", "x", "y", "z", "element", "cubes"]
CUTOFFS = (4.0, 15.0)


def probe(vectors: Tensor, centers: Tensor, neighbor_species: Tensor, num_atoms: int) -> Tensor:
    """(num_atoms, len(PROBES)) sums over the edges of each atom."""
    length = vectors.pow(2).sum(1, keepdim=True).sqrt()
    element = (neighbor_species + 1).unsqueeze(1).to(vectors.dtype)
    weight = torch.tensor([1.0, 0.5, 0.25], dtype=vectors.dtype)
    cubes = (vectors.pow(3) * weight).sum(1, keepdim=True) * element
    terms = [torch.ones_like(length), length, vectors * element, element * length, cubes]
    sums = torch.cat(terms, 1)
    return vectors.new_zeros(num_atoms, sums.shape[1]).index_add(0, centers, sums)


class ProbeStages(torch.nn.Module):
    """A model without energy whose fields are what it sees."""

    def __init__(self):
        super().__init__()
        self.num_features, self.num_members, self.num_shared = 0, 1, 0

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.final(inputs, False)

    @torch.jit.export
    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        centers, neighbors = inputs[2][0], inputs[2][1]
        fields = probe(inputs[3], centers, inputs[1][neighbors], len(inputs[0]))
        out = [torch.zeros_like(fields[:, :1]), torch.zeros_like(inputs[3])]
        if with_fields:
            out += [fields, inputs[3][:, :0]]
        return out

    @torch.jit.export
    def finish(
        self, species: Tensor, energies: Tensor, carried: Tensor, sums: Tensor
    ) -> list[Tensor]:
        return carried.unbind(1)

    @torch.jit.export
    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        return inputs[3]

    @torch.jit.export
    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        return [inputs[3]]


class Probe(torch.nn.Module):
    """The contract of hl.pt around ProbeStages."""

    selftest_inputs: dict[str, Tensor]
    selftest_outputs: dict[str, Tensor]
    elements: list[str]
    masses: list[float]
    fields: list[str]
    field_units: list[str]

    def __init__(self, cutoff: float):
        super().__init__()
        self.stages = ProbeStages()
        self.format_version, self.num_layers = 4, 1
        self.elements, self.masses = ELEMENTS, MASSES
        self.cutoff, self.dtype, self.units, self.card = cutoff, "float64", "metal", "{}"
        self.fields, self.field_units = PROBES, ["1"] * len(PROBES)
        self.selftest_tolerance = 1e-9
        pair = AseAtoms("SiO", [[0, 0, 0], [0, 0, 2]])
        self.selftest_inputs = graph_inputs(pair, ELEMENTS, cutoff, 1, "float64")
        self.selftest_outputs = {keys.ENERGY: torch.zeros(2, dtype=torch.float64)}

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.stages.final(inputs, False)


SYSTEMS = {
    "bulk": crystal(51),
    "triclinic": crystal(52, triclinic=True, repeat=4),
    "small_cell": Atoms(
        [[0.1, 0.2, 0.3], [1.2, 0.9, 1.6], [2.2, 2.6, 0.9]],
        [0, 1, 1],
        [[2.9, 0, 0], [0.4, 3.1, 0], [-0.3, 0.5, 3.0]],
    ),
    "slab": Atoms(
        crystal(53).positions, crystal(53).species, crystal(53).cell, (True, True, False)
    ),
    "molecule": cluster(54),
}
CASES = [(name, 4.0, edges) for name in SYSTEMS for edges in ("host", "device")]
CASES += [(name, 15.0, "host") for name in ("bulk", "small_cell")]

RUN = """
clear
units metal
boundary {boundary}
box tilt large
neigh_modify one 10000 page 1000000  # 15 Å hold thousands of atoms
read_data {name}.data
pair_style mliap model probe{cutoff:g}.pt edges {edges}
pair_coeff * * Si O NULL
compute u all hlgauss/atom {fields}
thermo_style custom step pe
run 0
write_dump all custom {name}.{cutoff:g}.{edges} id c_u[*] modify format float %.17g
"""


@pytest.fixture(scope="module", params=[1, 3], ids=["1rank", "3ranks"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edges")
    for cutoff in CUTOFFS:
        torch.jit.save(torch.jit.script(Probe(cutoff)), str(path / f"probe{cutoff:g}.pt"))
    for name, atoms in SYSTEMS.items():
        atoms.write(path / f"{name}.data")
    script = "".join(
        RUN.format(
            boundary=" ".join("p" if p else "f" for p in SYSTEMS[name].periodic),
            name=name,
            cutoff=cutoff,
            edges=edges,
            fields=" ".join(PROBES),
        )
        for name, cutoff, edges in CASES
    )
    result = run_lammps(script, path, request.param)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    return path


@pytest.mark.parametrize(("name", "cutoff", "edges"), CASES)
def test_edges_in_lammps_are_those_of_python(folder, name, cutoff, edges):
    atoms = SYSTEMS[name]
    structure = AseAtoms(
        np.array(ELEMENTS)[atoms.species], atoms.positions, cell=atoms.cell, pbc=atoms.periodic
    )
    inputs = graph_inputs(structure, ELEMENTS, cutoff, 1, "float64")
    centers, neighbors = inputs[keys.EDGE_INDEX]
    species = inputs[keys.SPECIES]
    want = probe(inputs[keys.EDGE_VECTORS], centers, species[neighbors], len(species)).numpy()
    got = read_dump(folder / f"{name}.{cutoff:g}.{edges}")[:, 1:]
    np.testing.assert_array_equal(got[:, 0], want[:, 0])  # as many edges
    # sums of up to some thousand terms of up to cutoff³, in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * want.shape[0] * cutoff**3 * 100)
