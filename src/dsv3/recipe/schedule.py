"""Schedules: the value of a learning rate, batch size, MTP weight or bias update speed at any point of the training.

A point is a pair of counts taken *before* an optimizer step: the steps completed, and the tokens they consumed. `at`
needs nothing else, so a resumed run and an uninterrupted one read the same values.

Segments may be limited in either count, mixed freely (the report: 2K steps of warm-up, then until 10T tokens). Where
one segment ends at a step and the next is measured in tokens, or the reverse, the start of the second has to be known
in its own count. One thing ties the two counts together: the batch size. So `Schedules.resolve` first walks the batch-size
schedule from the first step to the last and keeps a `Timeline` of runs of equal steps, then converts every boundary
through it. Everything is in ints and exact. The walk jumps from one batch size to the next, so its cost depends on how
many different sizes there are and not on how many steps.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsv3.errors import UserError
from dsv3.recipe.quantity import format_quantity
from dsv3.recipe.segment import Segment, as_segments

if TYPE_CHECKING:
    from dsv3.recipe.schema import Recipe


@dataclass(frozen=True)
class Piece:
    """A segment with both ends known, `start <= position < end`, in steps or in tokens. `end` None: for ever."""

    kind: Literal["constant", "linear", "cosine"]
    first: float
    last: float
    unit: Literal["steps", "tokens"]
    start: int
    end: int | None

    def position(self, step: int, tokens: int) -> int:
        """The one of the two counts that this piece is measured in."""
        return step if self.unit == "steps" else tokens

    def value(self, position: int) -> float:
        """The value at `position`; from the end on, what the piece arrives at."""
        if self.kind == "constant" or self.end is None:
            return self.first
        done, span = position - self.start, self.end - self.start
        if done >= span:
            return self.last
        if self.kind == "linear":
            return self.first + (self.last - self.first) * done / span
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * done / span)) / 2


@dataclass(frozen=True)
class Schedule:
    """A value over the training."""

    pieces: tuple[Piece, ...]

    def at(self, step: int, tokens: int) -> float:
        """The value for the optimizer step that begins after `step` steps and `tokens` tokens."""
        for piece in self.pieces:
            position = piece.position(step, tokens)
            if piece.end is None or position < piece.end:
                return piece.value(position)
        return self.pieces[-1].last


@dataclass(frozen=True)
class BatchSchedule(Schedule):
    """The batch size in sequences over the training."""

    multiple: int

    def at(self, step: int, tokens: int) -> int:
        """Sequences in the step that begins after `step` steps and `tokens` tokens, rounded down to `multiple`."""
        return round_down(super().at(step, tokens), self.multiple)


def round_down(value: float, multiple: int) -> int:
    """The largest multiple of `multiple` not above `value`."""
    return int(value) // multiple * multiple


class Timeline:
    """Which token count each step begins at: runs of steps with one batch size, extended run by run."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.step = 0
        self.tokens = 0
        self._first_steps: list[int] = []
        self._first_tokens: list[int] = []
        self._tokens_a_step: list[int] = []

    def run(self, steps: int, batch_size: int) -> None:
        """Appends `steps` steps of `batch_size` sequences."""
        self._first_steps.append(self.step)
        self._first_tokens.append(self.tokens)
        self._tokens_a_step.append(batch_size * self.sequence_length)
        self.step += steps
        self.tokens += steps * batch_size * self.sequence_length

    def tokens_at(self, step: int) -> int:
        """Tokens consumed by the first `step` steps; beyond the walk, at its last batch size."""
        run = bisect_right(self._first_steps, step) - 1
        return self._first_tokens[run] + (step - self._first_steps[run]) * self._tokens_a_step[run]

    def runs(self, step: int) -> list[tuple[int, int]]:
        """(first step, tokens a step) of the runs before `step`, with neighbours of one batch size as one."""
        runs: list[tuple[int, int]] = []
        for first, tokens in zip(self._first_steps, self._tokens_a_step, strict=True):
            if first < step and (not runs or runs[-1][1] != tokens):
                runs.append((first, tokens))
        return runs

    def steps_until(self, tokens: int) -> int:
        """The fewest steps that consume at least `tokens` tokens."""
        run = bisect_right(self._first_tokens, tokens) - 1
        return self._first_steps[run] - (self._first_tokens[run] - tokens) // self._tokens_a_step[run]


@dataclass(frozen=True)
class Schedules:
    """Every schedule of a recipe, with both counts of every boundary known.

    `total_steps` is the number of optimizer steps of the whole training: the fewest that reach `training.tokens`.
    """

    learning_rate: Schedule
    batch_size: BatchSchedule
    mtp_weight: Schedule
    bias_update_speed: Schedule
    timeline: Timeline
    total_steps: int

    @property
    def batch_sizes(self) -> list[int]:
        """Every batch size of the training, in ascending order."""
        return sorted({tokens // self.timeline.sequence_length for _, tokens in self.timeline.runs(self.total_steps)})

    @classmethod
    def resolve(cls, recipe: "Recipe") -> "Schedules":
        """The schedules of `recipe`; `UserError` for one that ends before the training, or runs backwards."""
        written, total = recipe.schedule, recipe.training.tokens
        batch_size, timeline = walk(
            as_segments(written.batch_size), written.batch_size_multiple, recipe.data.sequence_length, total
        )
        learning_rate, mtp_weight, bias_update_speed = (
            convert(name, as_segments(getattr(written, name)), timeline, total)
            for name in ("learning_rate", "mtp_weight", "bias_update_speed")
        )
        total_steps = timeline.steps_until(total)
        return cls(learning_rate, batch_size, mtp_weight, bias_update_speed, timeline, total_steps)


def walk(
    segments: tuple[Segment, ...], multiple: int, sequence_length: int, total: int
) -> tuple[BatchSchedule, Timeline]:
    """Follows the batch-size schedule until `total` tokens."""
    timeline = Timeline(sequence_length)
    pieces: list[Piece] = []
    for index, segment in enumerate(segments):
        for value in segment.values:
            if round_down(value, multiple) == 0:
                raise UserError(f"schedule.batch_size reaches {value:g}: expected at least {multiple} sequences")
        piece = place("batch_size", index, segment, pieces, timeline.step, timeline.tokens, total)
        pieces.append(piece)
        while timeline.tokens < total:
            position = piece.position(timeline.step, timeline.tokens)
            if piece.end is not None and position >= piece.end:
                break
            size = round_down(piece.value(position), multiple)
            stride = 1 if piece.unit == "steps" else size * sequence_length
            most = -((timeline.tokens - total) // (size * sequence_length))
            if piece.end is not None:
                most = min(most, -((position - piece.end) // stride))
            timeline.run(equal_steps(piece, position, stride, most, size, multiple), size)
    require_end("batch_size", pieces[-1], timeline.tokens >= total, total)
    return BatchSchedule(tuple(pieces), multiple), timeline


def equal_steps(piece: Piece, position: int, stride: int, most: int, size: int, multiple: int) -> int:
    """How many steps of `stride`, from `position` on and at most `most`, have the batch size `size`.

    A piece is monotone, so the first step with another size is found by doubling, then by halving.
    """

    def same(steps: int) -> bool:
        return round_down(piece.value(position + steps * stride), multiple) == size

    if piece.first == piece.last:
        return most
    known, limit = 0, 1
    while limit < most and same(limit):
        known, limit = limit, 2 * limit
    limit = min(limit, most)
    while limit - known > 1:
        middle = (known + limit) // 2
        known, limit = (middle, limit) if same(middle) else (known, middle)
    return limit


def convert(name: str, segments: tuple[Segment, ...], timeline: Timeline, total: int) -> Schedule:
    """Places the segments of one schedule on a known timeline."""
    pieces: list[Piece] = []
    for index, segment in enumerate(segments):
        step, tokens = end_of(pieces[-1], timeline) if pieces else (0, 0)
        pieces.append(place(name, index, segment, pieces, step, tokens, total))
    last = pieces[-1]
    require_end(name, last, last.end is None or last.end >= last.position(timeline.steps_until(total), total), total)
    return Schedule(tuple(pieces))


def end_of(piece: Piece, timeline: Timeline) -> tuple[int, int]:
    """The end of a piece in steps and in tokens."""
    assert piece.end is not None
    if piece.unit == "steps":
        return piece.end, timeline.tokens_at(piece.end)
    return timeline.steps_until(piece.end), piece.end


def place(name: str, index: int, segment: Segment, before: list[Piece], step: int, tokens: int, total: int) -> Piece:
    """The piece that `segment` is when the ones `before` it end at `step` and `tokens`."""
    first, last = segment.values
    unit: Literal["steps", "tokens"] = "tokens" if segment.steps is None else "steps"
    # In one unit, a piece starts exactly where the last one ended, although a step may straddle that point.
    start = before[-1].end if before and before[-1].unit == unit else (tokens if unit == "tokens" else step)
    assert start is not None, "only the last segment may have no end"
    if segment.until_tokens is not None and segment.until_tokens <= start:
        raise UserError(
            f"schedule.{name}.{index}.until_tokens = {format_quantity(segment.until_tokens)}: expected more than the "
            f"{format_quantity(start)} tokens at which the segment starts"
        )
    if segment.steps is not None:
        end: int | None = start + segment.steps
    elif segment.tokens is not None:
        end = start + segment.tokens
    elif segment.until_tokens is not None:
        end = segment.until_tokens
    else:
        end = None if segment.kind == "constant" else max(total, start + 1)
    return Piece(segment.kind, first, last, unit, start, end)


def require_end(name: str, last: Piece, reached: bool, total: int) -> None:
    """Refuses a schedule that leaves the end of the training without a value."""
    if not reached:
        raise UserError(
            f"schedule.{name} ends after {format_quantity(last.end or 0)} {last.unit}, before training.tokens = "
            f"{format_quantity(total)}: take the limit off its last segment, or add a segment without one"
        )
