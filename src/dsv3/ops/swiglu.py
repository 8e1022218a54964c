"""SwiGLU's gate: `silu(gate) * up`, with gate and up side by side in one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, in_training
from dsv3.ops.tiles import Tiles, empty_tiles, rows_reference


def reference(gate_up: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """The definition."""
    gate, up = gate_up.chunk(2, dim=-1)
    act = F.silu(gate) * up
    return act if weight_R is None else act * weight_R.unsqueeze(-1).to(act.dtype)


class InputKept(torch.autograd.Function):
    """Keeps the input alone (report, section 3.2.3: the output is cheap to compute again) and writes one gradient tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_R: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(gate_up, weight_R)
        return reference(gate_up, weight_R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weight_R = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silu, grad_weight = F.silu(gate), None
        if weight_R is not None:
            grad_weight = torch.linalg.vecdot(grad, silu * up).to(weight_R.dtype)
            grad = grad * weight_R.unsqueeze(1).to(grad.dtype)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up, grad_weight


class OneKernel(torch.autograd.Function):
    """`InputKept` in one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_R: Tensor | None = None) -> Tensor:
        from dsv3.ops.kernels.swiglu import forward

        ctx.save_for_backward(gate_up, weight_R)
        return forward(gate_up.reshape(-1, gate_up.shape[-1]), weight_R).view(*gate_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        from dsv3.ops.kernels.swiglu import backward

        gate_up, weight_R = ctx.saved_tensors
        rows, grad_rows = gate_up.reshape(-1, gate_up.shape[-1]), side_by_side(grad.reshape(-1, grad.shape[-1]))
        grad_gate_up, grad_weight, _ = backward(grad_rows, rows, weight_R, with_act=False)
        return grad_gate_up.view(gate_up.shape), grad_weight


def side_by_side(grad: Tensor) -> Tensor:
    """A gradient may come expanded from a sum."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


ROOM_MULTIPLE = 16
"""Rows: what one program of the kernel that quantises takes lies in one room."""


def not_by_triton(
    gate_up: Tensor, weight_R: Tensor | None = None, power_of_two: bool = False, counts_E: Tensor | None = None
) -> str | None:
    """The reason why the kernels do not serve; None when they do."""
    if counts_E is not None and len(gate_up) % (ROOM_MULTIPLE * len(counts_E)):
        return f"needs rooms of a multiple of {ROOM_MULTIPLE} rows"
    if gate_up.dtype not in (torch.bfloat16, torch.float32):
        return f"needs BF16 or FP32, not {gate_up.dtype}"
    if gate_up.stride(-1) != 1:
        return "needs rows whose elements are side by side"
    if weight_R is not None and (weight_R.dtype != torch.float32 or not weight_R.is_contiguous()):
        return "needs contiguous weights in FP32"
    return no_triton(gate_up)


def training_not_by_triton(gate_up: Tensor, weight_R: Tensor | None = None) -> str | None:
    """For training alone, as `in_training` says."""
    return in_training() or not_by_triton(gate_up, weight_R)


def activation(gate_up_RJ: Tensor, weight_R: Tensor | None) -> Tensor:
    """FP32 [R, I]: times the weight of its row."""
    return reference(gate_up_RJ.float(), weight_R)


def tiles_reference(
    gate_up_RJ: Tensor, weight_R: Tensor | None = None, power_of_two: bool = False, counts_E: Tensor | None = None
) -> Tiles:
    """The definition, in FP32 until it is quantised; what nobody needs is computed as well."""
    return rows_reference(activation(gate_up_RJ, weight_R), power_of_two)


def tiles_triton(
    gate_up_RJ: Tensor, weight_R: Tensor | None = None, power_of_two: bool = False, counts_E: Tensor | None = None
) -> Tiles:
    """One program for some rows of one tile."""
    from dsv3.ops.kernels.swiglu import quantise

    rows, columns = gate_up_RJ.shape
    tiles = empty_tiles(rows, columns // 2, gate_up_RJ.device)
    quantise(gate_up_RJ, weight_R, tiles, power_of_two, counts_E)
    return tiles


def backward_reference(
    grad_RI: Tensor, gate_up_RJ: Tensor, weight_R: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The definition, in FP32."""
    gate, up = gate_up_RJ.float().chunk(2, dim=-1)
    grad, sigmoid = grad_RI.float(), gate.sigmoid()
    silu = gate * sigmoid
    act = silu * up
    grad_weight = None
    if weight_R is not None:
        grad_weight = (grad * act).sum(1)
        grad, act = grad * weight_R.unsqueeze(1), act * weight_R.unsqueeze(1)
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((grad_gate, grad * silu), dim=1).to(gate_up_RJ.dtype), grad_weight, act.to(gate_up_RJ.dtype)


def backward_triton(
    grad_RI: Tensor, gate_up_RJ: Tensor, weight_R: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One program a row."""
    from dsv3.ops.kernels.swiglu import backward

    grad_gate_up, grad_weight, act = backward(side_by_side(grad_RI), gate_up_RJ, weight_R)
    assert act is not None
    return grad_gate_up, grad_weight, act


def backward_not_by_triton(grad_RI: Tensor, gate_up_RJ: Tensor, weight_R: Tensor | None = None) -> str | None:
    """The reason why the kernel does not serve; None when it does."""
    return no_triton(grad_RI) or not_by_triton(gate_up_RJ, weight_R)


swiglu = Operation(
    "swiglu",
    [
        Implementation("triton", OneKernel.apply, training_not_by_triton),
        Implementation("input_kept", InputKept.apply, in_training),
        Implementation("reference", reference, anything),
    ],
)
"""`swiglu(gate_up [..., 2I], weight [R] or None) -> [..., I]`: the first half of the last dimension passes through SiLU.

With weights, of [R, 2I], every row is multiplied by its own. An expert's routing weight enters here, before the down projection: the
sum is the same, its gradient needs no expert's result, and gradients go back to experts as they were sent."""

swiglu_tiles = Operation(
    "swiglu_tiles",
    [Implementation("triton", tiles_triton, not_by_triton), Implementation("reference", tiles_reference, anything)],
)
"""`swiglu_tiles(gate_up [R, 2I], weight [R] FP32 or None, power_of_two=False, counts [E] int or None) -> Tiles` of
`silu(gate) up weight`, [R, I]: the input of the down projection, with the routing weight of each row, if given, applied before it.
In FP32 until it is quantised; without gradients: `swiglu_backward` makes them. With counts, rows are rooms (`dsv3.ops.rooms`) of R / E
rows each, of which the first counts[e] are wanted; tiles of the others hold anything."""

swiglu_backward = Operation(
    "swiglu_backward",
    [
        Implementation("triton", backward_triton, backward_not_by_triton),
        Implementation("reference", backward_reference, anything),
    ],
)
"""`swiglu_backward(grad [R, I], gate_up [R, 2I], weight [R] FP32 or None) -> (grad of gate_up [R, 2I], grad of weight FP32 [R] or
None, silu(gate) up weight [R, I])`: the gradients of what `swiglu_tiles` quantises, and that itself computed again, in gate_up's
dtype, for the weight gradient of the down projection."""
