"""The least time that each kind of kernel of a training step needs, and an inference pass: its arithmetic, or the bytes it has
to move, at the rates that a bare product, cuDNN's attention and a copy reach in the same run.

In training, bytes are those of the operations as they are (`precision/`), each reading its inputs and writing its outputs once. Copies and
the additions of weights' gradients have no limit: products could spare them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from dsv3.bench.kernels.attention import HEADS, LENGTH, QUERY, SCALE, VALUE
from dsv3.bench.kernels.products import DENSE_ROWS, dense
from dsv3.bench.ops import measured_copy_rate, times
from dsv3.model.config import ModelConfig
from dsv3.ops.attention import sdpa
from dsv3.planning.parameters import count_parameters

PRODUCT = ("gate + up", 36864, 7168)
"""N and K of the product whose rate is taken, DeepSeek-V3's largest."""


@dataclass(frozen=True)
class Rates:
    """Rates that one GPU reached."""

    bf16: float
    """FLOP/s of a product."""
    fp8: float
    """The same with scales of tiles and blocks."""
    copy: float
    """Bytes/s read and written."""
    attention: float
    """Milliseconds of cuDNN's attention of one layer of DeepSeek-V3 on 4,096 tokens, forward and backward."""


def measured_rates() -> Rates:
    """On the current GPU, in about a second."""
    device = torch.device("cuda", torch.cuda.current_device())
    name, across, inner = PRODUCT
    fp8 = dense(device, name, across, inner)
    x, weight = (torch.randn(rows, inner, dtype=torch.bfloat16, device=device) for rows in (DENSE_ROWS, across))
    q, k, v, grad = (
        torch.randn(1, LENGTH, HEADS, width, dtype=torch.bfloat16, device=device).requires_grad_()
        for width in (QUERY, QUERY, VALUE, VALUE)
    )
    works = (
        fp8.ours,
        lambda: torch.mm(x, weight.t()),
        lambda: torch.autograd.grad(sdpa(q, k, v, SCALE), (q, k, v), grad),
    )
    in_fp8, in_bf16, attended = times(works)
    flops = 2e6 * DENSE_ROWS * across * inner
    return Rates(flops / in_bf16, flops / in_fp8, 1e12 * measured_copy_rate(device), attended / 1000)


def limits(config: ModelConfig, tokens: int, precision: Literal["bf16", "fp8"], rates: Rates) -> dict[str, float]:
    """Milliseconds by kind of kernel (`share.KINDS`) of both passes of one micro-batch, the MTP modules included, in sequences of
    4,096 tokens and with heads as wide as DeepSeek-V3's."""
    counted, hidden, depth = count_parameters(config), config.hidden_size, config.num_nextn_predict_layers
    dense_blocks, blocks = config.num_dense_layers, config.num_hidden_layers + depth
    moe_blocks, chosen, heads = blocks - dense_blocks, config.num_experts_per_tok, 1 + depth
    grouped = moe_blocks * chosen * counted.expert
    in_bf16 = heads * counted.embedding + depth * 2 * hidden**2 + moe_blocks * counted.gate
    others = counted.active_with_head + counted.mtp_active + depth * counted.embedding - grouped - in_bf16

    head_elements = config.num_attention_heads * config.qk_head_dim
    own, values = (config.num_attention_heads * each for each in (config.qk_nope_head_dim, config.v_head_dim))
    low = (config.q_lora_rank or 0) + config.kv_lora_rank
    inner = dense_blocks * config.intermediate_size
    inner += moe_blocks * (chosen + config.n_shared_experts) * config.moe_intermediate_size
    shared_rows = blocks if config.n_shared_experts else dense_blocks
    fed = hidden * (shared_rows + moe_blocks * chosen)
    normed = blocks * (2 * hidden + low) + (1 + 3 * depth) * hidden
    fp8 = precision == "fp8"
    moved = {
        # Inputs: to tiles, transposed later. `o_proj`'s: packed and unpacked as well. Gradients: to tiles of both directions.
        "quantise, transpose, 12 bits": fp8 * (
            blocks * (5 * (hidden + low) + 13 * values)
            + blocks * 4 * (low + config.qk_rope_head_dim + head_elements + own + values + hidden)
            + (5 + 4) * fed + (3 + 3 + 4) * 2 * inner + 3 * inner
        ),
        "norms and SwiGLU": (4 + 6) * normed + (5 + 12 if fp8 else 6 + 10) * inner,
        "queries and keys": blocks * 2 * (4 * head_elements + own + head_elements + head_elements + own + 2 * values),
        "router, sort, permute": moe_blocks * 2 * hidden * (3 * (1 + chosen) + 1 + 2 * chosen),
        "cross-entropy": 6 * heads * config.vocab_size,
        # Of what two branches make of the stream: its sum, and the sum of their gradients.
        "elementwise": hidden * (blocks * 24 + moe_blocks * 18),
    }  # fmt: skip
    return {
        "grouped products": 6e3 * tokens * grouped / (rates.fp8 if fp8 else rates.bf16),
        "other products": 6e3 * tokens * (in_bf16 / rates.bf16 + others / (rates.fp8 if fp8 else rates.bf16)),
        "attention": blocks * rates.attention * tokens / LENGTH * config.num_attention_heads / HEADS,
        **{kind: 1e3 * tokens * each / rates.copy for kind, each in moved.items() if each},
    }


class Least(NamedTuple):
    """The least that one pass takes."""

    milliseconds: float
    bound: str
    """Which of the two takes longer: "bytes" or "products"."""
    bytes: float
    flops: float


def experts_read(config: ModelConfig, tokens: int) -> float:
    """How many of E experts some of so many tokens chose, if routing is even: E (1 - (1 - K / E)^tokens)."""
    experts = config.n_routed_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)


def least(config: ModelConfig, tokens: int, context: int, rates: Rates) -> Least:
    """Of a pass over `tokens` sequences with so many tokens each in the cache, one token each; `context` 0: over a prompt of `tokens`.

    Weights in FP8 are read once (of the experts those that some token chose), router and head in BF16, and what the cache holds.
    Arithmetic of weights in FP8 goes at the rate of FP8, that of the others and of attention at BF16's: absorbed attention multiplies
    with latents, the expanded form of a prompt with keys and values.
    """
    counted, layers, dense = count_parameters(config), config.num_hidden_layers, config.num_dense_layers
    moe, hidden, heads = layers - dense, config.hidden_size, config.num_attention_heads
    shared = config.n_shared_experts * counted.expert
    always = layers * counted.attention + dense * 3 * hidden * config.intermediate_size + moe * shared
    entry = config.kv_lora_rank + config.qk_rope_head_dim
    read = always + moe * experts_read(config, tokens) * counted.expert
    read += 2 * (moe * counted.gate + counted.embedding) + 2 * layers * tokens * max(context, 1) * entry
    in_fp8 = 2 * tokens * (always + moe * config.num_experts_per_tok * counted.expert)
    if context:
        pairs, a_pair, rows = tokens * context, entry + config.kv_lora_rank, tokens
    else:
        pairs, a_pair, rows = tokens * (tokens + 1) // 2, config.qk_head_dim + config.v_head_dim, 1
    in_bf16 = 2 * (tokens * moe * counted.gate + rows * counted.embedding + layers * heads * pairs * a_pair)
    moving, computing = read / rates.copy, in_fp8 / rates.fp8 + in_bf16 / rates.bf16
    bound = "bytes" if moving > computing else "products"
    return Least(1000 * max(moving, computing), bound, read, in_fp8 + in_bf16)
