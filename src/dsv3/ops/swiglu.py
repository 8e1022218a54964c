"""SwiGLU's gate: `silu(gate) * up`, with gate and up side by side in one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything, in_training


def reference(gate_up: Tensor) -> Tensor:
    """The definition."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class InputKept(torch.autograd.Function):
    """Keeps the input alone (report, section 3.2.3: the output is cheap to compute again) and writes one gradient tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return reference(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


swiglu = Operation(
    "swiglu",
    [Implementation("input_kept", InputKept.apply, in_training), Implementation("reference", reference, anything)],
)
"""`swiglu(gate_up [..., 2I]) -> [..., I]`: the first half of the last dimension passes through SiLU."""


def swiglu_tiles(gate_up, weight_R=None, power_of_two=False):
    from dsv3.ops.tiles import quantize_rows

    act = reference(gate_up)
    return quantize_rows(act if weight_R is None else act * weight_R[:, None], power_of_two)


def swiglu_backward(grad, gate_up, weight_R=None):
    with torch.enable_grad():
        x = gate_up.detach().requires_grad_()
        act = reference(x)
        return torch.autograd.grad(act, x, grad)[0], None, act.detach()
