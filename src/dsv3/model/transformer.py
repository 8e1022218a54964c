"""The whole network: embedding, blocks, final norm, head, and the MTP modules; forward pass and losses.

Legend: B sequences, T tokens, D hidden, V vocabulary.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dsv3.errors import UserError
from dsv3.model.attention import Cache, MultiHeadLatentAttention
from dsv3.model.block import Block, Pass
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Dispatcher, Experts, LocalDispatcher, Routing, SwiGLU
from dsv3.model.linear import Embedding, Linear, RMSNorm
from dsv3.model.micro_batch import MicroBatch, default_positions
from dsv3.model.mtp import MultiTokenPrediction
from dsv3.model.recompute import Recomputation
from dsv3.model.rope import rotations
from dsv3.precision.deferred import WeightGradients
from dsv3.precision.feed_forward import FeedForward
from dsv3.precision.projection import Projection
from dsv3.precision.scaling import QUANTIZERS, Scaling
from dsv3.precision.split import Split

FP8_MULTIPLE = 16
"""Elements: tensor cores read FP8 matrices in pieces of 16 bytes."""


@dataclass
class Output:
    """The result of a forward pass."""

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
    """The losses of one micro-batch. `total` is for backward; the others carry no gradient."""

    total: Tensor
    """The main loss plus lambda / D times the sum of the MTP losses. Balance losses are added in the backward pass only."""
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
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size)
        )
        dense = config.num_dense_layers
        layers = (Block(config, str(i), i < dense, dispatcher) for i in range(config.num_hidden_layers))
        # The type checker does not know that a ModuleList is a sequence of its modules.
        self.layers = cast(Sequence[Block], nn.ModuleList(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        modules = (MultiTokenPrediction(config, k, dispatcher) for k in range(config.num_nextn_predict_layers))
        self.mtp = cast(Sequence[MultiTokenPrediction], nn.ModuleList(modules))

    def blocks(self) -> Iterator[Block]:
        """Every Transformer block, those of the MTP modules included: everything done per layer walks this."""
        yield from self.layers
        yield from (module.block for module in self.mtp)

    def held_experts(self) -> dict[nn.Parameter, range]:
        """Every stack of experts, and which of the experts this rank holds."""
        return {
            parameter: module.held
            for module in self.modules()
            if isinstance(module, Experts)
            for parameter in module.parameters()
        }

    def matrices(self) -> set[nn.Parameter]:
        """Every weight that passes read in the compute dtype: all but gains of norms and the routers', which they read in FP32."""
        routers = {block.moe.gate.weight for block in self.blocks() if block.moe is not None}
        return {each for each in self.parameters() if each.dim() > 1 and each not in routers}

    def initialize(self, std: float | Literal["fan_in"] | None = None, seed: int = 0) -> "DeepSeekV3":
        """Normal weights: one `std` for all (the report: 0.006; None: the config's `initializer_range`), or 1 / sqrt(inputs).

        Norm gains become 1 and routing biases 0. With "fan_in" the projections that write to the residual stream are
        divided by sqrt(2 blocks), and the embedding and the head get 1 and 1 / sqrt(inputs). A weight's values depend only on
        the seed and its name: they are the same on every rank and in every layout.
        """
        std = self.config.initializer_range if std is None else std
        generator, held = torch.Generator(), self.held_experts()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            scale = std if std != "fan_in" else fan_in_std(name, parameter, self.config.num_hidden_layers)
            here = held.get(parameter, range(len(parameter)))
            whole = self.config.n_routed_experts if parameter in held else len(parameter)
            generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
            values = torch.empty(whole, *parameter.shape[1:]).normal_(0.0, scale, generator=generator)
            with torch.no_grad():
                parameter.copy_(values[here.start : here.stop])
        for block in self.blocks():
            if block.moe is not None:
                block.moe.gate.e_score_correction_bias.zero_()
        return self

    def recompute(self, kinds: Collection[str]) -> None:
        """Has the backward pass of `loss` recompute activations in place of keeping them; the result stays the same to the bit.

        `norms`: the outputs of RMSNorm; `mla_up`: queries, keys and values made from MLA's latents (report, section 3.2.3);
        `swiglu`: the inputs of the feed-forward's last product (section 3.3.3).
        """
        self.recomputation = Recomputation() if kinds else None
        parts: dict[str, tuple[type[RMSNorm | MultiHeadLatentAttention | SwiGLU | Experts], ...]] = {
            "norms": (RMSNorm,),
            "mla_up": (MultiHeadLatentAttention,),
            "swiglu": (SwiGLU, Experts),
        }
        for kind, types in parts.items():
            for module in self.modules():
                if isinstance(module, types):
                    module.recomputation = self.recomputation if kind in kinds else None

    def compute_in_fp8(self, gradients: WeightGradients | None = None, scaling: Scaling = "tiles") -> "DeepSeekV3":
        """Has the linear layers of attention and feed-forward compute in FP8, as the report trains them (section 3.3).

        Weights stay in their dtype; embedding, head, router, norms, MTP's `eh_proj` and attention itself compute as before.
        `gradients` may defer these layers' weight gradients; `scaling` is what one scale covers. Raises `UserError` for weights
        already in FP8, which cannot be trained, and for sizes that no FP8 product takes.
        """
        gradients, quantizers = gradients or WeightGradients(), QUANTIZERS[scaling]
        for block in self.blocks():
            refuse_sizes(block)
            attention = block.self_attn
            attention.inputs_fp8 = Projection(attention.input_layers, gradients, quantizers=quantizers)
            for layer in (attention.kv_b_proj, getattr(attention, "q_b_proj", None)):
                if layer is not None:
                    layer.fp8 = Projection([layer], gradients, quantizers=quantizers)
            attention.o_proj.fp8 = Projection([attention.o_proj], gradients, True, quantizers)
            for module in block.modules():
                if isinstance(module, SwiGLU | Experts):
                    module.fp8 = FeedForward(gradients, isinstance(module, Experts), quantizers)
        return self

    def refresh_fp8(self) -> None:
        """Updates the FP8 copies of changed weights in place, without waiting for the device."""
        for module in self.modules():
            for name in ("fp8", "inputs_fp8"):
                layer = getattr(module, name, None)
                for cache in () if layer is None else layer.caches:
                    cache.refresh()

    def defer_weight_gradients(self, gradients: WeightGradients) -> None:
        """Lets `gradients` defer the weight gradients of linear layers in FP32 and BF16; those of embedding, head, router and norms
        are computed with their input's."""
        for module in self.modules():
            if isinstance(module, Linear | SwiGLU):
                module.split = Split(gradients)
            elif isinstance(module, Experts):
                module.splits = Split(gradients), Split(gradients)

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
        return self.run(tokens, Pass(rotations(self.config, positions), segment_ids, cache))

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

    def loss(self, tokens: Tensor, **options: Any) -> Losses:
        """The losses of rows of T + 1 tokens (int [B, T + 1]): T are read, T predicted. See `MicroBatch.of` for the options."""
        return self.losses(MicroBatch.of(self.config, tokens, **options))

    def losses(self, rows: MicroBatch) -> Losses:
        """`loss` of rows that are ready."""
        with self.watching():
            output = self.run(rows.inputs, rows.shared)
            main = rows.loss(output.hidden, self.lm_head.weight, 1)
            total, mtp, hidden, routings = main, [], output.hidden, dict(output.routing)
            for module in self.mtp if rows.mtp_weight > 0 else []:
                states, embeddings, shared = self.deeper(module, hidden, rows)
                hidden, routing = module(states, embeddings, shared)
                routings[module.block.name] = routing
                loss = rows.loss(hidden, self.lm_head.weight, module.depth + 2)
                total = total + loss * (rows.mtp_weight / len(self.mtp))
                mtp.append(loss.detach())
        balance, load, frequency = count(routings)
        balance = torch.zeros((), device=main.device) if balance is None else balance
        return Losses(total * rows.scale, main.detach(), mtp, balance, load, frequency)

    def deeper(self, module: MultiTokenPrediction, hidden: Tensor, rows: MicroBatch) -> tuple[Tensor, Tensor, Pass]:
        """An MTP module's inputs, from the normed states of the depth before it: (states, embeddings, pass)."""
        ahead, shared = module.depth + 1, rows.shorter(module.depth + 1)
        embeddings = self.embed(rows.inputs[:, ahead:])
        return hidden[:, : embeddings.shape[1]], embeddings, shared

    def watching(self, part: bool = False) -> AbstractContextManager[None]:
        """A context for a forward pass (or a `part` of one) whose backward pass recomputes what `recompute` says."""
        return nullcontext() if self.recomputation is None else self.recomputation.watching(part)


def count(routings: Mapping[str, Routing]) -> tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor]]:
    """The balance losses' sum (None when they are off), load and frequency by block: see `Losses`."""
    balances = [each.balance for each in routings.values() if each.balance is not None]
    load = {name: each.load for name, each in routings.items()}
    frequency = {name: each.frequency for name, each in routings.items() if each.frequency is not None}
    return torch.stack(balances).sum() if balances else None, load, frequency


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


def fan_in_std(name: str, parameter: Tensor, num_blocks: int) -> float:
    """The scale of `initialize("fan_in")` for one weight."""
    if name == "embed_tokens.weight":
        return 1.0
    std = parameter.shape[-1] ** -0.5
    writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
    return std * (2 * num_blocks) ** -0.5 if writes_residual else std
