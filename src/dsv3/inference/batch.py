"""A plan as tensors: one flat batch of tokens, and how they attend.

Works that read as many tokens in the absorbed form stand side by side: decoding and verifying rows, and short chunks behind a
long context. Legend: F tokens of the pass, B sequences, M blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dsv3.inference.plan import Work
from dsv3.model.attention import Absorbed, Expanded
from dsv3.model.config import ModelConfig
from dsv3.ops.latent_pages import PAGE

ROWS = 8
"""Rows of a pass are a multiple of this: below it the results of matrix products depend on how many there are."""


@dataclass
class Batch:
    """One pass. Works are in the order in which their tokens stand."""

    works: list[Work]
    first: list[int]
    """Of each work, the place of its first token."""
    token_F: Tensor
    position_F: Tensor
    slot_F: Tensor
    """Negative for padding."""
    parts: Sequence[Expanded | Absorbed]
    uniform: int
    """Tokens of every work where all read as many in the absorbed form; else 0."""
    beside: bool = False
    """Whether their pages lie side by side: see `dsv3.inference.cache`."""


def lay_out(works: Sequence[Work], config: ModelConfig, device: torch.device) -> Batch:
    """The tensors of a plan's works."""
    absorbs = {work.sequence: absorbed_pays(config, work.start, len(work.tokens)) for work in works}
    ordered = sorted(works, key=lambda work: (not absorbs[work.sequence], work.start > 0, len(work.tokens)))
    first = [0]
    for work in ordered:
        first.append(first[-1] + len(work.tokens))
    total, place = first.pop(), 0
    rows = -(-total // ROWS) * ROWS
    parts: list[Expanded | Absorbed] = []
    uniform = 0
    for (absorb, behind, length), group in groupby(
        ordered, key=lambda work: (absorbs[work.sequence], work.start > 0, len(work.tokens))
    ):
        each = list(group)
        if absorb:
            count = len(each)
            if count == len(ordered):
                uniform = length
                # Padding is made of sequences without tokens, so that few shapes serve all numbers of sequences.
                count = 1 << (count - 1).bit_length() if count < ROWS else -(-count // ROWS) * ROWS
                rows = count * length if device.type == "cuda" else -(-count * length // ROWS) * ROWS
            parts.append(absorbed(each, slice(place, place + count * length), count, device))
        elif behind:
            for k, work in enumerate(each):
                at = place + k * length
                slots = torch.tensor(slots_of(work, 0, work.start + length), device=device)
                parts.append(Expanded(slice(at, at + length), slots=slots))
        else:
            parts += [Expanded(slice(at, at + length)) for at in range(place, place + len(each) * length, length)]
        place += len(each) * length
    if device.type == "cuda":
        parts = together(parts, device)
    padding = rows - total

    def flat(values: list[list[int]], filler: int) -> Tensor:
        numbers = [number for each in values for number in each]
        return torch.tensor(numbers + [filler] * padding, device=device)

    return Batch(
        ordered,
        first,
        flat([work.tokens for work in ordered], 0),
        flat([list(range(work.start, work.start + len(work.tokens))) for work in ordered], 0),
        flat([slots_of(work, work.start, work.start + len(work.tokens)) for work in ordered], -1),
        parts,
        uniform,
    )


def absorbed_pays(config: ModelConfig, context: int, tokens: int) -> bool:
    """Whether tokens behind a context cost fewer products absorbed than expanded, keys and values of all expanded once."""
    if not context:
        return False
    latent, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    expand = latent * (config.qk_nope_head_dim + config.v_head_dim)
    # Absorbed, each pair of tokens costs so much more.
    more = 2 * latent + rotated - config.qk_head_dim - config.v_head_dim
    return tokens == 1 or tokens * more < expand


def slots_of(work: Work, start: int, end: int) -> list[int]:
    """Where the cache keeps these positions of a sequence."""
    return [work.blocks[position // PAGE] * PAGE + position % PAGE for position in range(start, end)]


def absorbed(works: Sequence[Work], rows: slice, count: int, device: torch.device) -> Absorbed:
    """Works of one length, and sequences without tokens up to `count`."""
    ends = [work.start + len(work.tokens) for work in works] + [0] * (count - len(works))
    width = width_for(max(-(-end // PAGE) for end in ends), device)
    table = [work.blocks[:width] + [0] * (width - len(work.blocks)) for work in works]
    table += [[0] * width] * (count - len(works))
    table_BM = torch.tensor(table, dtype=torch.int32, device=device)
    return Absorbed(rows, table_BM, torch.tensor(ends, dtype=torch.int32, device=device))


def width_for(pages: int, device: torch.device) -> int:
    """Columns of a table that has so many pages: few numbers, so that passes of one shape come again. A GPU's kernel passes the rest
    over; a CPU reads all, and has at most a quarter too many."""
    power = 1 << (pages - 1).bit_length()
    if device.type == "cuda":
        return power
    step = max(1, power // 8)
    return -(-pages // step) * step


def together(parts: Sequence[Expanded | Absorbed], device: torch.device) -> list[Expanded | Absorbed]:
    """Whole prompts in one part: a GPU's kernel computes what tokens see of their own sequence, and is launched once."""
    whole = [part for part in parts if isinstance(part, Expanded) and part.slots is None]
    others = [part for part in parts if part not in whole]
    if len(whole) < 2:
        return list(parts)
    sizes = torch.tensor([part.rows.stop - part.rows.start for part in whole], device=device)
    rows = slice(whole[0].rows.start, whole[-1].rows.stop)
    segments = torch.arange(len(whole), device=device).repeat_interleave(sizes, output_size=rows.stop - rows.start)
    joined = [*others, Expanded(rows, segments.unsqueeze(0))]
    return sorted(joined, key=lambda part: part.rows.start)
