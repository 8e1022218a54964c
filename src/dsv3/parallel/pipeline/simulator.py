"""When every instruction of a schedule begins and ends, from what the passes cost: bubble, activations, deadlocks.

A rank computes in the order of its program; a pass begins when the rank is free and what it needs has arrived. Messages travel
beside the computation and take the time they are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dsv3.errors import RunError
from dsv3.parallel.pipeline.instructions import (
    Backward,
    Chunk,
    Compute,
    Forward,
    InputGradient,
    Instruction,
    Message,
    Overlapped,
    Program,
    WeightGradient,
    chunks,
)


@dataclass(frozen=True)
class Costs:
    """Seconds, or any unit, of the passes of one chunk. The defaults are the assumptions of the report's Table 2."""

    forward: float = 1.0
    backward: float = 2.0
    """Input and weights."""
    weight_gradient: float = 1.0
    pair: float = 3.0
    """A forward and a backward pass, overlapped."""
    message: float = 0.0
    """Between two stages on different ranks."""

    def of(self, each: Chunk) -> float:
        """The duration of a pass."""
        if isinstance(each, Forward):
            return self.forward
        if isinstance(each, WeightGradient):
            return self.weight_gradient
        return self.backward - (self.weight_gradient if isinstance(each, InputGradient) else 0.0)


@dataclass(frozen=True)
class Span:
    """One instruction in time."""

    instruction: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The result of a simulation."""

    spans: tuple[tuple[Span, ...], ...]
    """By rank, in order."""

    @cached_property
    def total(self) -> float:
        """From the start of the batch to the last end."""
        return max((rank[-1].end for rank in self.spans if rank), default=0.0)

    def idle(self, rank: int) -> float:
        """A rank's bubble: time in which it computes nothing."""
        return self.total - sum(each.end - each.start for each in self.spans[rank])

    @property
    def bubble(self) -> float:
        """That of the rank that waits longest."""
        return max(map(self.idle, range(len(self.spans))))


def simulate(programs: Sequence[Program], costs: Costs | Sequence[Costs]) -> Timeline:
    """The timeline of a batch. `costs` are of every stage, or of each.

    Raises `RunError`, naming what each rank waits for, where no rank can go on before all are done.
    """
    computed = [[each for each in program if not isinstance(each, Message)] for program in programs]
    ends: dict[Chunk, tuple[int, float]] = {}
    """By `made`: the rank, and when."""
    last = max((each.stage for program in computed for entry in program for each in chunks(entry)), default=0)
    by_stage = [costs] * (last + 1) if isinstance(costs, Costs) else costs
    free, spans = [0.0] * len(programs), [list[Span]() for _ in programs]
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(computed):
            while len(spans[rank]) < len(program):
                entry = program[len(spans[rank])]
                needs = [need for each in chunks(entry) for need in inputs(each, last)]
                if any(need not in ends for need in needs):
                    break
                arrivals = [
                    at + (by_stage[need.stage].message if source != rank else 0.0)
                    for need in needs
                    for source, at in [ends[need]]
                ]
                start = max([free[rank], *arrivals])
                free[rank] = start + duration(entry, by_stage)
                spans[rank].append(Span(entry, start, free[rank]))
                ends |= {made(each): (rank, free[rank]) for each in chunks(entry)}
                moved = True
    if stuck := [
        f"rank {rank} waits with {program[len(done)]}"
        for rank, (program, done) in enumerate(zip(computed, spans, strict=True))
        if len(done) < len(program)
    ]:
        raise RunError(f"deadlock: {'; '.join(stuck)}")
    return Timeline(tuple(map(tuple, spans)))


def inputs(each: Chunk, last: int) -> list[Chunk]:
    """The passes that must be done before this one starts."""
    stage, micro_batch = each.stage, each.micro_batch
    if isinstance(each, Forward):
        return [Forward(stage - 1, micro_batch)] if stage else []
    if isinstance(each, WeightGradient):
        return [InputGradient(stage, micro_batch)]
    own = Forward(stage, micro_batch)
    return [own] if stage == last else [own, InputGradient(stage + 1, micro_batch)]


def made(each: Chunk) -> Chunk:
    """The name under which others wait for a pass: a whole backward pass counts as its first half, `InputGradient`."""
    return InputGradient(each.stage, each.micro_batch) if isinstance(each, Backward) else each


def duration(entry: Compute, costs: Sequence[Costs]) -> float:
    """The duration of an instruction; of a pair, the mean of its two stages'."""
    if isinstance(entry, Overlapped):
        return (costs[entry.forward.stage].pair + costs[entry.backward.stage].pair) / 2
    return costs[entry.stage].of(entry)


def peak_activations(program: Sequence[Instruction]) -> int:
    """The most chunks whose activations a rank holds at once, from the forward pass to the last gradient."""
    live = peak = 0
    for entry in program:
        passes = list(chunks(entry))
        live += sum(isinstance(each, Forward) for each in passes)
        peak = max(peak, live)
        live -= sum(isinstance(each, Backward | WeightGradient) for each in passes)
    return peak
