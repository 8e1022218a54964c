"""The least time of an inference pass: the bytes it has to read, or its arithmetic, at rates measured in the same run."""

from typing import Literal, NamedTuple

from dsv3.bench.limits import Rates
from dsv3.model.config import ModelConfig
from dsv3.planning.parameters import count_parameters

Bound = Literal["bytes", "products"]


class Least(NamedTuple):
    """Of one pass."""

    milliseconds: float
    bound: Bound
    """Which of the two takes longer."""
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
    bound: Bound = "bytes" if moving > computing else "products"
    return Least(1000 * max(moving, computing), bound, read, in_fp8 + in_bf16)
