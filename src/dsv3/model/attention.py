"""Multi-head latent attention (report, section 2.1.1), in two forms over one set of weights.

Expanded, for training and prefill: keys and values of every head are computed from the latents.
Absorbed, for decoding: queries are carried into the latent space, so that only latents are cached and read.

Legend: B sequences, T tokens, S cached positions, H heads, N content elements of a head (nope), R rotated elements,
V elements of a value head, C elements of the latent, L = C + R elements of a cache entry, F = B T tokens of a pass over a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv3.model.config import ModelConfig
from dsv3.model.linear import Linear, RMSNorm
from dsv3.model.recompute import Recomputation
from dsv3.ops.attention import attention, attention_behind_context
from dsv3.ops.latent_pages import read_latents
from dsv3.ops.paged_attention import entries_attention, paged_latent_attention
from dsv3.ops.rotary import keys_and_values, rotate_heads, rotated
from dsv3.precision.projection import Projection
from dsv3.precision.stored import Stored


@dataclass(frozen=True, eq=False)
class Expanded:
    """Tokens of a pass whose attention takes the expanded form."""

    rows: slice
    sequences: int = 1
    """How many equally long ones these tokens are, each as a row of its own."""
    segment_ids: Tensor | None = None
    """int [1, tokens]: each token's sequence, if several share the one row; all of them start in this pass."""
    slots: Tensor | None = None
    """int [S]: where the cache holds the sequence up to its last token here, if it started before this pass."""


@dataclass(frozen=True, eq=False)
class Absorbed:
    """Tokens of a pass whose attention takes the absorbed form: the last ones of some sequences, equally many of each."""

    rows: slice
    table: Tensor
    """int32 [B, M]: the pages of each sequence."""
    lengths: Tensor
    """int32 [B]: the tokens of each, those of the pass included; 0 for padding."""
    bias: Tensor | None = None
    """[B, T H, S] of `causal_bias`, where the cache has entries side by side: then `Cache.pages` is [B or more, S, L]."""


class Cache(Protocol):
    """What attention needs of a latent cache: 576 values a token and layer for DeepSeek-V3. `inference/` provides it."""

    parts: Sequence[Expanded | Absorbed]
    """How the tokens of the pass attend, one part after the other; tokens after the last part are padding."""

    def store(self, block: str, latent_FC: Tensor, key_FR: Tensor) -> None:
        """Stores the normed latent and the rotated key of the pass's tokens."""

    def pages(self, block: str) -> Tensor:
        """A layer's entries, as `dsv3.ops.latent_pages` lays them out."""


class MultiHeadLatentAttention(nn.Module):
    """`x [B, T, D] -> [B, T, D]`; parameters carry the released checkpoint's names."""

    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        self.config, self.name = config, name
        heads, eps = config.num_attention_heads, config.rms_norm_eps
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)
        self.inputs_fp8: Projection | None = None
        self.inputs_stored = Stored(*self.input_layers)
        self.recomputation: Recomputation | None = None

    def forward(self, x: Tensor, rope: Tensor, segment_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Causal attention; with `segment_ids` (int [B, T]) within documents; with a cache, over what it holds as well."""
        if self.recomputation is not None and cache is None:
            return self.o_proj(self.recomputed(x, rope, segment_ids, self.recomputation).flatten(2))
        q, kv = self.inputs(x)
        q = self.queries(q)
        latent, key = self.latents(kv, rope)
        if cache is None:
            out = self.expanded(rotate_heads(q, rope), latent, key, segment_ids)
        else:
            out = self.cached(rotate_heads(q, rope).flatten(0, 1), latent.flatten(0, 1), key.flatten(0, 1), cache)
        return self.o_proj(out.flatten(-2).view(*x.shape[:-1], -1))

    def expanded(self, q: Tensor, latent: Tensor, key: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """[B, T, H, V] from rotated queries [B, T, H, N + R], latents [B, T, C] and rotated keys [B, T, R]."""
        k, v = self.keys_and_values(self.kv_b_proj(latent), key)
        return attention(q, k, v, self.config.softmax_scale, segment_ids)

    def cached(self, q_FHX: Tensor, latent_FC: Tensor, key_FR: Tensor, cache: Cache) -> Tensor:
        """[F, H, V] of a pass over a cache, part by part; padding gives zeros."""
        cache.store(self.name, latent_FC, key_FR)
        pages, outs = cache.pages(self.name), []
        for part in cache.parts:
            q, rows = q_FHX[part.rows], part.rows
            if isinstance(part, Absorbed):
                outs.append(self.absorbed(q, pages, part))
            elif part.slots is None:
                own_q, latent, key = (
                    each.unflatten(0, (part.sequences, -1)) for each in (q, latent_FC[rows], key_FR[rows])
                )
                outs.append(self.expanded(own_q, latent, key, part.segment_ids).flatten(0, 1))
            else:
                entries = read_latents(pages, part.slots, self.config.kv_lora_rank, q.dtype)
                latent, key = entries.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
                k, v = self.keys_and_values(self.kv_b_proj(latent[None]), key[None])
                outs.append(attention_behind_context(q[None], k, v, self.config.softmax_scale)[0])
        if padding := len(q_FHX) - sum(map(len, outs)):
            outs.append(torch.zeros(padding, *outs[0].shape[1:], dtype=q_FHX.dtype, device=q_FHX.device))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    @property
    def input_layers(self) -> tuple[Linear, Linear]:
        """The two that read the input: the queries' (or their latent's), and the key-value latent's."""
        return self.q_proj if self.config.q_lora_rank is None else self.q_a_proj, self.kv_a_proj_with_mqa

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of these two."""
        if self.inputs_fp8 is not None:
            q, kv = self.inputs_fp8(x)
            return q, kv
        to_q, to_kv = self.input_layers
        if self.inputs_stored.serves(x):
            return self.inputs_stored(x).split([len(to_q.weight), len(to_kv.weight)], dim=-1)
        return to_q(x), to_kv(x)

    def queries(self, q: Tensor) -> Tensor:
        """[B, T, H, N + R], not yet rotated, from the queries' part of `inputs`."""
        return self.in_heads(q if self.config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(q)))

    def in_heads(self, projected: Tensor) -> Tensor:
        """[B, T, H X] -> [B, T, H, X]."""
        return projected.unflatten(-1, (self.config.num_attention_heads, -1))

    def latents(self, kv: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """What is cached: (normed latent [B, T, C], rotated key shared by all heads [B, T, R])."""
        latent, key = kv.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent), rotated(key.unsqueeze(2), rope).squeeze(2)

    def keys_and_values(self, kv: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Equations (6) to (9): (keys [B, T, H, N + R], values [B, T, H, V]) from the up-projection's output and the rotated key."""
        return keys_and_values(self.in_heads(kv), key, self.config.qk_nope_head_dim)

    def recomputed(self, x: Tensor, rope: Tensor, segments: Tensor | None, recomputation: Recomputation) -> Tensor:
        """The expanded form of an input [B, T, D]; backward recomputes queries, keys and values from the latents."""
        to_q: Linear | None
        if self.config.q_lora_rank is None and self.inputs_fp8 is None:
            low, to_q, kv = x, self.q_proj, self.kv_a_proj_with_mqa(x)
        else:
            q, kv = self.inputs(x)
            # Without a latent, queries in FP8 come from one product with the key-value latent, and are kept.
            low, to_q = (q, None) if self.config.q_lora_rank is None else (self.q_a_layernorm(q), self.q_b_proj)
        latent, key = self.latents(kv, rope)

        def heads(
            low: Tensor, latent: Tensor, key: Tensor, up_kv: Tensor, up_q: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            q = low if to_q is None or up_q is None else to_q.multiply(low, up_q)
            return rotate_heads(self.in_heads(q), rope), *self.keys_and_values(
                self.kv_b_proj.multiply(latent, up_kv), key
            )

        weights = (self.kv_b_proj.weight,) if to_q is None else (self.kv_b_proj.weight, to_q.weight)
        q, k, v = recomputation(heads, low, latent, key, *weights)
        return attention(q, k, v, self.config.softmax_scale, segments)

    def absorbed(self, q_FHX: Tensor, pages: Tensor, part: Absorbed) -> Tensor:
        """The same with `W_UK` applied to the queries and `W_UV` after the weighted sum of latents: [F, H, V].

        In between all heads attend to one key, the cache entry, which is the value as well.
        """
        config = self.config
        heads, latent = q_FHX.shape[1], config.kv_lora_rank
        weight = self.kv_b_proj.kept_in(q_FHX.dtype).view(heads, -1, latent)
        q_nope, q_rope = q_FHX.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_HFC = torch.bmm(q_nope.transpose(0, 1), weight[:, : config.qk_nope_head_dim])
        q_FHL = torch.cat((q_HFC.transpose(0, 1), q_rope), dim=-1)
        q_BTHL = q_FHL.unflatten(0, (len(part.lengths), -1))
        if part.bias is None:
            mixed, _ = paged_latent_attention(q_BTHL, pages, part.table, part.lengths, latent, config.softmax_scale)
        else:
            mixed = entries_attention(q_BTHL, pages[: len(q_BTHL)], part.bias, latent, config.softmax_scale)
        mixed_HFC = mixed.flatten(0, 1).transpose(0, 1)
        return torch.bmm(mixed_HFC, weight[:, config.qk_nope_head_dim :].mT).transpose(0, 1)
