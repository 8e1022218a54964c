"""The whole network: embedding, blocks, final norm, head, and the MTP modules; forward pass and losses.

Legend: B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3.errors import UserError
from dsv3.model.attention import Cache, MultiHeadLatentAttention
from dsv3.model.block import Block, Pass
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Dispatcher, Experts, Gate, LocalDispatcher, Routing, SwiGLU
from dsv3.model.linear import Linear, RMSNorm
from dsv3.model.mtp import MultiTokenPrediction
from dsv3.model.recompute import Recomputation
from dsv3.model.rope import Rope
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy
from dsv3.precision.deferred import WeightGradients
from dsv3.precision.feed_forward import FeedForward
from dsv3.precision.projection import Projection
from dsv3.precision.scaling import QUANTIZERS, Scaling

FP8_MULTIPLE = 16
"""Elements: tensor cores read FP8 matrices in pieces of 16 bytes."""


@dataclass
class Output:
    """What a forward pass gives."""

    hidden: Tensor
    """[B, T, D] after the final norm."""
    head: Linear
    routing: dict[str, Routing] = field(default_factory=dict)
    """By the name of the MoE block."""

    @cached_property
    def logits(self) -> Tensor:
        """[B, T, V], computed on first access."""
        return self.head(self.hidden)


@dataclass
class Losses:
    """The losses of one micro-batch. `total` is for backward; the others are for reading and carry no gradient."""

    total: Tensor
    """The main loss plus lambda / D times the sum of the MTP losses. Balance losses join in the backward pass alone."""
    main: Tensor
    """Cross-entropy of the next token, nats."""
    mtp: list[Tensor]
    """Equation (24) for each depth: the sum divided by T, not by the T - k terms."""
    balance: Tensor
    """The balance loss without alpha, summed over blocks; 0 when it is off."""
    load: dict[str, Tensor]
    """int64 [E] by MoE block: assignments to each expert."""
    frequency: dict[str, Tensor]
    """FP32 [E] by MoE block: f of equation (18) over all tokens; empty when the balance loss is off."""


class DeepSeekV3(nn.Module):
    """A DeepSeek-V3 model. `compute_dtype` is what activations have; weights keep their own dtype and are cast on use.

    Parameters are uninitialised: call `initialize`, or load weights.
    """

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype | None = None, dispatcher: Dispatcher | None = None
    ):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recomputation: Recomputation | None = None
        dispatcher = dispatcher or LocalDispatcher()
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size)
        )
        self.layers: Sequence[Block] = module_list(
            Block(config, str(i), i < config.first_k_dense_replace, dispatcher) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp: Sequence[MultiTokenPrediction] = module_list(
            MultiTokenPrediction(config, k, dispatcher) for k in range(config.num_nextn_predict_layers)
        )

    def blocks(self) -> Iterator[Block]:
        """Every Transformer block, those of the MTP modules included: what is done per layer walks this."""
        yield from self.layers
        yield from (module.block for module in self.mtp)

    def held_experts(self) -> dict[nn.Parameter, range]:
        """Every stack of experts, and which of all experts are on this rank."""
        return {
            parameter: module.held
            for module in self.modules()
            if isinstance(module, Experts)
            for parameter in module.parameters()
        }

    def initialize(self, std: float | Literal["fan_in"] | None = None, seed: int = 0) -> "DeepSeekV3":
        """Normal weights: one `std` for all (the report: 0.006; None: the config's `initializer_range`), or 1 / sqrt(inputs).

        Norm gains become 1 and routing biases 0. The values depend on the seed alone. With "fan_in" the projections
        that write to the residual stream are divided by sqrt(2 blocks), and the embedding and the head get 1 and
        1 / sqrt(inputs). Experts have the same values on whatever rank they are.
        """
        std = self.config.initializer_range if std is None else std
        generator = torch.Generator().manual_seed(seed)
        held = self.held_experts()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            scale = std if std != "fan_in" else fan_in_std(name, parameter, len(self.layers))
            here = held.get(parameter, range(len(parameter)))
            whole = self.config.n_routed_experts if parameter in held else len(parameter)
            values = torch.empty(whole, *parameter.shape[1:]).normal_(0.0, scale, generator=generator)
            with torch.no_grad():
                parameter.copy_(values[here.start : here.stop])
        for block in self.blocks():
            if block.moe is not None:
                block.moe.gate.e_score_correction_bias.zero_()
        return self

    def recompute(self, kinds: Collection[str]) -> None:
        """Has the backward pass of `loss` compute again what it would otherwise keep; the result stays the same to the bit.

        `norms`: the outputs of RMSNorm (the router's FP32 copy of one among them), `mla_up`: queries, keys and values made
        from MLA's latents (report, section 3.2.3), `swiglu`: the inputs of the feed-forward's last product (section 3.3.3).
        """
        self.recomputation = Recomputation() if kinds else None
        parts = {"norms": (RMSNorm, Gate), "mla_up": (MultiHeadLatentAttention,), "swiglu": (SwiGLU, Experts)}
        for kind, types in parts.items():
            for module in self.modules():
                if isinstance(module, types):
                    module.recomputation = self.recomputation if kind in kinds else None

    def compute_in_fp8(self, gradients: WeightGradients | None = None, scaling: Scaling = "tiles") -> "DeepSeekV3":
        """Has the linear layers of attention and feed-forward compute in FP8, as the report trains them (section 3.3).

        Weights stay in their dtype, the others (embedding, head, router, norms, MTP's `eh_proj`, attention itself) compute as
        before. `gradients` is what may defer the gradients of these layers' weights, `scaling` what one scale covers. Raises `UserError` for weights already
        in FP8, which cannot be trained, and for sizes that no FP8 product takes.
        """
        gradients, quantizers = gradients or WeightGradients(), QUANTIZERS[scaling]
        for block in self.blocks():
            refuse_sizes(block)
            attention = block.self_attn
            attention.inputs_fp8 = Projection(attention.input_layers, gradients, quantizers=quantizers)
            ups = (
                [attention.kv_b_proj] if self.config.q_lora_rank is None else [attention.kv_b_proj, attention.q_b_proj]
            )
            for layer in ups:
                layer.fp8 = Projection([layer], gradients, quantizers=quantizers)
            attention.o_proj.fp8 = Projection([attention.o_proj], gradients, True, quantizers)
            for module in block.modules():
                if isinstance(module, SwiGLU | Experts):
                    module.fp8 = FeedForward(gradients, isinstance(module, Experts), quantizers)
        return self

    def refresh_fp8(self) -> None:
        """Has the FP8 copies of weights made where a weight changed, in the memory of those before; nothing waits for it."""
        for module in self.modules():
            for name in ("fp8", "inputs_fp8"):
                layer = getattr(module, name, None)
                for cache in () if layer is None else layer.caches:
                    cache.refresh()

    def embed(self, tokens: Tensor) -> Tensor:
        """int [B, T] -> [B, T, D] in the compute dtype."""
        x = self.embed_tokens(tokens)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] after the final norm -> logits [..., V]."""
        return self.lm_head(hidden)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """int [B, T] -> the main model's `Output`. Positions default to 0 .. T-1; see `Pass` for segments and cache."""
        positions = default_positions(tokens) if positions is None else positions
        return self.run(tokens, Pass(Rope.at(self.config, positions), segment_ids, cache))

    def run(self, tokens: Tensor, shared: Pass) -> Output:
        """The main model on one pass."""
        x = self.embed(tokens)
        output = Output(x, self.lm_head)
        for block in self.layers:
            x, routing = block(x, shared)
            if routing is not None:
                output.routing[block.name] = routing
        output.hidden = self.norm(x)
        return output

    def loss(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mtp_weight: float = 0.0,
        balance_alpha: float = 0.0,
        batch_wise: bool = False,
        frequency: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
        divisor: float | Tensor | None = None,
    ) -> Losses:
        """The losses of rows of T + 1 tokens (int [B, T + 1]): T are read, T predicted.

        `valid` (bool [B, T + 1]) excludes tokens as targets, for instance padding; with `segment_ids` (int [B, T + 1])
        the first token of a document is no target either. `divisor` is the number of targets that the main loss is
        divided by, this micro-batch's own by default; equation (24) divides every MTP loss by the same. `scale`
        multiplies all gradients, the balance loss's too: with gradient accumulation, one over the number of
        micro-batches, and `divisor` the whole batch's targets divided by that number. `mtp_weight` is lambda (0 leaves
        the MTP modules out). `balance_alpha` is alpha, of the sequence-wise balance loss, or of the batch-wise one
        (section 4.5.3), whose f and P are taken over all tokens together. Where these rows are one micro-batch of several,
        `frequency` holds f of the whole batch (the mean of what `Losses.frequency` says of each): then the micro-batches'
        gradients and losses are exactly the whole batch's. Raises `UserError` for rows too short for the deepest MTP
        module.
        """
        inputs = tokens[:, :-1]
        if mtp_weight > 0 and inputs.shape[1] <= len(self.mtp):
            raise UserError(
                f"rows of {tokens.shape[1]} tokens: MTP depth {len(self.mtp)} needs at least {len(self.mtp) + 2}"
            )
        positions = default_positions(inputs) if positions is None else positions[:, :-1]
        segments = None if segment_ids is None else segment_ids[:, :-1]
        rope = Rope.at(self.config, positions)
        shared = Pass(rope, segments, None, balance_alpha * scale, batch_wise, frequency or {})
        watching = nullcontext() if self.recomputation is None else self.recomputation.watching()
        with watching:
            return self.losses(tokens, inputs, shared, valid, segment_ids, mtp_weight, scale, divisor)

    def losses(
        self, tokens: Tensor, inputs: Tensor, shared: Pass, valid: Tensor | None, segment_ids: Tensor | None,
        mtp_weight: float, scale: float, divisor: float | Tensor | None,
    ) -> Losses:  # fmt: skip
        """`loss` of checked rows."""
        rope, segments = shared.rope, shared.segment_ids
        output = self.run(inputs, shared)
        target = targets(tokens, 1, valid, segment_ids)
        count = float((target != IGNORE).sum().clamp(min=1)) if divisor is None else divisor
        main = linear_cross_entropy(output.hidden.flatten(0, 1), self.lm_head.weight, target.flatten(), count)
        total, mtp, hidden, routings = main, [], output.hidden, dict(output.routing)
        length = inputs.shape[1]
        for module in self.mtp if mtp_weight > 0 else []:
            k = module.depth + 1
            shorter = None if segments is None else segments[:, : length - k]
            part = replace(shared, rope=rope[: length - k], segment_ids=shorter)
            hidden, routing = module(hidden[:, : length - k], self.embed(inputs[:, k:]), part)
            routings[module.block.name] = routing
            target = targets(tokens, k + 1, valid, segment_ids)
            loss = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, target.flatten(), count)
            total = total + loss * (mtp_weight / len(self.mtp))
            mtp.append(loss.detach())
        balances = [each.balance for each in routings.values() if each.balance is not None]
        balance = torch.stack(balances).sum() if balances else torch.zeros((), device=tokens.device)
        load = {name: each.load for name, each in routings.items()}
        counted = {name: each.frequency for name, each in routings.items() if each.frequency is not None}
        return Losses(total * scale, main.detach(), mtp, balance, load, counted)


def module_list(modules: Iterable[nn.Module]) -> Any:
    """A ModuleList that the type checker lets us call a sequence of what it holds."""
    return nn.ModuleList(modules)


def refuse_sizes(block: Block) -> None:
    """`UserError` where FP8 products cannot train a block's linear layers."""
    for name, weight in block.named_parameters():
        if weight.dim() == 1 or name.endswith("gate.weight"):
            continue
        where = f"{name} of block {block.name}"
        if weight.dtype == torch.float8_e4m3fn:
            raise UserError(f"{where} is in FP8 already, and cannot be trained: load it with dtype='bf16' or 'fp32'")
        if odd := [size for size in weight.shape[-2:] if size % FP8_MULTIPLE]:
            raise UserError(
                f"{where} is {list(weight.shape)}: FP8 products need sizes that are multiples of {FP8_MULTIPLE}, and {odd[0]} "
                "is none. Choose other sizes in [model], or training.precision = 'bf16'"
            )


def default_positions(tokens: Tensor) -> Tensor:
    """0 .. T-1 for every row: int [1, T], which broadcasts."""
    return torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)


def targets(tokens: Tensor, ahead: int, valid: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """The tokens `ahead` of each input position, `IGNORE` where they do not count. [B, T + 1 - ahead]"""
    target = tokens[:, ahead:]
    if valid is not None:
        target = target.masked_fill(~valid[:, ahead:], IGNORE)
    if segment_ids is not None:
        target = target.masked_fill(segment_ids[:, ahead:] != segment_ids[:, :-ahead], IGNORE)
    return target


def fan_in_std(name: str, parameter: Tensor, num_blocks: int) -> float:
    """The scale of `initialize("fan_in")` for one weight."""
    if name == "embed_tokens.weight":
        return 1.0
    std = parameter.shape[-1] ** -0.5
    writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
    return std * (2 * num_blocks) ** -0.5 if writes_residual else std
