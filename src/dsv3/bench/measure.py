"""How a benchmark measures: sides take turns in one process, and their ratio is taken round by round.

Speeds drift on every machine, between runs by more than most differences worth knowing. A ratio of two times of the same
round drifts far less.
"""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from dsv3.errors import RunError, UserError
from dsv3.ops.kernels.available import no_kernels
from dsv3.stages.machine import command, machine, versions

T = TypeVar("T")
Work = Callable[[], object]
"""One turn of one side."""
Progress = Callable[..., None]
"""Called as `progress(stage=..., done=..., total=...)` after every round."""


@dataclass(frozen=True)
class Spread:
    """A figure over all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median, minimum and maximum."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One side in one setting."""

    name: str
    group: str
    """What compared rows have in common, such as the batch."""
    tokens_per_second: Spread
    figures: Mapping[str, float]
    """Other figures at the median speed: name with its unit -> value."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster `ours` is than `theirs`, in the same rounds."""

    title: str
    ours: str
    theirs: str
    value: Spread
    target: float | None = None
    """What the median should reach."""


@dataclass(frozen=True)
class Result:
    """All of one benchmark, as its JSON file holds it."""

    benchmark: str
    shapes: Mapping[str, Any]
    rows: Sequence[Row]
    ratios: Sequence[Ratio]
    checks: Mapping[str, str]
    """Evidence that the sides computed the same."""
    machine: Mapping[str, str] = field(default_factory=lambda: machine(torch.device("cpu")))
    versions: Mapping[str, str] = field(default_factory=versions)
    command: str = field(default_factory=command)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear() -> None:
    """Frees the memory that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def about(device: torch.device) -> dict[str, Any]:
    """Where results come from, as every file of them says."""
    return {"machine": machine(device), "versions": versions(), "command": command()}


def gpu(what: str) -> torch.device:
    """The current GPU, for the command `what`; `UserError` when there is none that runs the kernels."""
    if not torch.cuda.is_available():
        raise UserError(f"{what} measures a GPU, and found none: it needs one of compute capability 9.0")
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := no_kernels(device)) is not None:
        raise UserError(f"{what} cannot run on {torch.cuda.get_device_name(device)}: it {reason}")
    return device


def track(items: Collection[T], stage: str, progress: Progress) -> Iterator[T]:
    """The items, with progress before the first and after each."""
    progress(stage=stage, done=0, total=len(items))
    for number, each in enumerate(items, 1):
        yield each
        progress(stage=stage, done=number, total=len(items))


def take_turns(
    sides: Mapping[str, Work],
    rounds: int,
    progress: Progress = lambda **_: None,
    stage: str = "rounds",
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each side's turn in each round, after one round that does not count.

    `prepare` is called before each turn, with the side's name. Every other round goes through the sides backwards, so that a steady
    drift favours nobody.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            prepare(name)
            started = clock()
            sides[name]()
            elapsed = clock() - started
            if number > 0:
                seconds[name].append(elapsed)
        progress(stage=stage, done=number, total=rounds)
    return seconds


def ratio(
    title: str, seconds: Mapping[str, Sequence[float]], ours: str, theirs: Sequence[str], target: float | None
) -> Ratio:
    """`ours` against the fastest of `theirs` by its median."""
    best = min(theirs, key=lambda name: statistics.median(seconds[name]))
    return Ratio(title, ours, best, times_faster(seconds[ours], seconds[best]), target)


def agree(what: str, found: Mapping[str, float], tolerance: float) -> None:
    """Raises `RunError` when a side's figure differs from the first one's by more than this share of it."""
    (first, expected), *others = found.items()
    for name, value in others:
        if not abs(value - expected) <= tolerance * abs(expected):
            raise RunError(f"the sides do not compute the same: the {what} of {name} is {value}, of {first} {expected}")


def times_faster(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times faster, from the seconds of each round."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])
