"""AdamW whose moments are kept in BF16, as the report keeps them (section 3.3.1): six bytes a weight in place of ten."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.adamw import adamw


class AdamWInBF16(torch.optim.Optimizer):
    """`dsv3.ops.adamw` for all parameters.

    A group holds `params`, `lr` and `weight_decay`; state is `step` (FP32 scalar), `exp_avg` and `exp_avg_sq` (BF16).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float):
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0))
        self.betas, self.eps = betas, eps
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = first_state(parameter, torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update by gradients divided by `grad_scale`; nothing changes where `found_inf` is 1, as in torch's own optimizers.
        `closure` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                keep = torch.ones_like(state["step"]) if self.found_inf is None else 1 - self.found_inf
                state["step"] += keep
                scale = torch.ones_like(keep) if self.grad_scale is None else self.grad_scale
                adamw(
                    parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], keep, scale,
                    group["lr"], self.betas, self.eps, group["weight_decay"],
                )  # fmt: skip


def first_state(parameter: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """AdamW's state before the first step, with moments in `dtype`."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **{name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}}
