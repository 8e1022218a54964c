"""One Transformer block, written as five phases so that an executor can alternate between two micro-batches.

attend (compute) -> dispatch (communication) -> experts (compute) -> combine (communication) -> merge (compute)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dsv3.model.attention import Cache, MultiHeadLatentAttention
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import DeepSeekMoE, Dispatcher, Routing, SwiGLU
from dsv3.model.linear import RMSNorm


@dataclass(frozen=True)
class Pass:
    """The arguments that all blocks share in one forward pass."""

    rope: Tensor
    """complex64 [B or 1, T, F]: see `dsv3.model.rope.rotations`."""
    segment_ids: Tensor | None = None
    """int [B, T]: tokens see their own document only; None: all earlier ones of the row."""
    cache: Cache | None = None
    balance_weight: float = 0.0
    """The factor of the balance loss in backward: alpha times this micro-batch's share of its batch."""
    batch_wise: bool = False
    """Whether the balance loss is taken over all tokens together, or over each sequence."""
    frequency: Mapping[str, Tensor] = field(default_factory=dict)
    """For the batch-wise loss: f of the whole batch by MoE block (FP32 [E]), where this pass is only a part of it."""


@dataclass
class Carry:
    """The state between phases."""

    residual: Tensor
    """[B, T, D]: the stream after attention."""
    normed: Tensor
    """[B, T, D]: the feed-forward's input."""
    routing: Routing | None = None
    parcel: Any = None
    """On the way to the experts: see `Dispatcher.pack`."""
    rows: Tensor | None = None
    """On the way back from them: see `Dispatcher.pack_back`."""
    handle: Any = None
    """See `Dispatched`."""
    aligned: bool = False
    """Whether the dispatcher was asked to pad the experts' rows."""
    update: Tensor | None = None
    """[B, T, D]: what the feed-forward adds to the stream."""


class Block(nn.Module):
    """`x += attention(norm(x)); x += feed_forward(norm(x))`. Dense blocks have empty communication phases."""

    def __init__(self, config: ModelConfig, name: str, dense: bool, dispatcher: Dispatcher):
        super().__init__()
        self.name = name
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, name)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else DeepSeekMoE(config, dispatcher)

    @property
    def moe(self) -> DeepSeekMoE | None:
        """The mixture of experts, or None in a dense block."""
        return self.mlp if isinstance(self.mlp, DeepSeekMoE) else None

    def forward(self, x: Tensor, shared: Pass) -> tuple[Tensor, Routing | None]:
        """[B, T, D] -> ([B, T, D], the routing of a MoE block): the five phases in order."""
        carry = self.attend(x, shared)
        self.dispatch(carry)
        self.experts(carry)
        self.combine(carry)
        return self.merge(carry), carry.routing

    def attend(self, x: Tensor, shared: Pass) -> Carry:
        """Attention, the feed-forward's norm, the router, and `Dispatcher.pack`."""
        x = x + self.self_attn(self.input_layernorm(x), shared.rope, shared.segment_ids, shared.cache)
        carry = Carry(x, self.post_attention_layernorm(x))
        if self.moe is not None:
            parts = 1 if shared.batch_wise else x.shape[0]
            frequency = shared.frequency.get(self.name)
            tokens = carry.normed.flatten(0, 1)
            carry.routing = self.moe.gate(tokens, parts, shared.balance_weight, frequency)
            alignment = self.moe.experts.alignment(carry.routing.expert.numel())
            carry.parcel, carry.aligned = self.moe.dispatcher.pack(tokens, carry.routing, alignment), alignment > 0
        return carry

    def dispatch(self, carry: Carry) -> None:
        """Tokens travel to their experts."""
        if self.moe is not None:
            carry.parcel = self.moe.send(carry.parcel)

    def experts(self, carry: Carry) -> None:
        """The routed experts on the rows received; shared experts, or the dense feed-forward, on this rank's tokens."""
        if self.moe is None:
            carry.update = self.mlp(carry.normed)
            return
        rows, weight, counts, carry.handle = self.moe.dispatcher.unpack(carry.parcel)
        carry.parcel = None
        carry.rows = self.moe.dispatcher.pack_back(self.moe.experts(rows, counts, weight, carry.aligned), carry.handle)
        if self.moe.shared_experts is not None:
            carry.update = self.moe.shared_experts(carry.normed)

    def combine(self, carry: Carry) -> None:
        """Rows travel back."""
        if self.moe is not None and carry.rows is not None:
            carry.rows = self.moe.dispatcher.send_back(carry.rows, carry.handle)

    def merge(self, carry: Carry) -> Tensor:
        """Sums the rows that came back, and adds the feed-forward's update to the stream."""
        if self.moe is not None and carry.rows is not None:
            routed = self.moe.dispatcher.unpack_back(carry.rows, carry.handle).view_as(carry.normed)
            carry.update = routed if carry.update is None else carry.update + routed
        assert carry.update is not None, "merge comes after experts and combine"
        return carry.residual + carry.update
