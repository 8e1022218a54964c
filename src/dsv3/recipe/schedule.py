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
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

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


class Run(NamedTuple):
    """Steps with one batch size: what was before the first of them, and the tokens of each."""

    step: int
    tokens: int
    tokens_a_step: int


class Timeline:
    """Which token count each step begins at: runs of steps with one batch size, extended run by run."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.step = 0
        self.tokens = 0
        self._runs: list[Run] = []

    def run(self, steps: int, batch_size: int) -> None:
        """Appends `steps` steps of `batch_size` sequences."""
        if not self._runs or self._runs[-1].tokens_a_step != batch_size * self.sequence_length:
            self._runs.append(Run(self.step, self.tokens, batch_size * self.sequence_length))
        self.step += steps
        self.tokens += steps * batch_size * self.sequence_length

    def tokens_at(self, step: int) -> int:
        """Tokens consumed by the first `step` steps; beyond the walk, at its last batch size."""
        run = self._runs[bisect_right(self._runs, step, key=lambda run: run.step) - 1]
        return run.tokens + (step - run.step) * run.tokens_a_step

    def runs(self, step: int) -> list[Run]:
        """Those that begin before `step`."""
        return [run for run in self._runs if run.step < step]

    def steps_until(self, tokens: int) -> int:
        """The fewest steps that consume at least `tokens` tokens."""
        run = self._runs[bisect_right(self._runs, tokens, key=lambda run: run.tokens) - 1]
        return run.step - (run.tokens - tokens) // run.tokens_a_step


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
        return sorted(
            {run.tokens_a_step // self.timeline.sequence_length for run in self.timeline.runs(self.total_steps)}
        )

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
    for segment in segments:
        for value in segment.values:
            if round_down(value, multiple) == 0:
                raise UserError(f"schedule.batch_size reaches {value:g}: expected at least {multiple} sequences")
        piece = place("batch_size", segment, pieces, timeline.step, timeline.tokens, total)
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
    """How many steps of `stride`, from `position` on and at most `most`, have the batch size `size`."""

    def other(steps: int) -> bool:
        return round_down(piece.value(position + steps * stride), multiple) != size

    # A piece is monotone, so the first step with another size is found by halving.
    return 1 + bisect_left(range(1, most), True, key=other)


def convert(name: str, segments: tuple[Segment, ...], timeline: Timeline, total: int) -> Schedule:
    """Places the segments of one schedule on a known timeline."""
    pieces: list[Piece] = []
    for segment in segments:
        step, tokens = end_of(pieces[-1], timeline) if pieces else (0, 0)
        pieces.append(place(name, segment, pieces, step, tokens, total))
    last = pieces[-1]
    require_end(name, last, last.end is None or last.end >= last.position(timeline.steps_until(total), total), total)
    return Schedule(tuple(pieces))


def end_of(piece: Piece, timeline: Timeline) -> tuple[int, int]:
    """The end of a piece in steps and in tokens."""
    assert piece.end is not None
    if piece.unit == "steps":
        return piece.end, timeline.tokens_at(piece.end)
    return timeline.steps_until(piece.end), piece.end


def place(name: str, segment: Segment, before: list[Piece], step: int, tokens: int, total: int) -> Piece:
    """The piece that `segment` is when the ones `before` it end at `step` and `tokens`."""
    first, last = segment.values
    unit: Literal["steps", "tokens"] = "tokens" if segment.steps is None else "steps"
    # In one unit, a piece starts exactly where the last one ended, although a step may straddle that point.
    start = before[-1].end if before and before[-1].unit == unit else (tokens if unit == "tokens" else step)
    assert start is not None, "only the last segment may have no end"
    if segment.until_tokens is not None and segment.until_tokens <= start:
        raise UserError(
            f"schedule.{name}.{len(before)}.until_tokens = {format_quantity(segment.until_tokens)}: expected more than the "
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
