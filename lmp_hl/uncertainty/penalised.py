"""Penalised maximum likelihood of a method's parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def minimise(
    loss: Callable[[], Tensor], tied: Sequence[tuple[nn.Parameter, float]], max_iter: int
) -> None:
    """Minimise loss + sum_k s_k |w_k|^2 by L-BFGS from where the parameters are.

    Args:
        loss: of the parameters, a scalar.
        tied: parameters w and how strongly s each is tied to zero; fixed again afterwards.
        max_iter: L-BFGS iterations.
    """
    parameters = [parameter for parameter, _ in tied]
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iter, line_search_fn="strong_wolfe")

    def penalised() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        for parameter, strength in tied:
            value = value + strength * parameter.square().sum()
        value.backward()
        return value

    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        optimizer.step(penalised)
    for parameter in parameters:
        parameter.requires_grad_(False)
