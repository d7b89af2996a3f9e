"""An analytic potential with the contract of hl.pt, its brute-force reference, and LAMMPS runs.

It lets the plugin be tested without a network: the potential is a formula, and the reference sums
over periodic images in numpy.
"""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmp_hl import lammps as lmp_hl_lammps

CUTOFF = 4.0  # Å
ELEMENTS = ["Si", "O"]
MASSES = [28.085, 15.999]
FIELDS = ["entropy", "force_std"]
BAR_PER_EV_A3 = 1602176.6208  # LAMMPS's nktv2p of units metal, 1.6021765e6, is rounded


class AnalyticModel(torch.nn.Module):
    """Energies of neighbour sums; with two layers an atom also sees its neighbours' sums.

    rho_i = sum_j w_j c(r_ij), v_i = sum_j w_j c(r_ij) r_ij, c(r) = (1 - r²/r_c²)³;
    E_i = e0_i - a_i sqrt(1 + rho_i) + b |v_i|² + (two layers) d sum_j c(r_ij) tanh(rho_j).
    """

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

    def __init__(self, num_layers: int, dtype: str = "float64"):
        super().__init__()
        self.format_version = 4
        self.elements = ELEMENTS
        self.masses = MASSES
        self.cutoff = CUTOFF
        self.num_layers = num_layers
        self.dtype = dtype
        self.units = "metal"
        self.fields = FIELDS
        self.field_units = ["nat", "eV/Angstrom"]
        self.card = "{}"
        self.stages = AnalyticStages(num_layers, dtype)
        self.selftest_inputs = {}
        self.selftest_outputs = {}
        self.selftest_tolerance = 1e-6 if dtype == "float64" else 1e-4
        kind = getattr(torch, dtype)
        self.register_buffer("weight", torch.tensor([1.0, 0.6], dtype=kind))
        self.register_buffer("depth", torch.tensor([1.3, 0.9], dtype=kind))
        self.register_buffer("reference", torch.tensor([-2.0, -5.0], dtype=kind))

    def forward(
        self, inputs: dict[str, Tensor], with_fields: bool, keep_graph: bool
    ) -> dict[str, Tensor]:
        species = inputs["species"]
        center, neighbor = inputs["edge_index"][0], inputs["edge_index"][1]
        vectors = inputs["edge_vectors"].detach().requires_grad_(True)
        num_owned = int(inputs["layer_nodes"][-1])
        num_nodes = int(inputs["layer_nodes"][0])
        num_edges = int(inputs["layer_edges"][0])

        shape = (1 - (vectors * vectors).sum(1) / self.cutoff**2).clamp(min=0.0) ** 3
        scaled = (self.weight[species[neighbor]] * shape)[:num_edges]
        rho = vectors.new_zeros(num_nodes).index_add(0, center[:num_edges], scaled)
        moment = vectors.new_zeros(num_nodes, 3).index_add(
            0, center[:num_edges], scaled.unsqueeze(1) * vectors[:num_edges]
        )
        owned = species[:num_owned]
        energy = self.reference[owned] - self.depth[owned] * torch.sqrt(1 + rho[:num_owned])
        energy = energy + 0.02 * (moment[:num_owned] ** 2).sum(1)
        if self.num_layers == 2:
            own = int(inputs["layer_edges"][1])
            # a neighbour's sum exists only if the graph made that atom a node of the first layer
            message = shape[:own] * torch.tanh(rho[neighbor[:own]])
            energy = energy + 0.3 * vectors.new_zeros(num_owned).index_add(0, center[:own], message)

        gradient = torch.autograd.grad([energy.sum()], [vectors])[0]
        assert gradient is not None
        outputs = {"energy": energy.detach().to(torch.float64), "edge_gradients": gradient}
        if with_fields:
            outputs["entropy"] = torch.log(1 + rho[:num_owned]).detach()
            outputs["force_std"] = (moment[:num_owned] ** 2).sum(1).sqrt().detach()
        return outputs


class AnalyticStages(torch.nn.Module):
    """The same potential as the plugin evaluates it, stage by stage (lmp_hl/stages.py)."""

    refused: int  # number of centres for which it fails, to see what becomes of such a failure

    def __init__(self, num_layers: int, dtype: str):
        super().__init__()
        self.num_layers = num_layers
        self.num_features = 4  # rho and the moment
        self.num_members = 1
        self.cutoff = CUTOFF
        self.refused = -1
        self.num_shared = 0
        kind = getattr(torch, dtype)
        self.register_buffer("weight", torch.tensor([1.0, 0.6], dtype=kind))
        self.register_buffer("depth", torch.tensor([1.3, 0.9], dtype=kind))
        self.register_buffer("reference", torch.tensor([-2.0, -5.0], dtype=kind))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.final(inputs, False)

    @torch.jit.export
    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        center_species, species, edge_index, vectors = inputs[0], inputs[1], inputs[2], inputs[3]
        if len(center_species) == self.refused:
            raise ValueError("refused")
        scaled = self.weight[species[edge_index[1]]] * self.shape(vectors)
        sums = torch.cat([scaled.unsqueeze(1), scaled.unsqueeze(1) * vectors], 1)
        return vectors.new_zeros(len(center_species), 4).index_add(0, edge_index[0], sums)

    def shape(self, vectors: Tensor) -> Tensor:
        return (1 - (vectors * vectors).sum(1) / self.cutoff**2).clamp(min=0.0) ** 3

    @torch.jit.export
    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        vectors = inputs[3].detach().requires_grad_(True)
        features = self.layer(t, [inputs[0], inputs[1], inputs[2], vectors])
        gradient = torch.autograd.grad([(features * gradients).sum()], [vectors])[0]
        assert gradient is not None
        return [gradient]

    @torch.jit.export
    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        wanted: list[Tensor] = []
        if self.num_layers == 1:
            vectors = inputs[3].detach().requires_grad_(True)
            wanted = [vectors]
            centers = self.layer(0, [inputs[0], inputs[1], inputs[2], vectors])
        else:
            wanted = [x.detach().requires_grad_(True) for x in inputs[2:]]
            centers = wanted[1]
        rho, moment = centers[:, 0], centers[:, 1:]
        energy = self.reference[inputs[0]] - self.depth[inputs[0]] * torch.sqrt(1 + rho)
        energy = energy + 0.02 * (moment**2).sum(1)
        if self.num_layers == 2:
            message = self.shape(wanted[0]) * torch.tanh(wanted[2][inputs[1][1], 0])
            energy = energy + 0.3 * torch.zeros_like(energy).index_add(0, inputs[1][0], message)
        out = [energy.detach().to(torch.float64).unsqueeze(1)]
        for gradient in torch.autograd.grad([energy.sum()], wanted):
            assert gradient is not None
            out.append(gradient)
        if with_fields:
            out.append(torch.stack([torch.log(1 + rho), (moment**2).sum(1).sqrt()], 1).detach())
            out.append(out[1][:, :0])
        return out

    @torch.jit.export
    def finish(
        self, species: Tensor, energies: Tensor, carried: Tensor, sums: Tensor
    ) -> list[Tensor]:
        return carried.unbind(1)


def export(path: Path, num_layers: int, dtype: str = "float64", **changes: object) -> Path:
    """Write the analytic potential as a model file; `changes` replace attributes, to spoil it."""
    model = AnalyticModel(num_layers, dtype)
    atoms = Atoms([[0, 0, 0], [1.5, 0.2, 0], [0, 1.9, 1.1]], [0, 1, 0], np.eye(3) * 20, (0, 0, 0))
    model.selftest_inputs = graph(atoms, num_layers, getattr(torch, dtype))
    model.selftest_outputs = model(model.selftest_inputs, True, False)
    for name, value in changes.items():
        setattr(model.stages if name == "refused" else model, name, value)
    torch.jit.save(torch.jit.script(model), str(path))
    return path


@dataclass
class Atoms:
    """Positions (num_atoms, 3) in Å, species, lower-triangular cell rows, periodicity."""

    positions: np.ndarray
    species: np.ndarray
    cell: np.ndarray
    periodic: tuple[bool, bool, bool] = (True, True, True)
    types: np.ndarray = field(init=False)  # LAMMPS types, species + 1; a third type is NULL

    def __post_init__(self) -> None:
        self.positions = np.asarray(self.positions, float)
        self.species = np.asarray(self.species)
        self.cell = np.asarray(self.cell, float)
        self.types = self.species + 1

    def write(self, path: Path) -> None:
        """Write as a LAMMPS data file of three atom types."""
        c = self.cell.tolist()
        lines = ["test", "", f"{len(self.species)} atoms", "3 atom types", ""]
        lines += [f"0 {c[k][k]!r} {a}lo {a}hi" for k, a in enumerate("xyz")]
        if np.any(np.tril(self.cell, -1)):
            lines.append(f"{c[1][0]!r} {c[2][0]!r} {c[2][1]!r} xy xz yz")
        lines += ["", "Masses", "", f"1 {MASSES[0]}", f"2 {MASSES[1]}", "3 40.0"]
        lines += ["", "Atoms # atomic", ""]
        for k, (kind, x) in enumerate(zip(self.types, self.positions.tolist(), strict=True)):
            lines.append(f"{k + 1} {kind} {x[0]!r} {x[1]!r} {x[2]!r}")
        path.write_text("\n".join(lines) + "\n")


def edges(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres, neighbours and vectors of all pairs within the cutoff, over periodic images."""
    inverse = np.linalg.inv(atoms.cell)
    heights = 1 / np.linalg.norm(inverse, axis=0)  # distances between opposite faces
    spans = np.ptp(atoms.positions @ inverse, axis=0)  # atoms may lie outside the cell
    reach = [
        int(np.ceil(CUTOFF / h + s)) if p else 0
        for h, s, p in zip(heights, spans, atoms.periodic, strict=True)
    ]
    centers, neighbors, vectors = [], [], []
    for shift in np.ndindex(*(2 * n + 1 for n in reach)):
        offset = (np.array(shift) - reach) @ atoms.cell
        delta = atoms.positions[None] + offset - atoms.positions[:, None]  # (i, j, 3), r_j - r_i
        close = (delta**2).sum(2) < CUTOFF**2
        if not np.any(offset):
            np.fill_diagonal(close, False)
        close &= (atoms.types[:, None] < 3) & (atoms.types[None] < 3)
        i, j = np.nonzero(close)
        centers.append(i)
        neighbors.append(j)
        vectors.append(delta[i, j])
    return np.concatenate(centers), np.concatenate(neighbors), np.concatenate(vectors)


def graph(atoms: Atoms, num_layers: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model inputs of a structure evaluated as a whole."""
    i, j, vectors = edges(atoms)
    return {
        "species": torch.tensor(atoms.species),
        "edge_index": torch.tensor(np.stack([i, j])),
        "edge_vectors": torch.tensor(vectors, dtype=dtype).reshape(-1, 3),
        "layer_nodes": torch.full((num_layers,), len(atoms.species)),
        "layer_edges": torch.full((num_layers,), len(i)),
    }


def reference(atoms: Atoms, num_layers: int) -> dict[str, np.ndarray]:
    """Energies, forces, LAMMPS per-atom virials (xx yy zz xy xz yz, eV) and fields in numpy."""
    inputs = graph(atoms, num_layers, torch.float64)
    outputs = AnalyticModel(num_layers)(inputs, True, False)
    i, j = (inputs["edge_index"][k].numpy() for k in (0, 1))
    r, g = inputs["edge_vectors"].numpy(), outputs["edge_gradients"].numpy()
    seen = atoms.types < 3
    forces = np.zeros((len(atoms.species), 3))
    np.add.at(forces, i, g)
    np.add.at(forces, j, -g)
    outer = -0.5 * (r[:, :, None] * g[:, None] + g[:, :, None] * r[:, None])
    voigt = outer[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    virials = np.zeros((len(atoms.species), 6))
    np.add.at(virials, i, 0.5 * voigt)
    np.add.at(virials, j, 0.5 * voigt)
    result = {"energies": outputs["energy"].numpy() * seen, "forces": forces, "virials": virials}
    return result | {name: outputs[name].numpy() * seen for name in FIELDS}


def crystal(seed: int, triclinic: bool = False, repeat: int = 3) -> Atoms:
    """A rattled two-species cubic or sheared lattice of repeat³ atoms, 2.3 Å apart."""
    rng = np.random.default_rng(seed)
    cell = 2.3 * repeat * np.eye(3)
    if triclinic:
        cell[1, 0], cell[2, 0], cell[2, 1] = 1.7, -0.9, 1.2
    sites = np.stack(np.meshgrid(*[np.arange(repeat)] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = (sites + 0.3) / repeat @ cell + rng.normal(0, 0.15, (len(sites), 3))
    return Atoms(positions, rng.integers(0, 2, len(sites)), cell)


def cluster(seed: int) -> Atoms:
    """Twelve atoms in one half of a wide box without periodicity, and one atom alone."""
    rng = np.random.default_rng(seed)
    sites = np.stack(np.meshgrid([0, 1, 2], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)
    positions = sites * 2.2 + 4.0 + rng.normal(0, 0.1, (12, 3))
    positions = np.concatenate([positions, [[4.0, 25.0, 25.0]]])
    return Atoms(positions, rng.integers(0, 2, 13), 30 * np.eye(3), (False, False, False))


def run_lammps(script: str, folder: Path, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run an input script on MPI ranks in its own process; the output is returned, not checked."""
    (folder / f"in.{num_ranks}").write_text(script)
    command = lmp_hl_lammps.command(num_ranks, "-in", f"in.{num_ranks}", "-log", "none")
    # against a hang only: four ranks that share two cores with a compiler take minutes
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)


def read_dump(path: Path) -> np.ndarray:
    """Rows of the last frame of a `dump custom` file, sorted by the first column, the atom ID."""
    text = path.read_text().split("ITEM: ATOMS")[-1].splitlines()[1:]
    rows = np.array([[float(word) for word in line.split()] for line in text])
    return rows[np.argsort(rows[:, 0])]
