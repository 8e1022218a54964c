"""The router (report, sections 2.1.2 and 2.1.3): which experts a token goes to, and with which weights. All in FP32.

Legend: T tokens, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything


def select(
    affinity_TE: Tensor,
    bias_E: Tensor,
    num_experts: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The definition, equations (13) and (16), with the released code's group limit.

    The bias decides selection only: groups are ranked by the sum of their two highest biased affinities, experts of
    dropped groups get -inf (0 would win against a negative bias), and the weights come from un-biased affinities.
    """
    biased_TE = affinity_TE.detach() + bias_E
    if topk_group < n_group:
        grouped = biased_TE.unflatten(1, (n_group, -1))
        rank_TG = grouped.topk(2, dim=-1).values.sum(-1)
        kept_TG = torch.zeros(rank_TG.shape, dtype=torch.bool, device=rank_TG.device)
        kept_TG = kept_TG.scatter(1, rank_TG.topk(topk_group, dim=-1).indices, True)
        biased_TE = grouped.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(1)
    expert_TK = biased_TE.topk(num_experts, dim=-1).indices.sort(dim=-1).values
    weight_TK = affinity_TE.gather(1, expert_TK)
    if normalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return weight_TK * scaling, expert_TK


class Selected(torch.autograd.Function):
    """One kernel each way. The gradient of the affinities is zero but for the chosen."""

    @staticmethod
    def forward(
        ctx: Any,
        affinity_TE: Tensor,
        bias_E: Tensor,
        num_experts: int,
        n_group: int,
        topk_group: int,
        normalise: bool,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        from dsv3.ops.kernels.router import select

        weight_TK, expert_TK = select(affinity_TE, bias_E, num_experts, n_group, topk_group, normalise, scaling)
        ctx.mark_non_differentiable(expert_TK)
        ctx.save_for_backward(affinity_TE, expert_TK)
        ctx.normalise, ctx.scaling = normalise, scaling
        return weight_TK, expert_TK

    @staticmethod
    def backward(ctx: Any, grad_weight_TK: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        from dsv3.ops.kernels.router import gradient_of_affinity

        affinity_TE, expert_TK = ctx.saved_tensors
        grad_TE = gradient_of_affinity(grad_weight_TK, affinity_TE, expert_TK, ctx.normalise, ctx.scaling)
        return grad_TE, None, None, None, None, None, None


MOST_EXPERTS = 1024
"""A warp holds the affinities of two tokens in its registers."""


def selects_on_gpu(
    affinity_TE: Tensor,
    bias_E: Tensor,
    num_experts: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
) -> str | None:
    """The reason why the kernel does not serve."""
    if (reason := no_triton(affinity_TE, bias_E)) is not None:
        return reason
    if {affinity_TE.dtype, bias_E.dtype} != {torch.float32}:
        return "takes affinities and a bias in float32"
    experts = affinity_TE.shape[1]
    if experts > MOST_EXPERTS:
        return f"takes {MOST_EXPERTS} experts at most"
    limited = topk_group < n_group
    if limited and experts < 2 * n_group:
        return "needs two experts a group"
    if num_experts > (topk_group * experts // n_group if limited else experts):
        return "needs as many experts to choose from as are chosen"
    return None


select_experts = Operation(
    "select_experts",
    [Implementation("triton", Selected.apply, selects_on_gpu), Implementation("reference", select, anything)],
)
"""`select_experts(affinity [T, E] FP32, bias [E] FP32, K, n_group, topk_group, normalise, scaling) -> (weight [T, K] FP32,
expert [T, K] int64, ascending)`."""


def expert_frequency(affinity_TE: Tensor, num_parts: int, num_experts: int) -> Tensor:
    """f of equation (18) for `num_parts` equal parts of the tokens, one after the other: [parts, E], without a gradient.

    It counts the un-biased top K, as printed; 1 is an expert's even share. A part is one sequence for the sequence-wise
    balance loss, and all tokens for the batch-wise one.
    """
    affinity = affinity_TE.detach().unflatten(0, (num_parts, -1))
    chosen = affinity.topk(num_experts, dim=-1).indices
    num_routed, length = affinity.shape[2], affinity.shape[1]
    hits = torch.zeros_like(affinity).scatter_(2, chosen, 1.0).sum(1)
    return hits * (num_routed / (num_experts * length))


def balance_loss(affinity_TE: Tensor, frequency_PE: Tensor) -> Tensor:
    """A balance loss without its factor alpha: `sum_i f_i P_i`, equations (17), (19) and (20), with the f that is given.

    Tokens are as many equal parts as f has rows; the mean over parts is returned (the report leaves it open how sequences
    are put together).
    """
    affinity = affinity_TE.unflatten(0, (len(frequency_PE), -1))
    probability = (affinity / affinity.sum(-1, keepdim=True)).mean(1)
    return (frequency_PE * probability).sum(-1).mean()


class AddLoss(torch.autograd.Function):
    """The identity on a tensor; backward also starts `weight` times a loss. No value seen by users changes, and a
    recomputed forward counts nothing twice, since only the backward pass adds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad.new_full((), ctx.weight), None


def add_loss(x: Tensor, loss: Tensor, weight: float) -> Tensor:
    """x itself; whatever is differentiated through it also receives `weight` times the loss's gradient."""
    return AddLoss.apply(x, loss, weight)
