"""Routing and the output head: the router, the sort by expert, permute and unpermute, cross-entropy; forward and backward."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from dsv3.bench.kernels.case import Case
from dsv3.ops.cross_entropy import IGNORE, Chunked, linear_cross_entropy
from dsv3.ops.linear_fp32 import linear_fp32
from dsv3.ops.permute import permute, sort_by_expert, sort_reference, unpermute
from dsv3.ops.router import select, select_experts

TOKENS, CHOSEN, EXPERTS, HIDDEN, VOCABULARY = 4096, 8, 256, 7168, 129_280
"""DeepSeek-V3's, with the tokens of one sequence."""
ROUTED_TOKENS = 16_384
"""Tokens whose experts are chosen at a time."""


def cases(device: torch.device) -> Iterator[Case]:
    """All of them, each with its tensors made when its turn comes."""
    yield from router(device)
    yield from sort(device)
    yield from permutation(device)
    yield from cross_entropy(device)
    yield from head(device)


def router(device: torch.device) -> Iterator[Case]:
    """The logits of one sequence; the choice, with eight groups of which four are kept; its gradient."""
    from dsv3.ops.kernels.router import gradient_of_affinity

    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)
    weight = torch.randn(EXPERTS, HIDDEN, device=device)
    yield Case(
        "linear_fp32", f"{TOKENS} {EXPERTS}x{HIDDEN}", partial(linear_fp32, x, weight), "FP32", lambda: F.linear(x.float(), weight),
        flops=2 * TOKENS * EXPERTS * HIDDEN,
    )  # fmt: skip

    shape = f"{ROUTED_TOKENS}x{EXPERTS}, {CHOSEN} of 4 of 8 groups"
    affinity = torch.rand(ROUTED_TOKENS, EXPERTS, device=device)
    bias = torch.randn(EXPERTS, device=device) * 0.1
    arguments = (affinity, bias, CHOSEN, 8, 4, True, 2.5)
    size = affinity.nbytes + ROUTED_TOKENS * CHOSEN * 12
    yield Case(
        "select_experts", shape, lambda: select_experts(*arguments), "eager twin", lambda: select(*arguments),
        bytes=size, target=45, unit="us",
    )  # fmt: skip
    weight, expert = select_experts(*arguments)
    leaf = affinity.clone().requires_grad_()
    twin = select(leaf, *arguments[1:])[0]
    yield Case(
        "select_experts backward", shape, lambda: gradient_of_affinity(weight, affinity, expert, True, 2.5), "eager twin",
        lambda: torch.autograd.grad(twin, leaf, weight, retain_graph=True), bytes=size,
    )  # fmt: skip


def sort(device: torch.device) -> Iterator[Case]:
    """Rows as they come, and groups aligned for products in FP8."""
    expert = torch.rand(TOKENS, EXPERTS, device=device).topk(CHOSEN).indices
    for aligned in (0, 128):
        yield Case(
            "sort_by_expert", f"{TOKENS}x{CHOSEN}, {EXPERTS} experts, aligned to {max(1, aligned)}",
            partial(sort_by_expert, expert, EXPERTS, aligned=aligned),
            "argsort", partial(sort_reference, expert, EXPERTS, aligned=aligned),
        )  # fmt: skip


def permutation(device: torch.device) -> Iterator[Case]:
    """Rows in BF16. Each is the other's backward pass."""
    shape = f"{TOKENS}x{CHOSEN}x{HIDDEN}"
    to = sort_by_expert(torch.rand(TOKENS, EXPERTS, device=device).topk(CHOSEN).indices, EXPERTS)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    rows = torch.randn(TOKENS * CHOSEN, HIDDEN, dtype=torch.bfloat16, device=device)
    once = x.nbytes + rows.nbytes
    yield Case("permute", shape, lambda: permute(x, to), "copy rate", bytes=once, target=0.80)
    yield Case("unpermute", shape, lambda: unpermute(rows, to), "copy rate", bytes=once, target=0.91)


def cross_entropy(device: torch.device) -> Iterator[Case]:
    """The kernel alone; its bytes are those of logits read once and written once, though it reads them twice."""
    from dsv3.ops.kernels.cross_entropy import losses

    target = torch.randint(VOCABULARY, (TOKENS,), device=device)
    logits = torch.randn(TOKENS, VOCABULARY, dtype=torch.bfloat16, device=device)
    yield Case(
        "cross_entropy", f"{TOKENS}x{VOCABULARY}", lambda: losses(logits, target, IGNORE, 1 / TOKENS), "copy rate",
        bytes=3 * logits.nbytes, target=0.89,  # read for the norm, read again and written
    )  # fmt: skip


def head(device: torch.device) -> Iterator[Case]:
    """The output head with its loss and its gradients."""
    target = torch.randint(VOCABULARY, (TOKENS,), device=device)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=device) * HIDDEN**-0.5).requires_grad_()
    yield Case(
        "linear_cross_entropy", f"{TOKENS}x{VOCABULARY}x{HIDDEN}",
        lambda: linear_cross_entropy(hidden, weight, target, TOKENS), "FP32 logits in chunks",
        lambda: Chunked.apply(hidden, weight, target, TOKENS), flops=6 * TOKENS * VOCABULARY * HIDDEN,
    )  # fmt: skip
