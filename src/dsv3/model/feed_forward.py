"""Feed-forward layers: dense SwiGLU, and DeepSeekMoE (report, section 2.1.2) with its router and experts.

Legend: B sequences, T tokens, D hidden, E experts, K experts per token, R = T K rows, I inner elements of an expert.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.model.config import ModelConfig
from dsv3.model.linear import Linear
from dsv3.ops.grouped_linear import grouped_linear
from dsv3.ops.permute import permute, sort_by_expert, unpermute
from dsv3.ops.router import add_loss, select_experts, sequence_balance
from dsv3.ops.swiglu import swiglu


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; gate and up in one product, unless copying their weights would cost more than it saves."""
        if x.numel() < FEW_ROWS * x.shape[-1]:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate_up = torch.cat((self.gate_proj.weight, self.up_proj.weight)).to(x.dtype)
        return self.down_proj(swiglu(F.linear(x, gate_up)))


FEW_ROWS = 64
"""See `SwiGLU`: from about so many rows on, one product of twice the size is faster than two."""
EQUAL_GROUP = 64
"""Rows; see `equal_groups`."""


EVERY_EXPERT_ROWS = 128
"""See `every_expert`."""


@dataclass(frozen=True)
class Routing:
    """The router's answer for the tokens of one pass through one block."""

    expert: Tensor
    """int64 [T, K]."""
    weight: Tensor
    """FP32 [T, K]; gradients flow through it."""
    load: Tensor
    """int64 [E]: assignments to each expert, for the bias update and the metrics."""
    balance: Tensor | None
    """FP32 scalar: the sequence-wise balance loss without its factor; None when it is not asked for."""


class Gate(nn.Module):
    """The router; `e_score_correction_bias` (FP32 [E]) is no parameter: `training/balance.py` moves it (section 2.1.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor, num_sequences: int, balance_weight: float) -> Routing:
        """Affinities and selection in FP32. With `balance_weight` > 0, backward adds that times the balance loss."""
        config = self.config
        affinity = F.linear(x_TD.float(), self.weight.float()).sigmoid()
        balance = None
        if balance_weight > 0:
            balance = sequence_balance(affinity, num_sequences, config.num_experts_per_tok)
            affinity = add_loss(affinity, balance, balance_weight)
        weight, expert = select_experts(
            affinity,
            self.e_score_correction_bias,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        load = torch.bincount(expert.flatten(), minlength=config.n_routed_experts)
        return Routing(expert, weight, load, None if balance is None else balance.detach())


class Dispatcher(Protocol):
    """Carries tokens to their experts and back. The local one is below; `parallel/` hands in those across GPUs."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """(rows [R, D] sorted by this rank's experts, counts [E of this rank], a handle for `combine`)."""

    def combine(self, rows_RD: Tensor, routing: Routing, handle: Any) -> Tensor:
        """The weighted sum of each token's rows: [T, D]."""


class LocalDispatcher:
    """All experts are here: dispatch is a permutation."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """See `Dispatcher`."""
        if every_expert(routing):
            return x_TD.expand(len(routing.load), -1, -1).flatten(0, 1), torch.full_like(routing.load, len(x_TD)), None
        permutation = sort_by_expert(routing.expert, len(routing.load), equal_groups(routing))
        return permute(x_TD, permutation), permutation.counts_E, permutation

    def combine(self, rows_RD: Tensor, routing: Routing, handle: Any) -> Tensor:
        """See `Dispatcher`."""
        if handle is None:
            tokens = torch.arange(len(routing.expert), device=rows_RD.device).unsqueeze(1)
            rows_TKD = rows_RD.unflatten(0, (len(routing.load), -1))[routing.expert, tokens]
            return (rows_TKD * routing.weight.unsqueeze(-1)).sum(1).to(rows_RD.dtype)
        return unpermute(rows_RD, routing.weight, handle)


def every_expert(routing: Routing) -> bool:
    """Whether all experts compute all tokens and the sum takes what was chosen: for a few tokens, cheaper than sorting them.

    On CPU, if at most four times the weights that are needed anyway are read.
    """
    (tokens, chosen), experts = routing.expert.shape, len(routing.load)
    few = tokens * experts <= EVERY_EXPERT_ROWS and experts <= 4 * chosen
    return few and routing.expert.device.type == "cpu" and not torch.is_grad_enabled()


def equal_groups(routing: Routing) -> int:
    """What the rows of every expert are padded to a multiple of; 0 for no padding.

    On CPU, where products of one shape are cheapest, if there is enough work and padding at most doubles it.
    """
    rows, experts = routing.expert.numel(), len(routing.load)
    if routing.expert.device.type != "cpu" or rows < EQUAL_GROUP * experts:
        return 0
    return EQUAL_GROUP if int(routing.load.max()) * experts <= 2 * rows else 0


class Experts(nn.Module):
    """The routed experts, stacked: gate and up side by side in `gate_up_proj` [E, 2I, D], `down_proj` [E, D, I]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert's SwiGLU on its rows: [R, D] -> [R, D]."""
        return grouped_linear(swiglu(grouped_linear(rows_RD, self.gate_up_proj, counts_E)), self.down_proj, counts_E)


class DeepSeekMoE(nn.Module):
    """Shared experts see every token, routed experts those that chose them (equation 12). No token is ever dropped."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.dispatcher = dispatcher
