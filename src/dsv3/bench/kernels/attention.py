"""Attention of DeepSeek-V3's heads, forward and backward, beside cuDNN's, which computes whole sequences only."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dsv3.bench.kernels.case import Case
from dsv3.ops.attention import sdpa, triton

LENGTH, HEADS, QUERY, VALUE = 4096, 128, 192, 128
SCALE = QUERY**-0.5
DOCUMENTS = 4
"""Of equal lengths, in one sequence."""


def cases(device: torch.device) -> Iterator[Case]:
    """A sequence of documents, whose work is a quarter of cuDNN's: rates are compared; and one that is a single document."""
    q, k, v, grad = (
        torch.randn(1, LENGTH, HEADS, width, dtype=torch.bfloat16, device=device).requires_grad_()
        for width in (QUERY, QUERY, VALUE, VALUE)
    )
    position = torch.arange(LENGTH, device=device)
    segments = position.div(LENGTH // DOCUMENTS, rounding_mode="floor").unsqueeze(0)
    flops = HEADS * LENGTH**2 * (QUERY + VALUE)
    theirs = sdpa(q, k, v, SCALE)
    for segment, documents, name, target in (
        (segments, DOCUMENTS, f"{DOCUMENTS} documents of {LENGTH // DOCUMENTS}", 0.5),
        (None, 1, f"{LENGTH} tokens", None),
    ):
        shape = f"{name}, {HEADS} heads of {QUERY} and {VALUE}"
        yield Case(
            "attention", shape, partial(without_gradients, triton, q, k, v, SCALE, segment), "cuDNN, one document",
            partial(without_gradients, sdpa, q, k, v, SCALE),
            flops=flops / documents, peer_flops=flops, target=target,
        )  # fmt: skip
        ours = triton(q, k, v, SCALE, segment)
        leaves = q, k, v
        yield Case(
            "attention backward", shape, partial(gradients, ours, leaves, grad), "cuDNN, one document",
            partial(gradients, theirs, leaves, grad),
            flops=2.5 * flops / documents, peer_flops=2.5 * flops, target=target,
        )  # fmt: skip


@torch.no_grad()
def without_gradients(run: Callable[..., Tensor], *arguments: object) -> Tensor:
    """As prefill calls it."""
    return run(*arguments)


def gradients(out: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Of a result that is kept."""
    return torch.autograd.grad(out, leaves, grad, retain_graph=True)
