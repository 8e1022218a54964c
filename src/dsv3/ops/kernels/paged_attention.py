"""Absorbed attention over pages: equal shares of all sequences' pages for each program, and the pieces of a sequence combined.

How long sequences are is known to the device alone. Their pages, one sequence after the other, are cut into as many parts as
there are programs for one block of rows (a row is a head of one query token). A program takes its part sequence by sequence: of
one that lies wholly within it, it writes the result; else a piece of it, normalised, with the logarithm of its sum. At most the
first and the last sequence of a part are pieces: they have one place each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.kernels.product import processors
from dsv3.ops.latent_pages import PAGE
from dsv3.ops.tiles import TILE

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """How a program computes."""

    rows: int
    warps: int
    stages: int


class Combined(NamedTuple):
    """What a program that combines pieces takes at a time."""

    rows: int
    columns: int
    pieces: int
    warps: int


FEW = Config(16, 8, 2)
MANY = Config(64, 8, 2)
"""For more than 32 rows."""
COMBINED = {False: Combined(8, 512, 2, 4), True: Combined(1, 128, 32, 4)}
"""By whether there are many pieces to a sequence, more than eight in the mean. Programs are what costs: few where that is enough."""


@triton.jit
def held_by(lengths, batch, BATCH: tl.constexpr, PAGE: tl.constexpr):
    b = tl.arange(0, BATCH)
    return tl.cdiv(tl.load(lengths + b, b < batch, other=0), PAGE)


@triton.jit
def parts_of(pages, parts):
    """None is empty: pieces of all that a sequence reaches over are there."""
    return tl.maximum(tl.minimum(pages, parts), 1)


@triton.jit
def scores_to_weights(scores, largest, total):
    """Of scores in powers of two: (weights, what earlier sums shrink by, the new largest score, the new sum of weights)."""
    new = tl.maximum(largest, tl.max(scores, axis=1))
    seen = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - seen[:, None])
    shrink = tl.exp2(largest - seen)
    return weights, shrink, new, total * shrink + tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=["batch", "tokens", "heads", "table_stride", "parts"])
def decode_kernel(
    q, values, words, halves, table, lengths, out, lse, piece, piece_lse,
    batch, tokens, heads, table_stride, scale, parts,
    LATENT: tl.constexpr, ROTATED: tl.constexpr, SIZE: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    rows = tokens * heads
    blocks = tl.cdiv(rows, ROWS)
    part = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, LATENT)
    rotated = LATENT + tl.arange(0, ROTATED)
    slot = tl.arange(0, PAGE)

    held = held_by(lengths, batch, BATCH, PAGE)
    up_to = tl.cumsum(held, 0)
    pages = tl.sum(held, 0)
    parts = parts_of(pages, parts)
    begin = part * pages // parts
    end = tl.minimum((part + 1) * pages // parts, pages)
    b = tl.sum((up_to <= begin).to(tl.int32), 0)
    start = tl.max(tl.where(up_to <= begin, up_to, 0), 0)
    page = begin
    while page < end:
        length = tl.load(lengths + b)
        after = start + tl.cdiv(length, PAGE)
        stop = tl.minimum(end, after)
        if stop > page:
            q_row = b.to(tl.int64) * rows + row
            q_at = q + q_row[:, None] * (LATENT + ROTATED)
            q_latent = tl.load(q_at + column[None, :], (row < rows)[:, None], other=0.0)
            q_rotated = tl.load(q_at + rotated[None, :], (row < rows)[:, None], other=0.0)
            limit = length - tokens + row // heads + 1
            largest = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, LATENT), tl.float32)
            for i in range(page - start, stop - start):
                at = tl.load(table + b.to(tl.int64) * table_stride + i).to(tl.int64) * PAGE + slot
                position = i * PAGE + slot
                own = (position < length)[:, None]
                if PACKED:
                    tile = tl.arange(0, LATENT // TILE)
                    factor = tl.load(words + at[:, None] * (SIZE // 4) + LATENT // 4 + tile[None, :], own, other=0.0)
                    coded = tl.load(values + at[:, None] * SIZE + column[None, :], own, other=0)
                    wide = coded.to(tl.float8e4nv, bitcast=True).to(tl.float32)
                    wide = wide.reshape(PAGE, LATENT // TILE, TILE) * factor[:, :, None]
                    latent = wide.reshape(PAGE, LATENT).to(q.dtype.element_ty)
                    rest = halves + (LATENT + LATENT // TILE * 4) // 2 - LATENT
                    key = tl.load(rest + at[:, None] * (SIZE // 2) + rotated[None, :], own, other=0.0)
                    key = key.to(q.dtype.element_ty)
                else:
                    latent = tl.load(values + at[:, None] * SIZE + column[None, :], own, other=0.0)
                    key = tl.load(values + at[:, None] * SIZE + rotated[None, :], own, other=0.0)
                scores = tl.dot(
                    q_rotated, key.T, tl.dot(q_latent, latent.T, input_precision="ieee"), input_precision="ieee"
                )
                scores = tl.where(position[None, :] < limit[:, None], scores * scale, float("-inf"))
                weights, shrink, largest, total = scores_to_weights(scores, largest, total)
                sums = tl.dot(weights.to(latent.dtype), latent, sums * shrink[:, None], input_precision="ieee")
            sums = sums / tl.where(total > 0, total, 1.0)[:, None]
            logarithm = tl.where(total > 0, largest + tl.log2(total), float("-inf"))
            if (page == start) & (stop == after):
                at = out + q_row[:, None] * LATENT + column[None, :]
                tl.store(at, sums.to(out.dtype.element_ty), (row < rows)[:, None])
                tl.store(lse + q_row, logarithm * 0.6931471805599453, row < rows)
            else:
                piece_row = (part * 2 + (begin < start).to(tl.int32)).to(tl.int64) * rows + row
                tl.store(piece + piece_row[:, None] * LATENT + column[None, :], sums, (row < rows)[:, None])
                tl.store(piece_lse + piece_row, logarithm, row < rows)
        page = stop
        start = after
        b += 1


@triton.jit(do_not_specialize=["batch", "rows", "parts"])
def combine_kernel(
    piece, piece_lse, lengths, out, lse, batch, rows, parts,
    LATENT: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, ROWS)
    b = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = held_by(lengths, batch, BATCH, PAGE)
    pages = tl.sum(held, 0)
    start = tl.sum(tl.where(tl.arange(0, BATCH) < b, held, 0), 0)
    parts = parts_of(pages, parts)
    own_pages = tl.cdiv(tl.load(lengths + b), PAGE)
    # The part of page x is the last that begins at or before it.
    first = ((start + 1) * parts - 1) // tl.maximum(pages, 1)
    count = tl.where(own_pages > 0, ((start + own_pages) * parts - 1) // tl.maximum(pages, 1) - first + 1, 0)
    if count != 1:
        part = first + tl.arange(0, PARTS)
        place = part * 2 + (part * pages // parts < start).to(tl.int32)
        taken = (part < first + count)[None, :] & (row < rows)[:, None]
        at = piece_lse + place.to(tl.int64)[None, :] * rows + row[:, None]
        logarithms = tl.load(at, taken, other=float("-inf"))
        largest = tl.max(logarithms, axis=1)
        seen = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(tl.exp2(logarithms - seen[:, None]), axis=1)
        logarithm = seen + tl.log2(tl.where(total > 0, total, 1.0))
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for done in range(0, count, PIECES):
            some = first + done + tl.arange(0, PIECES)
            of_some = some * 2 + (some * pages // parts < start).to(tl.int32)
            present = (some < first + count)[None, :] & (row < rows)[:, None]
            piece_row = of_some.to(tl.int64)[None, :] * rows + row[:, None]
            weight = tl.exp2(tl.load(piece_lse + piece_row, present, other=float("-inf")) - logarithm[:, None])
            piece_at = piece + piece_row[:, :, None] * LATENT + column[None, None, :]
            values = tl.load(piece_at, present[:, :, None], other=0.0)
            sums += tl.sum(values * weight[:, :, None], axis=1)
        out_row = b.to(tl.int64) * rows + row
        tl.store(
            out + out_row[:, None] * LATENT + column[None, :], sums.to(out.dtype.element_ty), (row < rows)[:, None]
        )
        natural = tl.where(total > 0, logarithm * 0.6931471805599453, float("-inf"))
        tl.store(lse + out_row, natural, row < rows)


class Pieces(NamedTuple):
    """Results, and room for the two pieces of each part."""

    out: Tensor
    lse: Tensor
    piece: Tensor
    piece_lse: Tensor
    parts: int


def room(q_BTHL: Tensor, table_BM: Tensor, latent: int, block: int, parts: int | None) -> Pieces:
    """Uninitialised; as many parts as fill the GPU with their blocks of rows."""
    batch, tokens, heads, _ = q_BTHL.shape
    rows = tokens * heads
    if parts is None:
        parts = max(1, min(processors(q_BTHL.device) // triton.cdiv(rows, block), table_BM.numel()))
    wide = q_BTHL.new_empty(parts * 2 * rows * (latent + 1), dtype=torch.float32)
    piece, piece_lse = wide.split([parts * 2 * rows * latent, parts * 2 * rows])
    out = q_BTHL.new_empty(batch, tokens, heads, latent)
    return Pieces(out, q_BTHL.new_empty(batch, tokens, heads, dtype=torch.float32), piece, piece_lse, parts)


def sequences(batch: int) -> int:
    """Room for that many lengths; few sizes, as each is a kernel of its own."""
    return max(256, triton.next_power_of_2(batch))


def combine(made: Pieces, lengths_B: Tensor) -> None:
    """Writes the results of sequences that lie in several parts, or have no pages."""
    batch, tokens, heads, latent = made.out.shape
    rows = tokens * heads
    config = COMBINED[made.parts > 8 * batch]
    columns = min(latent, config.columns)
    combine_kernel[(batch * triton.cdiv(rows, config.rows), latent // columns)](
        made.piece, made.piece_lse, lengths_B, made.out, made.lse, batch, rows, made.parts,
        latent, PAGE, config.rows, columns, config.pieces, sequences(batch), triton.next_power_of_2(made.parts),
        num_warps=config.warps,
    )  # fmt: skip


def decode(
    q_BTHL: Tensor,
    pages: Tensor,
    table_BM: Tensor,
    lengths_B: Tensor,
    latent: int,
    scale: float,
    parts: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `dsv3.ops.paged_attention.paged_latent_attention`; `parts` is how many programs share the pages."""
    batch, tokens, heads, size = q_BTHL.shape
    packed = pages.dtype == torch.uint8
    config = config or (FEW if tokens * heads <= 32 else MANY)
    made = room(q_BTHL, table_BM, latent, config.rows, parts)
    if not q_BTHL.numel():
        return made.out, made.lse
    words, halves = (pages.view(torch.float32), pages.view(torch.bfloat16)) if packed else (None, None)
    decode_kernel[(made.parts * triton.cdiv(tokens * heads, config.rows),)](
        q_BTHL, pages, words, halves, table_BM, lengths_B, made.out, made.lse, made.piece, made.piece_lse,
        batch, tokens, heads, table_BM.stride(0), scale * LOG2_E, made.parts,
        latent, size - latent, pages.shape[2], packed, TILE, PAGE, config.rows, sequences(batch),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    combine(made, lengths_B)
    return made.out, made.lse
