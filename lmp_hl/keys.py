"""Every tensor that crosses the boundary of a model: its key, shape, dtype and unit.

Nodes are the atoms a model sees: first the `num_owned` atoms whose energy is wanted, then (message
passing only) neighbours by the number of hops from an owned atom, then atoms that are only ever
neighbours. Edges point from a centre i to a neighbour j with |r_j - r_i| < cutoff and are sorted so
that layer t of the network needs exactly the first `layer_edges[t]` edges and computes the first
`layer_nodes[t]` nodes. In a periodic or isolated structure evaluated as a whole every entry equals
num_nodes or num_edges.
"""

from typing import Final

# inputs -----------------------------------------------------------------------------------------
SPECIES: Final = "species"  # (num_nodes,) int64, index into the model's list of elements
EDGE_INDEX: Final = "edge_index"  # (2, num_edges) int64, row 0 the centre i, row 1 the neighbour j
EDGE_VECTORS: Final = "edge_vectors"  # (num_edges, 3) model dtype, Å, r_j - r_i
LAYER_NODES: Final = "layer_nodes"  # (num_layers,) int64, on the CPU; the last entry is num_owned
LAYER_EDGES: Final = "layer_edges"  # (num_layers,) int64, on the CPU

# optional inputs: reserved names; a model's card lists those it takes in "optional_inputs"
TOTAL_CHARGE: Final = "total_charge"  # (num_graphs,) model dtype, e
TOTAL_SPIN: Final = "total_spin"  # (num_graphs,) model dtype, 2S
DATASET_LABEL: Final = "dataset_label"  # (num_graphs,) int64

# outputs ----------------------------------------------------------------------------------------
ENERGY: Final = "energy"  # (num_owned,) float64, eV, per-atom energy with the element's reference
EDGE_GRADIENTS: Final = "edge_gradients"  # (num_edges, 3) model dtype, eV/Å, dE/d(edge_vectors)

# per-atom uncertainty fields, present in the output when asked for
ENTROPY: Final = (
    "entropy"  # (num_owned,) model dtype, nats, Shannon entropy of the energy histogram
)
EXCESS_ENTROPY: Final = "excess_entropy"  # (num_owned,) nats, entropy above the kernel's own floor
FORCE_ENTROPY: Final = (
    "force_entropy"  # (num_owned,) nats, entropy of the calibrated force histogram
)
FORCE_STD: Final = "force_std"  # (num_owned,) eV/Å, calibrated error of one force component
FORCE_BOUND: Final = (
    "force_bound"  # (num_owned,) eV/Å, above the error sqrt(|dF|^2/3) with the coverage in the card
)
DISTANCE: Final = "distance"  # (num_owned,) dimensionless, feature distance / validation median
EXTRAPOLATING: Final = (
    "extrapolating"  # (num_owned,) 1 where the distance is beyond the threshold in the card, else 0
)
ENSEMBLE_FORCE_STD: Final = (
    "ensemble_force_std"  # (num_owned,) float64, eV/Å, calibrated disagreement of a force component
)
ENSEMBLE_ENERGY_STD: Final = (
    "ensemble_energy_std"  # (num_owned,) float64, eV, disagreement of the per-atom energies
)

# of an ensemble only: coherent samples of the whole potential, each with the elements' references
MEMBERS: Final = "members"  # (num_owned, num_members) float64, eV, per-atom energies of the members
MEAN_VARIANCE_FORCE_STD: Final = "mean_variance_force_std"  # (num_owned,) eV/Å, one component
MEAN_VARIANCE_ENERGY_STD: Final = (
    "mean_variance_energy_std"  # (num_owned,) eV; squares add up to the variance of the total
)
EVIDENTIAL_FORCE_STD: Final = "evidential_force_std"  # (num_owned,) eV/Å, both parts together
EVIDENTIAL_ALEATORIC_STD: Final = "evidential_aleatoric_std"  # (num_owned,) eV/Å
EVIDENTIAL_EPISTEMIC_STD: Final = "evidential_epistemic_std"  # (num_owned,) eV/Å
COMMITTEE_ENTROPY: Final = "committee_entropy"  # (num_owned,) nats, of the mean of the heads
ALEATORIC_ENTROPY: Final = "aleatoric_entropy"  # (num_owned,) nats, mean of the heads' entropies
MUTUAL_INFORMATION: Final = "mutual_information"  # (num_owned,) nats, the difference of the two
COMMITTEE_ENERGY_STD: Final = "committee_energy_std"  # (num_owned,) eV, over the heads
LATENT_NLL: Final = "latent_nll"  # (num_owned,) nats, -log density of features - validation median
DENSITY_FORCE_STD: Final = "density_force_std"  # (num_owned,) eV/Å, from latent_nll
EXTRAPOLATION_GRADE: Final = "extrapolation_grade"  # (num_owned,) D-optimality grade, 1 at the edge
LLPR_ENERGY_STD: Final = "llpr_energy_std"  # (num_owned,) eV, error of the atom's energy
LLPR_FORCE_STD: Final = "llpr_force_std"  # (num_owned,) eV/Å, from the rigidity of the last layer
SPHERICAL_FORCE_STD: Final = "spherical_force_std"  # (num_owned,) eV/Å, logits on the sphere
SPHERICAL_FORCE_ENTROPY: Final = (
    "spherical_force_entropy"  # (num_owned,) nats, of one component's density per eV/Å
)
XYZ_FORCE_STD: Final = "xyz_force_std"  # (num_owned,) eV/Å, heads on the axes, NOT invariant
XYZ_FORCE_ENTROPY: Final = "xyz_force_entropy"  # (num_owned,) nats, per eV/Å, NOT invariant

# before the name of an energy field: that of the structure as a whole, (), eV, in Python only
OF_FRAME: Final = "frame_"
# fields whose squares, summed over the atoms, are the variance of the total energy
ADDITIVE: Final = (MEAN_VARIANCE_ENERGY_STD,)

FIELD_UNITS: Final = {
    ENERGY: "eV",
    ENTROPY: "nat",
    EXCESS_ENTROPY: "nat",
    FORCE_ENTROPY: "nat",
    FORCE_STD: "eV/Angstrom",
    FORCE_BOUND: "eV/Angstrom",
    DISTANCE: "1",
    EXTRAPOLATING: "1",
    ENSEMBLE_FORCE_STD: "eV/Angstrom",
    ENSEMBLE_ENERGY_STD: "eV",
    MEAN_VARIANCE_FORCE_STD: "eV/Angstrom",
    MEAN_VARIANCE_ENERGY_STD: "eV",
    EVIDENTIAL_FORCE_STD: "eV/Angstrom",
    EVIDENTIAL_ALEATORIC_STD: "eV/Angstrom",
    EVIDENTIAL_EPISTEMIC_STD: "eV/Angstrom",
    COMMITTEE_ENTROPY: "nat",
    ALEATORIC_ENTROPY: "nat",
    MUTUAL_INFORMATION: "nat",
    COMMITTEE_ENERGY_STD: "eV",
    LATENT_NLL: "nat",
    DENSITY_FORCE_STD: "eV/Angstrom",
    EXTRAPOLATION_GRADE: "1",
    LLPR_ENERGY_STD: "eV",
    LLPR_FORCE_STD: "eV/Angstrom",
    SPHERICAL_FORCE_STD: "eV/Angstrom",
    SPHERICAL_FORCE_ENTROPY: "nat",
    XYZ_FORCE_STD: "eV/Angstrom",
    XYZ_FORCE_ENTROPY: "nat",
}
