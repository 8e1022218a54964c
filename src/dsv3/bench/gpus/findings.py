"""What several GPUs measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv3.bench.measure import Spread


@dataclass(frozen=True)
class Figure:
    """One number that follows from the times, or from a count."""

    name: str
    value: Spread
    unit: str = ""
    """Empty for a ratio, `%` for a share of 1."""
    target: float | None = None
    """The least that the median should be."""

    @property
    def met(self) -> bool | None:
        """Whether it is; None without a target."""
        return None if self.target is None else self.value.median >= self.target


@dataclass(frozen=True)
class Part:
    """One of the measurements."""

    name: str
    title: str
    shapes: Mapping[str, Any]
    times: Mapping[str, Spread] = field(default_factory=dict)
    """Milliseconds of each side's turn, until the slowest rank had finished, over the rounds."""
    figures: Sequence[Figure] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    """Evidence that the sides computed the same."""


@dataclass(frozen=True)
class Findings:
    """All of one command, as its JSON file holds it."""

    gpus: int
    parts: Sequence[Part]
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    command: str
    seconds: float
    """From the start of the ranks to their end."""


def milliseconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Of each side."""
    return {name: Spread.of([1000 * each for each in turns]) for name, turns in seconds.items()}
