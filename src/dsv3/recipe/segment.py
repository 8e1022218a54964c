"""How a recipe writes a value that changes while training: a number, or a list of segments one after another."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from dsv3.recipe.quantity import Length, Quantity
from dsv3.recipe.section import Section

Value = Annotated[float, Field(ge=0)]


class Segment(Section):
    """One piece of a schedule. At most one of `tokens`, `steps` and `until_tokens` says where it ends; the last
    segment may have none, and then lasts until the training does.
    """

    kind: Literal["constant", "linear", "cosine"]
    """`constant` holds `value`; `linear` and `cosine` (half a period) go from `from` to `to`."""
    value: Value | None = None
    """What a constant segment holds."""
    start: Value | None = Field(default=None, alias="from")
    """Where a linear or cosine segment starts."""
    to: Value | None = None
    """Where a linear or cosine segment arrives, at its end."""
    tokens: Quantity | None = None
    """How long the segment lasts, in tokens."""
    steps: Quantity | None = None
    """How long the segment lasts, in optimizer steps."""
    until_tokens: Quantity | None = None
    """Where the segment ends, in tokens counted from the start of the training."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ramp = (self.start is not None, self.to is not None)
        if self.kind == "constant" and (self.value is None or any(ramp)):
            raise ValueError("expected a constant segment to have 'value', and neither 'from' nor 'to'")
        if self.kind != "constant" and (self.value is not None or not all(ramp)):
            raise ValueError(f"expected a {self.kind} segment to have 'from' and 'to', and no 'value'")
        if len(self.limits) > 1:
            raise ValueError("expected one of 'tokens', 'steps' and 'until_tokens', not several")
        return self

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def limits(self) -> list[int]:
        """What the segment says of where it ends: one number, or none."""
        return [limit for limit in (self.tokens, self.steps, self.until_tokens) if limit is not None]

    @property
    def values(self) -> tuple[float, float]:
        """The values at the segment's start and end."""
        if self.value is not None:
            return self.value, self.value
        assert self.start is not None
        assert self.to is not None
        return self.start, self.to


def _form(value: object) -> str:
    return "segments" if isinstance(value, list | tuple) else "number"


def _all_but_the_last_end(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    for index, segment in enumerate(segments[:-1]):
        if not segment.limits:
            raise ValueError(
                f"expected segment {index} to have 'tokens', 'steps' or 'until_tokens': another follows it"
            )
    return segments


Segments = Annotated[tuple[Segment, ...], Field(strict=False, min_length=1), AfterValidator(_all_but_the_last_end)]
Scheduled = Annotated[
    Annotated[Value, Tag("number")] | Annotated[Segments, Tag("segments")],
    Discriminator(_form),
]
"""A value over the whole training: a number, or segments."""

ScheduledCount = Annotated[
    Annotated[Length, Tag("number")] | Annotated[Segments, Tag("segments")],
    Discriminator(_form),
]
"""The same for a count, of which the whole part counts."""


def as_segments(scheduled: "float | tuple[Segment, ...]") -> tuple[Segment, ...]:
    """The segments of either form."""
    return scheduled if isinstance(scheduled, tuple) else (Segment(kind="constant", value=float(scheduled)),)
