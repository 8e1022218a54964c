"""Schedules read at points: where one of them changes its course, and wherever else somebody asks."""

from collections.abc import Iterable
from dataclasses import dataclass

from dsv3.errors import UserError
from dsv3.recipe.quantity import format_quantity
from dsv3.recipe.schedule import Schedule, Schedules, end_of

NAMES = ("learning_rate", "batch_size", "mtp_weight", "bias_update_speed")


@dataclass(frozen=True)
class Point:
    """The values for the optimizer step that begins once `tokens` tokens are consumed, or soonest after."""

    tokens: int
    step: int
    learning_rate: float
    batch_size: int
    mtp_weight: float
    bias_update_speed: float
    changes: tuple[str, ...] = ()
    """Which schedules begin another segment here."""


def point_at(schedules: Schedules, tokens: int, changes: Iterable[str] = ()) -> Point:
    """All values at one token count.

    A step begins with as many tokens as the steps before it consumed, which rarely is `tokens` to the token; values that
    follow tokens are those of `tokens` itself, values that follow steps those of the first step from there on.
    """
    step = schedules.timeline.steps_until(tokens)
    values = {name: getattr(schedules, name).at(step, tokens) for name in NAMES}
    return Point(tokens, step, **values, changes=tuple(changes))


def points_of(schedules: Schedules, total: int, asked: Iterable[int] = ()) -> list[Point]:
    """Beginning, end (`total` tokens), every border of segments before the end, and the token counts `asked` for, in order.

    Raises `UserError` for a count beyond the end.
    """
    changes: dict[int, list[str]] = {0: [], total: []}
    for tokens in asked:
        if tokens > total:
            raise UserError(
                f"{format_quantity(tokens)} tokens is past the end: expected at most training.tokens = "
                f"{format_quantity(total)}"
            )
        changes.setdefault(tokens, [])
    for name in NAMES:
        for tokens in borders(getattr(schedules, name), schedules):
            if tokens < total:
                changes.setdefault(tokens, []).append(name)
    return [point_at(schedules, tokens, names) for tokens, names in sorted(changes.items())]


def borders(schedule: Schedule, schedules: Schedules) -> list[int]:
    """The token counts at which one segment ends and another begins."""
    return [end_of(piece, schedules.timeline)[1] for piece in schedule.pieces[:-1]]
