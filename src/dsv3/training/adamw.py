"""AdamW whose moments are kept in BF16, as the report keeps them (section 3.3.1): six bytes a weight in place of ten."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PART = 2**26
"""Elements updated at a time: what is computed in FP32 on the way takes two of these and not two weights."""


class AdamWInBF16(torch.optim.Optimizer):
    """Loshchilov and Hutter 2019, algorithm 2; moments are rounded to BF16 after each step, all else is FP32.

    A group holds `params`, `lr` and `weight_decay`; state is `step` (FP32 scalar), `exp_avg` and `exp_avg_sq` (BF16).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float):
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0))
        self.betas, self.eps = betas, eps
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.bfloat16),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used. Nothing changes where `found_inf`, as for torch's own optimizers, is 1."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                keep = torch.ones_like(state["step"]) if self.found_inf is None else 1 - self.found_inf
                state["step"] += keep
                tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                parts = zip(*(each.view(-1).split(PART) for each in tensors), strict=True)
                for weight, grad, first, second in parts:
                    self.update(weight, grad, first, second, state["step"], keep, group)

    def update(
        self, weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Tensor, keep: Tensor,
        group: dict[str, Any],
    ) -> None:  # fmt: skip
        """A part of a weight, all flat. What is not finite counts as zero: `keep` is 0 then."""
        grad.nan_to_num_(0.0, 0.0, 0.0)
        mean = first.float().lerp_(grad, keep * (1 - self.betas[0]))
        first.copy_(mean)
        square = second.float().lerp_(grad.square(), keep * (1 - self.betas[1]))
        second.copy_(square)
        # Before the first step that counts, both corrections are 0, and so is `keep`.
        corrections = [(1 - beta**step).clamp_(min=torch.finfo(torch.float32).tiny) for beta in self.betas]
        root = square.div_(corrections[1]).sqrt_().add_(self.eps)
        weight.mul_(1 - keep * (group["lr"] * group["weight_decay"]))
        weight.addcdiv_(mean.mul_(keep / corrections[0]), root, value=-group["lr"])
