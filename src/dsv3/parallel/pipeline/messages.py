"""The messages of a schedule: which rank sends what to which, and when, follows from what the ranks compute.

All passes and messages of a batch are put into one order in time, that of a run with the report's durations, each message right
after the pass that makes it. Every rank sends and receives in that order. So the first message still to come always finds both
its ranks ready for it, even if each rank waits for every message before it goes on: there can be no deadlock, and two ranks
agree on the order of what they exchange.
"""

from collections.abc import Sequence
from itertools import pairwise

from dsv3.parallel.pipeline.instructions import (
    Compute,
    Forward,
    Instruction,
    Message,
    Program,
    Receive,
    Send,
    WeightGradient,
    What,
    chunks,
)
from dsv3.parallel.pipeline.simulator import Costs, inputs, made, simulate


def with_messages(programs: Sequence[Sequence[Compute]]) -> list[list[Instruction]]:
    """The programs with `Send` and `Receive`."""
    timeline = simulate(programs, Costs())
    spans = [(rank, span) for rank, each in enumerate(timeline.spans) for span in each]
    ready = {made(each): (rank, span.end) for rank, span in spans for each in chunks(span.instruction)}
    last = max(each.stage for each in ready)
    # By time; at one time messages before passes, which begin then; and then by anything that all ranks agree on.
    events: list[tuple[tuple[float, bool, int, int, int], int, Instruction]] = []
    for rank, span in spans:
        events.append(((span.start, True, rank, 0, 0), rank, span.instruction))
        for each in chunks(span.instruction):
            for need in inputs(each, last) if not isinstance(each, WeightGradient) else []:
                source, end = ready[need]
                if source != rank:
                    what: What = "activation" if isinstance(each, Forward) else "gradient"
                    about, at = (what, each.stage, each.micro_batch), (end, False, each.stage, each.micro_batch, source)
                    events += [(at, source, Send(*about, rank)), (at, rank, Receive(*about, source))]
    found: list[list[Instruction]] = [[] for _ in programs]
    for _, rank, instruction in sorted(events, key=lambda event: event[0]):
        found[rank].append(instruction)
    return found


def grouped(program: Program) -> list[list[Instruction]]:
    """A program in groups: a pass alone, consecutive messages together."""
    groups: list[list[Instruction]] = []
    for before, each in pairwise([None, *program]):
        if isinstance(before, Message) and isinstance(each, Message):
            groups[-1].append(each)
        elif each is not None:
            groups.append([each])
    return groups
