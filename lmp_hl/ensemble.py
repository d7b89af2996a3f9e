"""Several potentials as one: the mean of their energies, and how much they disagree.

A deep ensemble (Lakshminarayanan et al., arXiv 1612.01474) of whole potentials, trained from
different seeds. One potential is an ensemble of one: what is exported is always an Ensemble.
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import keys
from .potential import Potential, edge_forces
from .uncertainty.committee import CommitteeEnergy


class Ensemble(nn.Module):
    """E = mean over K members of their energies; forces and virials likewise.

    Every field that all members have is the mean of theirs: it speaks of the error of one member
    (entropies are those expected of a member; histograms stand around anchors of their own and are
    not mixed). With K >= 2 there are two more, both standard deviations over the members with K - 1
    in the denominator, so that they do not depend on K on average:

        ensemble_force_std = c sqrt(sum_k |F_k - mean F|^2 / (3 (K - 1))), of one force component;
        ensemble_energy_std = sqrt(sum_k (e_k - mean e)^2 / (K - 1)), e_k the atom's energy in
            member k less the member's mean for that element, because how a total energy is shared
            among atoms is a gauge that each member chooses anew.

    c is 1, or the ratio of the RMS force error to the RMS standard deviation on held-out frames.

    Args:
        members: trained potentials for the same elements; weights and heads may be of any size.

    Raises:
        ValueError: no members, or two that differ in number of elements, cutoff, layers or dtype,
            or do not differ at all.
    """

    if TYPE_CHECKING:
        members: Any  # a ModuleList; TorchScript knows the class of each member, mypy does not
    energy_means: Tensor
    force_factor: Tensor

    def __init__(self, members: Sequence[Potential]) -> None:
        super().__init__()
        _check_alike(members)
        self.members = nn.ModuleList(members)
        self.num_members = len(members)
        # without frames at hand, the energy of an atom that the backbone adds nothing to
        means = torch.stack([member.reference_energies for member in members])
        self.register_buffer("energy_means", means)  # (num_members, num_elements) float64, eV
        self.register_buffer("force_factor", torch.ones((), dtype=torch.float64))

    @torch.jit.unused
    def potentials(self) -> list[Potential]:
        """The members."""
        return list(self.members)

    @torch.jit.unused
    def field_names(self) -> list[str]:
        """Names of what `fields` returns."""
        first, *others = [potential.field_names() for potential in self.potentials()]
        common = [name for name in first if all(name in names for names in others)]
        own = [keys.ENSEMBLE_ENERGY_STD, keys.ENSEMBLE_FORCE_STD]
        return common + (own if self.num_members > 1 else [])

    def fields(
        self, of_members: list[dict[str, Tensor]], energies: Tensor, forces: Tensor, species: Tensor
    ) -> dict[str, Tensor]:
        """Per-atom fields from those of the members.

        Args:
            of_members: what Potential.fields returned.
            energies: (num_atoms, num_members), eV.
            forces: (num_atoms, 3 * num_members), eV/Å, of all edges that end at the atom, also of
                those that another process evaluates; not looked at for a single member.
            species: (num_atoms,).
        """
        out: dict[str, Tensor] = {}
        for name in of_members[0]:
            values: list[Tensor] = []
            for of_one in of_members:
                if name in of_one:
                    values.append(of_one[name])
            if len(values) == self.num_members:
                out[name] = torch.stack(values).mean(0)
        if self.num_members > 1:
            e = energies - self.energy_means.index_select(1, species).t()
            out[keys.ENSEMBLE_ENERGY_STD] = _std(e.unsqueeze(2))
            f = forces.reshape(forces.shape[0], self.num_members, 3)
            out[keys.ENSEMBLE_FORCE_STD] = self.force_factor * _std(f)
        return out

    def forward(
        self, inputs: dict[str, Tensor], with_fields: bool = False, keep_graph: bool = False
    ) -> dict[str, Tensor]:
        """As Potential.forward, of a structure whose atoms are all owned, and `members`."""
        found: list[dict[str, Tensor]] = []
        for member in self.members:
            found.append(member(inputs, with_fields, keep_graph))
        energies = torch.stack([of_one.pop(keys.ENERGY) for of_one in found], 1)
        gradients = torch.cat([of_one.pop(keys.EDGE_GRADIENTS) for of_one in found], 1)
        out = combine(energies, gradients)
        if with_fields:
            num_owned, num_nodes = energies.shape[0], inputs[keys.SPECIES].shape[0]
            forces = edge_forces(inputs[keys.EDGE_INDEX], gradients.double(), num_nodes)
            species = inputs[keys.SPECIES][:num_owned]
            out.update(self.fields(found, energies, forces[:num_owned], species))
        return out


def split_committee(potential: Potential) -> list[Potential]:
    """The heads of a committee as potentials on the same backbone, for their force disagreement.

    The committee itself has the forces of its mean energy only, because the force of each head
    takes a backward pass of its own. As members of an Ensemble they give that mean, to rounding,
    with ensemble_force_std beside it, at the price of as many whole potentials: nothing of the
    backbone is evaluated together. What uncertainty methods were fitted to, the errors of the mean,
    is still true of the ensemble's fields.

    Args:
        potential: with head "committee" or "svd_committee".

    Returns:
        As many potentials with head "hlgauss" as it has members; they share the backbone module.

    Raises:
        ValueError: it has another head.
    """
    committee = potential.energy_head
    if not isinstance(committee, CommitteeEnergy):
        raise ValueError(
            "only a committee of heads can be split (model.head: committee or svd_committee), got "
            f"{type(committee).__name__}"
        )
    out = []
    for head in committee.split():
        kept = {id(potential.backbone): potential.backbone, id(committee): head}
        out.append(copy.deepcopy(potential, kept))
    return out


def combine(energies: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """What an ensemble says of a structure, but for fields.

    Args:
        energies: (num_owned, num_members), eV.
        gradients: (num_edges, 3 * num_members), eV/Å, of the members' energies.

    Returns:
        energy, edge_gradients and, of several members, members (keys.py).
    """
    num_members = energies.shape[1]
    out = {
        keys.ENERGY: energies.mean(1),
        keys.EDGE_GRADIENTS: gradients.reshape(gradients.shape[0], num_members, 3).mean(1),
    }
    if num_members > 1:
        out[keys.MEMBERS] = energies
    return out


def _std(x: Tensor) -> Tensor:
    """(n, K, d) -> (n,): unbiased over K members, root mean square over d components."""
    # a norm has a gradient also where nothing differs, as for an isolated atom
    spread = torch.linalg.vector_norm((x - x.mean(1, keepdim=True)).flatten(1), dim=1)
    return spread / math.sqrt((x.shape[1] - 1) * x.shape[2])


def _check_alike(members: Sequence[Potential]) -> None:
    if not members:
        raise ValueError("wanted at least one potential, got none")
    traits: dict[str, list[Any]] = {
        "number of elements": [len(member.reference_energies) for member in members],
        "cutoff": [f"{float(member.backbone.radial.cutoff):g} Å" for member in members],
        "number of layers": [1 + len(member.backbone.message_layers) for member in members],
        "dtype": [str(next(member.parameters()).dtype)[len("torch.") :] for member in members],
    }
    for name, values in traits.items():
        if len(set(values)) > 1:
            raise ValueError(
                f"members of an ensemble must have the same {name}, got "
                f"{', '.join(str(value) for value in values)} (in the order given)"
            )
    for k, member in enumerate(members):
        for other in members[:k]:
            pairs = zip(member.parameters(), other.parameters(), strict=False)
            if all(torch.equal(a, b) for a, b in pairs):
                raise ValueError(
                    f"members {members.index(other) + 1} and {k + 1} of the ensemble are the same "
                    f"potential and never disagree; train them with different seeds"
                )
