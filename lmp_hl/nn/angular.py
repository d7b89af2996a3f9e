"""Angular functions: real spherical harmonics and products of them with e3nn's coefficients.

Tensors of degree l = 0..l_max are stored component first, ((l_max + 1)^2, num_atoms, channels), the
2l + 1 components of degree l at rows l^2 .. (l + 1)^2 - 1, in e3nn's real basis (l = 1 is x, y, z).
Only true tensors occur: a product l1 x l2 -> l3 is kept when l1 + l2 + l3 is even, so parity is
(-1)^l throughout.
"""

import math

import torch
from e3nn import o3
from torch import Tensor, nn


class RaiseDegree(nn.Module):
    """Y_l from Y_{l-1} and the unit vector: their product's part of degree l, scaled to 2l + 1."""

    coefficients: Tensor

    def __init__(self, degree: int, previous: Tensor, direction: Tensor) -> None:
        super().__init__()
        cg = o3.wigner_3j(degree - 1, 1, degree, dtype=torch.float64).reshape(-1, 2 * degree + 1)
        norm = (torch.outer(previous, direction).flatten() @ cg).norm()
        cg = cg * math.sqrt(2 * degree + 1) / norm
        self.register_buffer("coefficients", cg.to(torch.get_default_dtype()))

    def forward(self, lower: Tensor, unit_vectors: Tensor) -> Tensor:
        """(num_edges, 2l - 1) and (num_edges, 3) -> (num_edges, 2l + 1)."""
        product = (lower.unsqueeze(2) * unit_vectors.unsqueeze(1)).flatten(1)
        return product @ self.coefficients.to(product.dtype)


class SphericalHarmonics(nn.Module):
    """Real spherical harmonics of unit vectors, |Y_l|^2 = 2l + 1, built up by products with Y_1."""

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.higher = nn.ModuleList()
        direction = torch.tensor(
            [0.0, 0.6, 0.8], dtype=torch.float64
        )  # any unit vector gives the norm
        previous = math.sqrt(3.0) * direction
        for degree in range(2, l_max + 1):
            self.higher.append(RaiseDegree(degree, previous, direction))
            previous = self(direction.unsqueeze(0))[0, degree * degree :]

    def forward(self, unit_vectors: Tensor) -> Tensor:
        """(num_edges, 3) unit vectors -> (num_edges, (l_max + 1)^2)."""
        top = math.sqrt(3.0) * unit_vectors
        out = [torch.ones_like(unit_vectors[:, :1]), top]
        for step in self.higher:
            top = step(top, unit_vectors)
            out.append(top)
        return torch.cat(out, dim=1)


class SymmetricSquare(nn.Module):
    """All even products A_l1 x A_l2 -> B_l3 (l1 <= l2) of a tensor with itself, channel by channel.

    One gather of the needed component pairs and one matrix product with the coefficients; l3 goes
    up to l_out, `paths[l3]` says how many copies of degree l3 come out. After `unroll` only what is
    not zero is multiplied, one by one: an interpreter is slow at that, a compiler fuses it.
    """

    first: Tensor
    second: Tensor
    coefficients: Tensor

    def __init__(self, l_max: int, l_out: int) -> None:
        super().__init__()
        self.unrolled = False
        rows: list[dict[tuple[int, int], float]] = []
        self.paths: list[int] = []
        for l3 in range(l_out + 1):
            pairs = [
                (l1, l2)
                for l1 in range(l_max + 1)
                for l2 in range(l1, l_max + 1)
                if l2 - l1 <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0
            ]
            self.paths.append(len(pairs))
            for l1, l2 in pairs:
                cg = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1)
                for m3 in range(2 * l3 + 1):
                    row: dict[tuple[int, int], float] = {}
                    for m1, m2 in cg[:, :, m3].abs().gt(1e-10).nonzero().tolist():
                        a, b = sorted((l1 * l1 + m1, l2 * l2 + m2))
                        row[(a, b)] = row.get((a, b), 0.0) + float(cg[m1, m2, m3])
                    rows.append(row)
        self.sizes = [num_paths * (2 * degree + 1) for degree, num_paths in enumerate(self.paths)]
        used = sorted({pair for row in rows for pair in row})
        matrix = torch.zeros(len(rows), len(used))
        for i, row in enumerate(rows):
            for pair, value in row.items():
                matrix[i, used.index(pair)] = value
        self.register_buffer("first", torch.tensor([a for a, _ in used]))
        self.register_buffer("second", torch.tensor([b for _, b in used]))
        self.register_buffer("coefficients", matrix)

    def forward(self, tensors: Tensor) -> list[Tensor]:
        """((l_max + 1)^2, n, channels) -> per degree l (num_paths, 2l + 1, n, channels)."""
        if not torch.jit.is_scripting() and self.unrolled:
            flat = self._one_by_one(tensors)
        else:
            flat = self._dense(tensors)
        n, c = tensors.shape[1], tensors.shape[2]
        out: list[Tensor] = []
        for degree, block in enumerate(flat.split(self.sizes)):
            out.append(block.reshape(self.paths[degree], 2 * degree + 1, n, c))
        return out

    def unroll(self) -> None:
        """From now on multiply one by one what is not zero, if that is little.

        52 of 24 x 40 coefficients are at l = 2, where it makes no difference; 125 of 38 x 104 at
        l = 3, where a compiled model saves a quarter of its time.
        """
        pairs = list(zip(self.first.tolist(), self.second.tolist(), strict=True))
        self.rows = [
            [(value, *pair) for value, pair in zip(row, pairs, strict=True) if value != 0]
            for row in self.coefficients.tolist()
        ]
        self.unrolled = sum(map(len, self.rows)) < 0.05 * self.coefficients.numel()

    def _dense(self, tensors: Tensor) -> Tensor:
        """All products, (num_rows, n, channels)."""
        pairs = tensors.index_select(0, self.first) * tensors.index_select(0, self.second)
        n, c = tensors.shape[1], tensors.shape[2]
        num_rows = self.coefficients.shape[0]
        return (self.coefficients @ pairs.reshape(pairs.shape[0], n * c)).reshape(num_rows, n, c)

    @torch.jit.unused
    def _one_by_one(self, tensors: Tensor) -> Tensor:
        components, none = tensors.unbind(0), torch.zeros_like(tensors[0])
        return torch.stack(
            [sum((v * components[a] * components[b] for v, a, b in row), none) for row in self.rows]
        )


def degree_of_components(l_max: int) -> Tensor:
    """Degree of each of the (l_max + 1)^2 components."""
    return torch.tensor([degree for degree in range(l_max + 1) for _ in range(2 * degree + 1)])


class DegreeLinear(nn.Module):
    """A linear map of channels, one matrix per degree; components never mix, hence equivariant."""

    degree_of: Tensor

    def __init__(self, l_max: int, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(l_max + 1, num_in, num_out) / math.sqrt(num_in))
        self.register_buffer("degree_of", degree_of_components(l_max), persistent=False)

    def forward(self, tensors: Tensor) -> Tensor:
        """((l_max + 1)^2, num_atoms, num_in) -> ((l_max + 1)^2, num_atoms, num_out)."""
        return torch.bmm(tensors, self.weight.index_select(0, self.degree_of))


class ScaledLinear(DegreeLinear):
    """The same of tensors divided by their root mean square per degree and channel.

    The scales are of the training data. They multiply the weights, not the tensors: a gradient then
    leaves the matrix product as edges gather it, tens of times per atom.
    """

    rms: Tensor

    def __init__(self, l_max: int, num_in: int, num_out: int) -> None:
        super().__init__(l_max, num_in, num_out)
        self.register_buffer("rms", torch.ones(l_max + 1, num_in))

    def forward(self, tensors: Tensor) -> Tensor:
        """((l_max + 1)^2, num_atoms, num_in) -> ((l_max + 1)^2, num_atoms, num_out)."""
        weight = self.weight / self.rms.unsqueeze(2)
        return torch.bmm(tensors, weight.index_select(0, self.degree_of))

    def fit(self, tensors: Tensor) -> None:
        """Take the root mean squares of `tensors`; a channel that is always zero keeps its."""
        for degree in range(self.rms.shape[0]):
            block = tensors[degree * degree : (degree + 1) * (degree + 1)]
            self.rms[degree].copy_(nonzero_scale(block.pow(2).mean((0, 1)).sqrt()))


def nonzero_scale(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 where one is zero beside the largest."""
    return torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))


def degree_products(a: Tensor, b: Tensor, l_max: int) -> list[Tensor]:
    """Invariant products sum_m a_lm b_lm / sqrt(2l + 1), one (num_atoms, channels) per degree."""
    out: list[Tensor] = []
    for degree, block in enumerate((a * b).split([2 * d + 1 for d in range(l_max + 1)])):
        out.append(block.sum(0) / math.sqrt(2 * degree + 1))
    return out
