"""One linear layer an expert: rows sorted by expert, each group times its own weight.

Legend: R rows, E experts, I elements in, O elements out.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.ops.accumulate import accumulate
from dsv3.ops.cast import add_gradient, cast
from dsv3.ops.kernels.available import no_gluon
from dsv3.ops.operation import Implementation, Operation, anything, kernel


def segments(counts_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of every group that holds rows."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, start, start + count
        start += count


def reference(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The definition: a loop over experts."""
    counts = counts_E.tolist()
    groups = zip(x_RI[: sum(counts)].split(counts), weight_EOI.to(x_RI.dtype), strict=True)
    nobodys = x_RI.new_zeros(len(x_RI) - sum(counts), weight_EOI.shape[1])
    return torch.cat([*(F.linear(rows, weight) for rows, weight in groups), nobodys])


class Loop(torch.autograd.Function):
    """The loop with results written in place: no concatenation forward, no per-expert slices of gradients backward."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        weight = weight_EOI.to(x_RI.dtype)
        groups = list(segments(counts_E))
        ctx.save_for_backward(x_RI, weight)
        ctx.groups = groups
        ctx.weight_dtype = weight_EOI.dtype
        out_RO = x_RI.new_empty(x_RI.shape[0], weight.shape[1])
        for e, start, end in groups:
            torch.mm(x_RI[start:end], weight[e].t(), out=out_RO[start:end])
        return out_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, weight = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = torch.empty_like(x_RI)
        grad_weight = torch.zeros_like(weight)
        for e, start, end in ctx.groups:
            torch.mm(grad_RO[start:end], weight[e], out=grad_x[start:end])
            torch.mm(grad_RO[start:end].t(), x_RI[start:end], out=grad_weight[e])
        return grad_x, grad_weight.to(ctx.weight_dtype), None


def on_cpu(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> str | None:
    """Reading the counts costs nothing there; on a GPU it would wait for the device."""
    return None if x_RI.device.type == "cpu" else "for tensors on the CPU"


class Batched(torch.autograd.Function):
    """One batched product where all groups are equally long. Shapes repeat from step to step, which matters on CPU: the
    library prepares a kernel for each new shape, for a millisecond or more."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        weight = weight_EOI.to(x_RI.dtype)
        ctx.save_for_backward(x_RI, weight)
        ctx.weight_dtype = weight_EOI.dtype
        return torch.bmm(x_RI.view(len(weight), -1, x_RI.shape[1]), weight.mT).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, weight = ctx.saved_tensors
        grad = grad_RO.reshape(len(weight), -1, grad_RO.shape[1])
        x = x_RI.view(len(weight), -1, x_RI.shape[1])
        return torch.bmm(grad, weight).flatten(0, 1), torch.bmm(grad.mT, x).to(ctx.weight_dtype), None


def equal_on_cpu(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> str | None:
    """Reading the counts costs nothing there; on a GPU it would wait for the device."""
    if x_RI.device.type != "cpu":
        return "for tensors on the CPU"
    equal = len(x_RI) > 0 and bool((counts_E * len(counts_E) == len(x_RI)).all())
    return None if equal and x_RI.is_contiguous() else "needs equally long groups in a contiguous tensor"


def batched(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """`Batched` without a graph."""
    return torch.bmm(x_RI.unflatten(0, (len(weight_EOI), -1)), cast(weight_EOI, x_RI.dtype).mT).flatten(0, 1)


def loop(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """`Loop` without a graph; groups without rows cost nothing."""
    parts = [F.linear(x_RI[start:end], cast(weight_EOI[e], x_RI.dtype)) for e, start, end in segments(counts_E)]
    nobodys = len(x_RI) - sum(map(len, parts))
    if nobodys or not parts:
        parts.append(x_RI.new_empty(nobodys, weight_EOI.shape[1]))
    return torch.cat(parts)


def loop_in_inference(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> str | None:
    """As for `Loop`."""
    return "for inference" if torch.is_grad_enabled() else on_cpu(x_RI, weight_EOI, counts_E)


def equal_in_inference(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> str | None:
    """Reading the counts costs nothing on CPU; on a GPU it would wait for the device."""
    if torch.is_grad_enabled() or x_RI.device.type != "cpu":
        return "for inference on the CPU"
    equal = len(x_RI) > 0 and set(counts_E.tolist()) == {len(x_RI) / len(counts_E)}
    return None if equal else "needs equally long groups"


class GroupedMM(torch.autograd.Function):
    """Torch's grouped matrix product, with the gradient of a parameter added to its `grad`: see `dsv3.ops.cast`."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        weight = weight_EOI.to(x_RI.dtype)
        ctx.save_for_backward(x_RI, weight, counts_E)
        ctx.parameter = weight_EOI
        return multiplied(x_RI, weight, counts_E)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, None, None]:
        x_RI, weight, counts_E = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        add_gradient(ctx.parameter, grouped_weight_gradient(grad_RO, x_RI, counts_E, ctx.parameter.grad))
        return multiplied(grad_RO, weight.mT, counts_E) if ctx.needs_input_grad[0] else None, None, None


def multiplied(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Torch's grouped matrix product of one dtype."""
    return F.grouped_mm(x_RI, weight_EOI.mT, offs=counts_E.cumsum(0, dtype=torch.int32))


def grouped_mm(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Torch's grouped matrix product."""
    x_RI = x_RI.contiguous()
    if isinstance(weight_EOI, nn.Parameter) and weight_EOI.requires_grad and torch.is_grad_enabled():
        out: Tensor = GroupedMM.apply(x_RI, weight_EOI, counts_E)
        return out
    return multiplied(x_RI, weight_EOI.to(x_RI.dtype), counts_E)


def fits_grouped_mm(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> str | None:
    """Torch's kernel takes BF16 with strides that are multiples of 16 bytes, on sm_90 and later."""
    if x_RI.device.type != "cuda" or torch.cuda.get_device_capability(x_RI.device) < (9, 0):
        return "needs a GPU of compute capability 9.0 or later"
    if x_RI.dtype != torch.bfloat16:
        return f"takes bfloat16, not {x_RI.dtype}"
    if x_RI.shape[1] % 8 or weight_EOI.shape[1] % 8:
        return "needs sizes that are multiples of 8"
    return None


grouped_linear = Operation(
    "grouped_linear",
    [
        Implementation("grouped_mm", grouped_mm, fits_grouped_mm),
        Implementation("batched_inference", batched, equal_in_inference),
        Implementation("loop_inference", loop, loop_in_inference),
        Implementation("batched", Batched.apply, equal_on_cpu),
        Implementation("loop", Loop.apply, on_cpu),
        Implementation("reference", reference, anything),
    ],
)
"""`grouped_linear(x [R, I], weight [E, O, I], counts [E] int) -> [R, O]`.

The first counts[0] rows meet weight[0], the next counts[1] rows weight[1], and so on. The counts sum to R at most: rows
behind the last group are nobody's, in results and gradients too, where they hold anything. The weight is cast to x's dtype.
"""


def weight_gradient_reference(grad_RO: Tensor, x_RI: Tensor, counts_E: Tensor, out_EOI: Tensor | None = None) -> Tensor:
    """The definition: a loop over experts."""
    gradient = x_RI.new_zeros(len(counts_E), grad_RO.shape[1], x_RI.shape[1])
    for e, start, end in segments(counts_E):
        torch.mm(grad_RO[start:end].t(), x_RI[start:end], out=gradient[e])
    return gradient if out_EOI is None else out_EOI.add_(gradient)


def weight_gradient_grouped_mm(
    grad_RO: Tensor, x_RI: Tensor, counts_E: Tensor, out_EOI: Tensor | None = None
) -> Tensor:
    """Torch's grouped matrix product, over rows."""
    gradient = F.grouped_mm(grad_RO.t(), x_RI, offs=counts_E.cumsum(0, dtype=torch.int32))
    if out_EOI is None:
        return gradient
    accumulate(out_EOI, gradient)
    return out_EOI


def fits_weight_gradient(grad_RO: Tensor, x_RI: Tensor, counts_E: Tensor, out_EOI: Tensor | None = None) -> str | None:
    """As for the product itself."""
    return fits_grouped_mm(x_RI, grad_RO.t().unsqueeze(0), counts_E)


def fits_gluon(grad_RO: Tensor, x_RI: Tensor, counts_E: Tensor, out_EOI: Tensor | None = None) -> str | None:
    """Why the kernel that adds does not serve. It adds to zeros too, so that the first of several gradients is rounded no more than
    the others."""
    if out_EOI is not None and (out_EOI.dtype != torch.float32 or not out_EOI.is_contiguous()):
        return "adds to contiguous matrices in float32"
    if not grad_RO.is_contiguous() or not x_RI.is_contiguous():
        return "needs contiguous rows"
    return fits_weight_gradient(grad_RO, x_RI, counts_E) or no_gluon(x_RI.device)


grouped_weight_gradient = Operation(
    "grouped_weight_gradient",
    [
        Implementation("gluon", kernel("grouped_wgrad_gluon", "add_wgrad"), fits_gluon),
        Implementation("grouped_mm", weight_gradient_grouped_mm, fits_weight_gradient),
        Implementation("reference", weight_gradient_reference, anything),
    ],
)
"""`grouped_weight_gradient(grad [R, O], x [R, I], counts [E] int, out=None) -> [E, O, I]`: grad^T x over each expert's rows, in x's
dtype or FP32. Where `out` is given, it is added to it, in its dtype, and that is returned.

Rows behind the last group count for nobody.
"""
