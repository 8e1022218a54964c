"""MLA's absorbed attention over pages (report, section 2.1.1): all heads attend to the tokens of their sequence's pages, each of
which is key and value alike.

Legend: B sequences, T tokens of the pass, H heads, P pages, M pages of the longest sequence, C elements of the latent, R of the
rotated key, L = C + R.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.kernels.available import no_gluon, no_triton
from dsv3.ops.kernels.flash_mla import no_flash_mla
from dsv3.ops.latent_pages import PAGE, packed_size, unpack
from dsv3.ops.operation import Implementation, Operation, kernel

Attended = tuple[Tensor, Tensor]
"""[B, T, H, C] in the queries' dtype, and FP32 [B, T, H]: the logarithm of the sum of exponentials."""


def reference(
    q_BTHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, latent: int, scale: float
) -> Attended:
    """The definition, in FP32: a loop over sequences."""
    batch, tokens, heads, _ = q_BTHL.shape
    out = torch.zeros(batch, tokens, heads, latent, dtype=q_BTHL.dtype, device=q_BTHL.device)
    lse = torch.full((batch, tokens, heads), float("-inf"), device=q_BTHL.device)
    for b, length in enumerate(lengths_B.tolist()):
        held = pages[table_BM[b, : -(-length // PAGE)].long()].flatten(0, 1)[:length]
        entries_SL = unpack(held, latent, torch.float32) if pages.dtype == torch.uint8 else held.float()
        scores_THS = torch.einsum("thl,sl->ths", q_BTHL[b].float(), entries_SL) * scale
        limit_T = torch.arange(length - tokens + 1, length + 1, device=q_BTHL.device)
        hidden_TS = torch.arange(length, device=q_BTHL.device) >= limit_T.unsqueeze(1)
        scores_THS.masked_fill_(hidden_TS.unsqueeze(1), float("-inf"))
        lse[b] = scores_THS.logsumexp(-1)
        weights_THS = (scores_THS - lse[b].unsqueeze(-1)).exp().nan_to_num(0.0)
        out[b] = torch.einsum("ths,sc->thc", weights_THS, entries_SL[:, :latent]).to(q_BTHL.dtype)
    return out, lse


def side_by_side(pages: Tensor, table_BM: Tensor, lengths_B: Tensor) -> Tensor:
    """[B, S, L]: a copy of each sequence's pages, with zeros behind its length."""
    entries_BSL = pages.index_select(0, table_BM.clamp(0, len(pages) - 1).flatten())
    entries_BSL = entries_BSL.view(len(table_BM), -1, pages.shape[2])
    # 0 times what is not finite is not 0. All bits of an element are kept or none: filling by a mask takes ten times as long.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[pages.itemsize]
    kept_BS = -(torch.arange(entries_BSL.shape[1], device=pages.device) < lengths_B.unsqueeze(1)).to(integers)
    entries_BSL.view(integers).bitwise_and_(kept_BS.unsqueeze(2))
    return entries_BSL


def gathered(q_BTHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, latent: int, scale: float) -> Attended:
    """All sequences at once, over as many pages as the table has; nothing here looks into a tensor."""
    _, tokens, heads, _ = q_BTHL.shape
    entries_BSL = side_by_side(pages, table_BM, lengths_B)
    slot_S = torch.arange(entries_BSL.shape[1], device=pages.device)
    end_BT = lengths_B.unsqueeze(1) - torch.arange(tokens - 1, -1, -1, device=pages.device)
    hidden_BTS = slot_S >= end_BT.unsqueeze(2)
    scores_BTHS = torch.bmm(q_BTHL.flatten(1, 2), entries_BSL.mT).unflatten(1, (tokens, heads)).float() * scale
    # Not -inf, which would make weights of a query that sees nothing no numbers.
    scores_BTHS = scores_BTHS.masked_fill_(hidden_BTS.unsqueeze(2), torch.finfo(torch.float32).min)
    weights = scores_BTHS.softmax(-1)
    # The largest weight is exp(the largest score - lse).
    blind_BT1 = (end_BT <= 0).unsqueeze(2)
    lse = (scores_BTHS.amax(-1) - weights.amax(-1).log()).masked_fill_(blind_BT1, float("-inf"))
    mixed = torch.bmm(weights.to(entries_BSL.dtype).flatten(1, 2), entries_BSL[..., :latent])
    return mixed.unflatten(1, (tokens, heads)).masked_fill_(blind_BT1.unsqueeze(3), 0.0), lse


def entries_attention(q_BTHL: Tensor, entries_BSL: Tensor, bias_BQS: Tensor, latent: int, scale: float) -> Tensor:
    """[B, T, H, C]: what `paged_latent_attention` gives over entries that lie side by side already, all of them finite.

    `bias_BQS` is `causal_bias`: many layers share it.
    """
    scores_BQS = torch.baddbmm(bias_BQS, q_BTHL.flatten(1, 2), entries_BSL.mT, alpha=scale)
    weights_BQS = scores_BQS.float().softmax(-1).to(entries_BSL.dtype)
    return torch.bmm(weights_BQS, entries_BSL[..., :latent]).unflatten(1, q_BTHL.shape[1:3])


def causal_bias(lengths_B: Tensor, tokens: int, heads: int, slots: int, dtype: torch.dtype) -> Tensor:
    """[B, T H, S]: 0 where each of the last `tokens` of a sequence sees, itself and what lies before it; else the lowest number.

    Not -inf, which would make weights of a query that sees nothing no numbers.
    """
    end_BT = lengths_B.unsqueeze(1) - torch.arange(tokens - 1, -1, -1, device=lengths_B.device)
    hidden_BTS = torch.arange(slots, device=lengths_B.device) >= end_BT.unsqueeze(2)
    bias_BTS = (hidden_BTS * torch.finfo(dtype).min).to(dtype)
    return bias_BTS.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2)


def gathered_serves(q_BTHL: Tensor, pages: Tensor, *rest: Any) -> str | None:
    """Why it does not."""
    if q_BTHL.dtype != pages.dtype:
        return f"needs queries and pages of one dtype, not {q_BTHL.dtype} and {pages.dtype}"
    return disagree(q_BTHL, pages, *rest)


def disagree(
    q_BTHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, latent: int, scale: float
) -> str | None:
    """What is wrong with the shapes."""
    batch, _, _, size = q_BTHL.shape
    token = packed_size(latent, size - latent) if pages.dtype == torch.uint8 else size
    if pages.shape[1:] != (PAGE, token):
        return f"queries of {size} elements need pages of [{PAGE}, {token}], not {list(pages.shape[1:])}"
    if len(table_BM) != batch or lengths_B.shape != (batch,):
        return f"{batch} sequences have as many rows of pages and lengths, not {len(table_BM)} and {len(lengths_B)}"
    if (table_BM.dtype, lengths_B.dtype) != (torch.int32, torch.int32):
        return f"needs pages and lengths in int32, not {table_BM.dtype} and {lengths_B.dtype}"
    return None


def flash_mla_serves(q_BTHL: Tensor, pages: Tensor, *rest: Any) -> str | None:
    """Why it does not."""
    if pages.dtype != torch.bfloat16:
        return f"needs pages in BF16, not {pages.dtype}"
    if q_BTHL.shape[1] * q_BTHL.shape[2] < 128:
        return "pays from 128 heads and tokens of a sequence"
    return gluon_serves(q_BTHL, pages, *rest) or no_flash_mla()


def gluon_serves(
    q_BTHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, latent: int, scale: float
) -> str | None:
    """Why it does not."""
    if (latent, q_BTHL.shape[3]) != (512, 576):
        return f"needs latents of 512 elements and rotated keys of 64, not {latent} and {q_BTHL.shape[3] - latent}"
    reason = triton_serves(q_BTHL, pages, table_BM, lengths_B, latent, scale)
    return reason or no_gluon(q_BTHL.device)


def triton_serves(
    q_BTHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, latent: int, scale: float
) -> str | None:
    """Why it does not."""
    if q_BTHL.dtype != torch.bfloat16 or pages.dtype not in (torch.bfloat16, torch.uint8):
        return f"needs queries in BF16 and pages in BF16 or uint8, not {q_BTHL.dtype} and {pages.dtype}"
    sizes = latent, q_BTHL.shape[3] - latent
    if any(size < 16 or size & (size - 1) for size in sizes) or latent > 512:
        return f"needs latents and rotated keys of a power of two of elements, 16 to 512, not {sizes[0]} and {sizes[1]}"
    if not q_BTHL.is_contiguous() or not pages.is_contiguous() or table_BM.stride(1) != 1:
        return "needs queries and pages that are contiguous, and a sequence's page numbers side by side"
    reason = disagree(q_BTHL, pages, table_BM, lengths_B, latent, scale)
    return reason or no_triton(q_BTHL, pages, table_BM, lengths_B)


paged_latent_attention = Operation(
    "paged_latent_attention",
    [
        Implementation("flash_mla", kernel("flash_mla", "decode"), flash_mla_serves),
        Implementation("gluon", kernel("paged_attention_gluon", "decode"), gluon_serves),
        Implementation("triton", kernel("paged_attention", "decode"), triton_serves),
        Implementation("gathered", gathered, gathered_serves),
        Implementation("reference", reference, disagree),
    ],
)
"""`paged_latent_attention(q [B, T, H, L], pages [P, 64, L] or uint8 [P, 64, bytes], table int32 [B, M], lengths int32 [B], C,
scale) -> ([B, T, H, C], lse FP32 [B, T, H])`.

Page m of sequence b is pages[table[b, m]]; packed tokens are those of `dsv3.ops.latent_pages`. A length counts the tokens of
this pass, which are the last: query t sees positions below length - T + t + 1. A query that sees nothing, as all of a sequence
of length 0, gives zeros and -inf. Of the table, what lies behind a sequence's pages is not read, and slots behind its length may
hold anything. `lse` merges results over parts of a context. Raises `UserError` for shapes that do not agree.
"""
