"""The IVON optimiser as Lightning's loop wants one; imports the optional package ivon-opt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import ivon
except ImportError:
    raise ImportError(
        "training.posterior.method ivon needs the package ivon-opt: pip install 'lmp-hl[ivon]'"
    ) from None

from .config import TrainingConfig
from .posterior import Posterior


class Ivon(ivon.IVON):
    """Learns the mean and the diagonal precision of a Gaussian over the weights.

    IVON (Shen et al., arXiv 2402.17641): every gradient is taken at weights drawn from
    N(mean, 1 / (ess (h + weight_decay))), h the running average of the Hessian's diagonal that the
    same gradients give by Price's theorem; the mean makes a Newton step. ess times the loss is
    taken for a negative log-likelihood, ess times weight_decay is the precision of the prior.

    Gradients are clipped inside the sample. The draws depend on the seed and on the number of the
    step only, so a resumed run makes the same ones, and all processes of a run share them.

    Args:
        groups: of parameters, as other optimisers take them.
        config: with an IvonConfig as `posterior`.
        seed: of the draws.
    """

    def __init__(self, groups: list[dict[str, Any]], config: TrainingConfig, seed: int) -> None:
        settings: Any = config.posterior
        super().__init__(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            ess=settings.ess,
            hess_init=settings.hess_init,
            beta2=settings.beta2,
            weight_decay=config.weight_decay,
        )
        self.seed = seed

    def step(self, closure: Callable[[], Tensor]) -> Any:  # type: ignore[override]
        """One step; the closure evaluates loss and gradients, here at drawn weights."""
        found = super().step(lambda: self._at_drawn_weights(closure))
        self.state["current_step"] = self.current_step
        return found

    def _at_drawn_weights(self, closure: Callable[[], Tensor]) -> Tensor:
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed((self.seed << 32) + self.current_step)
            with self.sampled_params(train=True):
                loss = closure()
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is None:  # of weights that this loss does not depend on
                            p.grad = torch.zeros_like(p)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also what the package leaves out: the number of the step and the device."""
        super().load_state_dict(state_dict)
        self.current_step = self.state["current_step"]
        for group in self.param_groups:
            for name in ("hess", "momentum"):
                group[name] = group[name].to(self._device)

    def posterior(self, parameters: list[Tensor], mean: Tensor) -> Posterior:
        """The Gaussian around other means than its own, such as their running average.

        Args:
            parameters: the weights in the order of `mean`.
            mean: (num_weights,) float64.
        """
        variances = {}
        for group in self.param_groups:
            of_group = 1.0 / (group["ess"] * (group["hess"] + group["weight_decay"]).double())
            sizes = [p.numel() for p in group["params"]]
            for p, part in zip(group["params"], of_group.split(sizes), strict=True):
                variances[p] = part.cpu()
        variance = torch.cat([variances[p] for p in parameters])
        return Posterior(mean, variance, mean.new_zeros(0, len(mean)))
