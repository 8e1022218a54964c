"""A plan as tensors: one flat batch of tokens, and how they attend.

Works of equal length in the absorbed form (decoding, verifying drafts, short chunks behind a long context) are one part.
Legend: F tokens of the pass, B sequences, M blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from dsv3.inference.plan import Work
from dsv3.model.attention import Absorbed, Expanded
from dsv3.model.config import ModelConfig
from dsv3.ops.latent_pages import PAGE

ROWS = 8
"""A pass is padded to a multiple of so many rows: with fewer, results of matrix products depend on their number."""


@dataclass
class Batch:
    """One pass."""

    works: list[Work]
    """In the order of their tokens."""
    first: list[int]
    """Of each work, the index of its first token."""
    token_F: Tensor
    position_F: Tensor
    slot_F: Tensor
    """Negative for padding."""
    parts: Sequence[Expanded | Absorbed]
    uniform: int
    """Tokens of every work, if all works have equally many and take the absorbed form; else 0."""
    gathered: bool = False
    """Whether it reads the gathered copy of its pages: see `dsv3.inference.cache`."""

    @property
    def only(self) -> Absorbed:
        """The one part of a uniform batch."""
        [part] = self.parts
        assert isinstance(part, Absorbed)
        return part


def lay_out(works: Sequence[Work], config: ModelConfig, device: torch.device) -> Batch:
    """The tensors of a plan's works."""
    on_gpu = device.type == "cuda"
    absorbing, prompts, chunks = list[Work](), list[Work](), list[Work]()
    for work in sorted(works, key=length_of):
        pays = absorbed_pays(config, work.start, len(work.tokens))
        (absorbing if pays else chunks if work.start else prompts).append(work)
    ordered = [*absorbing, *prompts, *chunks]
    *first, total = accumulate(map(length_of, ordered), initial=0)
    rows, uniform = -(-total // ROWS) * ROWS, 0
    parts: list[Expanded | Absorbed] = []
    place = 0
    for length, group in groupby(absorbing, key=length_of):
        each = list(group)
        count = len(each)
        if count == len(ordered):
            uniform = length
            # Padded with empty sequences, so that few shapes serve all numbers of sequences.
            count = 1 << (count - 1).bit_length() if count < ROWS else -(-count // ROWS) * ROWS
            rows = count * length if on_gpu else -(-count * length // ROWS) * ROWS
        parts.append(absorbed(each, slice(place, place + count * length), count, device))
        place += count * length
    # A GPU's kernel keeps sequences apart, and is launched once for all whole prompts; on a CPU, once for those of one length.
    for each in [prompts] if on_gpu and prompts else [list(group) for _, group in groupby(prompts, key=length_of)]:
        sizes = list(map(length_of, each))
        own = slice(place, place + sum(sizes))
        parts.append(Expanded(own, segment_ids=segments(sizes, device)) if on_gpu else Expanded(own, len(each)))
        place = own.stop
    for work in chunks:
        end = work.start + len(work.tokens)
        slots = torch.tensor(slots_of(work, 0, end), device=device)
        parts.append(Expanded(slice(place, place + len(work.tokens)), slots=slots))
        place += len(work.tokens)
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
    """Whether tokens behind a context cost fewer FLOPs absorbed than expanded; expanding includes the context's keys and values."""
    if not context or tokens == 1:
        return context > 0
    latent, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    expand = latent * (config.qk_nope_head_dim + config.v_head_dim)
    # What each pair of query and key costs more when absorbed.
    more = 2 * latent + rotated - config.qk_head_dim - config.v_head_dim
    return tokens * more < expand


def slots_of(work: Work, start: int, end: int) -> list[int]:
    """The cache slots of these positions of a sequence."""
    return [work.blocks[position // PAGE] * PAGE + position % PAGE for position in range(start, end)]


def absorbed(works: Sequence[Work], rows: slice, count: int, device: torch.device) -> Absorbed:
    """Works of one length, padded with empty sequences to `count`."""
    ends = [work.start + len(work.tokens) for work in works] + [0] * (count - len(works))
    width = width_for(max(-(-end // PAGE) for end in ends), device)
    table = [work.blocks[:width] + [0] * (width - len(work.blocks)) for work in works]
    table += [[0] * width] * (count - len(works))
    table_BM = torch.tensor(table, dtype=torch.int32, device=device)
    return Absorbed(rows, table_BM, torch.tensor(ends, dtype=torch.int32, device=device))


def width_for(pages: int, device: torch.device) -> int:
    """Columns of a page table, rounded up so that shapes repeat: to a power of two on a GPU, whose kernel skips the rest; by at most
    a quarter on a CPU, which reads all."""
    power = 1 << (pages - 1).bit_length()
    if device.type == "cuda":
        return power
    step = max(1, power // 8)
    return -(-pages // step) * step


def segments(sizes: Sequence[int], device: torch.device) -> Tensor | None:
    """int [1, tokens]: which sequence each token belongs to; None for a single sequence."""
    if len(sizes) == 1:
        return None
    sequence_S = torch.arange(len(sizes), device=device)
    repeats_S = torch.tensor(sizes, device=device)
    return sequence_S.repeat_interleave(repeats_S, output_size=sum(sizes)).unsqueeze(0)


def length_of(work: Work) -> int:
    """Its tokens in the pass."""
    return len(work.tokens)
