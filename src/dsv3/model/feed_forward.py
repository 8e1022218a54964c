"""Feed-forward layers: dense SwiGLU, and DeepSeekMoE (report, section 2.1.2) with its router and experts.

Legend: B sequences, T tokens, D hidden, E experts, K experts per token, R = T K rows, I inner elements of an expert.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.model.config import ModelConfig
from dsv3.model.linear import Linear, fp8_storage
from dsv3.model.recompute import Recomputation
from dsv3.ops.block_scaled import dequantize
from dsv3.ops.cast import cast
from dsv3.ops.grouped_linear import grouped_linear, segments
from dsv3.ops.linear_fp32 import linear_fp32
from dsv3.ops.permute import Permutation, count_by_expert, permute, sort_by_expert, unpermute
from dsv3.ops.rooms import Rooms, assign_rooms, quantize_to_rooms, room_for
from dsv3.ops.router import add_loss, balance_loss, expert_frequency, select_experts
from dsv3.ops.swiglu import swiglu
from dsv3.precision.feed_forward import FeedForward
from dsv3.precision.products import row_alignment
from dsv3.precision.split import Split
from dsv3.precision.stored import (
    IN_ROOMS,
    Blocks,
    Once,
    Stored,
    experts_in_groups,
    experts_in_rooms,
    feed_forward,
    in_fp8,
    stacked_scale,
)


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.recomputation: Recomputation | None = None
        self.fp8: FeedForward | None = None
        self.split: Split | None = None
        self.gate_up_stored = Stored(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; gate and up in one product, unless copying their weights would cost more than it saves."""
        if self.fp8 is not None:
            return self.fp8(x, (self.gate_proj.weight, self.up_proj.weight), self.down_proj.weight)
        if self.gate_up_stored.serves(x) and self.down_proj.stored.serves(x):
            return feed_forward(x, self.gate_up_stored, self.down_proj.stored)
        if x.numel() < FEW_ROWS * x.shape[-1]:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        if self.split is not None:
            gate_up = self.split(x, (self.gate_proj.weight, self.up_proj.weight))
        else:
            gate_up = F.linear(x, torch.cat((self.gate_proj.weight_in(x.dtype), self.up_proj.weight_in(x.dtype))))
        return self.down_proj(activated(gate_up, self.recomputation))


def activated(gate_up: Tensor, recomputation: Recomputation | None, *weight_R: Tensor) -> Tensor:
    """`swiglu`, recomputed in backward with a `recomputation`."""
    return swiglu(gate_up, *weight_R) if recomputation is None else recomputation(swiglu, gate_up, *weight_R)


FEW_ROWS = 64
"""From about so many rows on, `SwiGLU` is faster with one product of twice the size than with two."""
EQUAL_GROUP = 64
"""Rows; see `equal_groups`."""
EVERY_EXPERT_ROWS = 128
"""See `every_expert`."""
EVERY_EXPERT_HIDDEN = 256
"""Hidden size up to which a single token goes to all experts too: reading all weights takes less time than choosing."""


@dataclass(frozen=True)
class Routing:
    """The router's choice for the tokens of one pass through one block."""

    expert: Tensor
    """int64 [T, K]."""
    weight: Tensor
    """FP32 [T, K]; gradients flow through it."""
    num_experts: int
    """E."""
    balance: Tensor | None
    """FP32 scalar: the balance loss without its factor; None when it is off."""
    frequency: Tensor | None
    """FP32 [E]: f of equation (18) over all tokens of the pass; None when the balance loss is off."""

    @cached_property
    def load(self) -> Tensor:
        """int64 [E]: assignments to each expert, for the bias update and the metrics."""
        return count_by_expert(self.expert.flatten(), self.num_experts)


class Gate(nn.Module):
    """The router; `e_score_correction_bias` (FP32 [E]) is no parameter: `training/balance.py` moves it (section 2.1.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, num_parts: int, balance_weight: float, frequency_E: Tensor | None = None
    ) -> Routing:
        """Affinities and selection in FP32. With `balance_weight` > 0, backward adds that times the balance loss.

        The loss is taken over each of `num_parts` equal parts of the tokens; its f is counted there, or is `frequency_E`.
        """
        config = self.config
        affinity = linear_fp32(x_TD, self.weight).sigmoid()
        balance = frequency = None
        if balance_weight > 0:
            frequency_PE = expert_frequency(affinity, num_parts, config.num_experts_per_tok)
            frequency = frequency_PE.mean(0)
            balance = balance_loss(affinity, frequency_PE if frequency_E is None else frequency_E.unsqueeze(0))
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
        balance = None if balance is None else balance.detach()
        return Routing(expert, weight, config.n_routed_experts, balance, frequency)


class Dispatcher(Protocol):
    """Carries tokens to their experts and back, each in three steps. The local one is below; `parallel/` hands in those across GPUs.

    `send` and `send_back` are a block's communication phases. The other steps belong to the compute phases before and after, and
    do nothing by default.
    """

    def held(self, experts: int) -> range:
        """Which of a block's experts are on this rank."""

    def pack(self, x_TD: Tensor, routing: Routing, alignment: int = 0) -> Any:
        """The argument of `send`: tuples and dataclasses of tensors. With `alignment` > 0, every expert's rows are to be padded to a
        multiple of it."""
        return x_TD, routing, alignment

    def send(self, parcel: Any) -> Any:
        """Tokens to their experts: the argument of `unpack`."""

    def unpack(self, parcel: Any) -> "Dispatched":
        """What arrived."""
        return Dispatched(*parcel)

    def pack_back(self, rows_RD: Tensor, handle: Any) -> Tensor:
        """The argument of `send_back`."""
        return rows_RD

    def send_back(self, rows: Tensor, handle: Any) -> Tensor:
        """Rows back to their tokens: the argument of `unpack_back`."""

    def unpack_back(self, rows: Tensor, handle: Any) -> Tensor:
        """The sum of each token's rows: [T, D]."""
        return rows

    def dispatch(self, x_TD: Tensor, routing: Routing, alignment: int = 0) -> "Dispatched":
        """The three steps to the experts."""
        return self.unpack(self.send(self.pack(x_TD, routing, alignment)))

    def combine(self, rows_RD: Tensor, handle: Any) -> Tensor:
        """The three steps back."""
        return self.unpack_back(self.send_back(self.pack_back(rows_RD, handle), handle), handle)


class ForAll(NamedTuple):
    """Tokens that every expert computes, in order of experts: R = E T rows."""

    x_TD: Tensor


class Dispatched(NamedTuple):
    """What arrived at a rank's experts."""

    rows: Tensor | Rooms | ForAll
    """[R, D], sorted by expert; or in rooms; or the same for all."""
    weight: Tensor
    """FP32 [R]: each row's weight in its token's sum; gradients flow through it."""
    counts: Tensor
    """int64 [E of this rank]: rows of each expert; of a room, the rows in use."""
    handle: Any
    """For the way back."""


class LocalDispatcher(Dispatcher):
    """All experts are here: dispatch is a permutation."""

    def held(self, experts: int) -> range:
        """See `Dispatcher`."""
        return range(experts)

    def send(self, parcel: tuple[Tensor, Routing, int]) -> Dispatched:
        """See `Dispatcher`. Without gradients, few tokens are not sorted, which would cost more than it saves: a single token keeps
        its order, and where that is faster all experts compute all tokens, with weight 0 where they were not chosen."""
        x_TD, routing, alignment = parcel
        (tokens, hidden), chosen, experts = x_TD.shape, routing.expert.shape[1], routing.num_experts
        few = not torch.is_grad_enabled()
        if few and x_TD.device.type == "cpu" and every_expert(tokens, hidden, experts, chosen):
            weight_TE = torch.zeros(tokens, experts).scatter(1, routing.expert, routing.weight)
            return Dispatched(ForAll(x_TD), weight_TE.t().flatten(), torch.full((experts,), tokens), tokens)
        if few and tokens == 1:
            return Dispatched(x_TD.expand(chosen, -1), routing.weight[0], routing.load, tokens)
        equal = 0 if alignment else equal_groups(routing)
        to = sort_by_expert(routing.expert, routing.num_experts, equal, alignment)
        return Dispatched(permute(x_TD, to), to.by_row(routing.weight), to.counts_E, to)

    def to_rooms(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """`send` of few tokens in FP8: quantised once, each row written to the rooms of its token's experts."""
        room, experts = room_for(len(x_TD)), routing.num_experts
        row_TK, weight_R, counts_E = assign_rooms(routing.expert, routing.weight, experts, room)
        rows = Rooms(quantize_to_rooms(x_TD, row_TK, experts * room), room)
        # `send_back` reads the rows of tokens alone.
        return Dispatched(rows, weight_R, counts_E, Permutation(row_TK.new_empty(0), row_TK, counts_E))

    def send_back(self, rows: Tensor, handle: Permutation | int) -> Tensor:
        """See `Dispatcher`; an int is the number of tokens, when every expert in turn computed all of them."""
        if isinstance(handle, int):
            return rows.unflatten(0, (-1, handle)).sum(0)
        return unpermute(rows, handle)


def every_expert(tokens: int, hidden: int, experts: int, chosen: int) -> bool:
    """Whether computing all tokens with every expert pays on the CPU: if it is at most four times the work."""
    few = tokens * experts <= EVERY_EXPERT_ROWS and experts <= 4 * chosen
    return few and (tokens > 1 or hidden <= EVERY_EXPERT_HIDDEN)


def equal_groups(routing: Routing) -> int:
    """The multiple that each expert's rows are padded to; 0 for no padding.

    On a CPU, where products of one shape are cheapest, if there is enough work and padding at most doubles it.
    """
    rows, experts = routing.expert.numel(), routing.num_experts
    if routing.expert.device.type != "cpu" or rows < EQUAL_GROUP * experts:
        return 0
    return EQUAL_GROUP if int(routing.load.max()) * experts <= 2 * rows else 0


class Experts(nn.Module):
    """The routed experts of this rank (`held`), stacked: gate and up side by side in `gate_up_proj` [E, 2I, D], `down_proj`
    [E, D, I]."""

    gate_up_proj_scale_inv: Tensor | None
    down_proj_scale_inv: Tensor | None

    def __init__(self, config: ModelConfig, held: range):
        super().__init__()
        self.held = held
        experts, hidden, inner = len(held), config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.recomputation: Recomputation | None = None
        self.fp8: FeedForward | None = None
        self.splits: tuple[Split, Split] | None = None
        """Of the two products, where weight gradients may be deferred; `fp8` defers its own."""
        self.register_buffer("gate_up_proj_scale_inv", None)
        self.register_buffer("down_proj_scale_inv", None)
        self.scales = Once(stacked_scale), Once(stacked_scale)

    def keep_in_fp8(self) -> None:
        """As for `Linear`. Gate and up have blocks of their own: scales are [E, 2 ceil(I / 128), ceil(D / 128)]."""
        experts, both, hidden = self.gate_up_proj.shape
        self.gate_up_proj, scale = fp8_storage(self.gate_up_proj, (experts, 2, both // 2, hidden))
        self.gate_up_proj_scale_inv = scale.flatten(1, 2)
        self.down_proj, self.down_proj_scale_inv = fp8_storage(self.down_proj, tuple(self.down_proj.shape))

    def alignment(self, rows: int) -> int:
        """The multiple that each expert's rows should be padded to, for so many rows in all; 0 for no padding."""
        return 0 if self.fp8 is None else row_alignment(rows, len(self.down_proj))

    def serves_in_fp8(self, x: Tensor) -> bool:
        """Whether weights are stored in FP8, and products with x are in FP8."""
        up, down = self.gate_up_proj_scale_inv, self.down_proj_scale_inv
        return up is not None and down is not None and in_fp8(x, (self.gate_up_proj, up), (self.down_proj, down))

    def takes_rooms(self, x_TD: Tensor) -> bool:
        """Whether these tokens should come in rooms: few, and products in FP8."""
        return len(x_TD) <= IN_ROOMS and self.serves_in_fp8(x_TD)

    @property
    def stored(self) -> tuple[Blocks, Blocks]:
        """Gate and up, and down, as FP8 products read them."""
        assert self.gate_up_proj_scale_inv is not None
        assert self.down_proj_scale_inv is not None
        of_up, of_down = self.scales
        up = self.gate_up_proj.detach(), of_up.of(self.gate_up_proj_scale_inv)
        return up, (self.down_proj.detach(), of_down.of(self.down_proj_scale_inv))

    def forward(
        self, rows_RD: Tensor | Rooms | ForAll, counts_E: Tensor, weight_R: Tensor, aligned: bool = False
    ) -> Tensor:
        """Each expert's SwiGLU on its rows, times their weights: [R, D] -> [R, D], also of rows in rooms. `aligned`: they are padded
        as `alignment` says."""
        if isinstance(rows_RD, ForAll):
            if self.fp8 is None and self.splits is None and self.gate_up_proj_scale_inv is None:
                return self.on_all(rows_RD.x_TD, weight_R)
            rows_RD = rows_RD.x_TD.repeat(len(self.down_proj), 1)
        if isinstance(rows_RD, Rooms):
            return experts_in_rooms(rows_RD, counts_E, weight_R, *self.stored)
        if self.serves_in_fp8(rows_RD):
            return experts_in_groups(rows_RD, counts_E, weight_R, *self.stored)
        if self.gate_up_proj_scale_inv is not None:
            return self.from_blocks(rows_RD, counts_E, weight_R)
        if self.fp8 is not None:
            return self.fp8(rows_RD, (self.gate_up_proj,), self.down_proj, counts_E, weight_R, aligned)
        if self.splits is not None:
            up, down = self.splits
            gate_up = up(rows_RD, [self.gate_up_proj], counts_E)
            return down(activated(gate_up, self.recomputation, weight_R), [self.down_proj], counts_E)
        gate_up = grouped_linear(rows_RD, self.gate_up_proj, counts_E)
        return grouped_linear(activated(gate_up, self.recomputation, weight_R), self.down_proj, counts_E)

    def on_all(self, x_TD: Tensor, weight_R: Tensor) -> Tensor:
        """Every expert on the same tokens: [E T, D]. Gate and up of all experts are one product, in half the time of a batched one."""
        up, down = (cast(each, x_TD.dtype) for each in (self.gate_up_proj, self.down_proj))
        weight_TE = weight_R.view(len(down), -1).t()
        act_TEI = swiglu(F.linear(x_TD, up.flatten(0, 1)).unflatten(1, (len(down), -1)), weight_TE)
        return torch.bmm(act_TEI.transpose(0, 1), down.mT).flatten(0, 1)

    def from_blocks(self, rows_RD: Tensor, counts_E: Tensor, weight_R: Tensor) -> Tensor:
        """`forward` with FP8 weights dequantised one expert at a time, so that only one is ever held in another dtype."""
        assert self.gate_up_proj_scale_inv is not None
        assert self.down_proj_scale_inv is not None
        out_RD = torch.empty_like(rows_RD)
        for e, start, end in segments(counts_E):
            halves, scales = (
                each[e].unflatten(0, (2, -1)) for each in (self.gate_up_proj, self.gate_up_proj_scale_inv)
            )
            gate_up = dequantize(halves, scales, rows_RD.dtype).flatten(0, 1)
            down = dequantize(self.down_proj[e], self.down_proj_scale_inv[e], rows_RD.dtype)
            act = swiglu(F.linear(rows_RD[start:end], gate_up), weight_R[start:end])
            out_RD[start:end] = F.linear(act, down)
        return out_RD


class DeepSeekMoE(nn.Module):
    """Shared experts see every token, routed experts those that chose them (equation 12). No token is ever dropped."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config, dispatcher.held(config.n_routed_experts))
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.dispatcher = dispatcher

    def send(self, parcel: Any) -> Any:
        """Tokens to their experts, in rooms where these take them: see `Dispatcher.send`."""
        if isinstance(self.dispatcher, LocalDispatcher) and self.experts.takes_rooms(parcel[0]):
            return self.dispatcher.to_rooms(*parcel[:2])
        return self.dispatcher.send(parcel)
