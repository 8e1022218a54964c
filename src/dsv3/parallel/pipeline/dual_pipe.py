"""DualPipe (report, section 3.2.1): micro-batches enter at both ends, and meet in overlapped pairs of passes.

Every rank holds two stages, one of each direction. What enters nearest to a rank is its flow 0, the other its flow 1. The
eight phases are those of DeepSeek's own repository, DualPipe, as is DualPipeV, the same seen from one rank of a half.
"""

from collections import deque
from typing import TypeVar

from dsv3.parallel.pipeline.instructions import (
    Backward,
    Chunk,
    Compute,
    Forward,
    InputGradient,
    Overlapped,
    WeightGradient,
)
from dsv3.parallel.pipeline.schedule import Schedule

T = TypeVar("T", bound=Chunk)


def dual_pipe(ranks: int, micro_batches: int) -> Schedule:
    """As many stages as ranks, each held twice: by rank s for the first half of the micro-batches, which travel upwards, and
    by rank P - 1 - s for the second half.

    Bubble (P/2 - 1)(F&B + B - 3W), activations of at most P + 1 chunks. Needs an even number of ranks, and an even number of
    micro-batches from 2P on.
    """
    half, each = ranks // 2, micro_batches // 2
    programs = []
    for rank in range(ranks):
        depth = min(rank, ranks - 1 - rank)
        first = (0, each) if rank < half else (each, 0)
        programs.append(Flows((depth, ranks - 1 - depth), first).program(depth, half, each))
    placement = tuple(tuple(sorted((rank, ranks - 1 - rank))) for rank in range(ranks))
    return Schedule.of("dual_pipe", placement, programs)


def dual_pipe_v(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe's rank and its mirror image in one, so that no stage is held twice: of 2P stages rank r holds r and 2P - 1 - r.

    Micro-batches go down the ranks through the first half of the stages, and up again through the second.

    Bubble (P - 1)(F&B + B - 3W), activations of at most 2P + 1 chunks. Needs at least 2P micro-batches.
    """
    placement = tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    flows = (Flows(stages, (0, 0)) for stages in placement)
    programs = [each.program(rank, ranks, micro_batches) for rank, each in enumerate(flows)]
    return Schedule.of("dual_pipe_v", placement, programs)


class Flows:
    """The two flows of micro-batches through a rank, and its program as it grows."""

    def __init__(self, stages: tuple[int, int], first: tuple[int, int]):
        self.stages = stages
        self.forwards, self.backwards = list(first), list(first)
        self.deferred: deque[Chunk] = deque()
        """Passes whose weight gradients wait."""
        self.made: list[Compute] = []

    def program(self, depth: int, half: int, each: int) -> list[Compute]:
        """The eight phases of a rank with `depth` others between it and its end, of `half` ranks; `each` flow has so many
        micro-batches."""
        outer, inner = half - depth - 1, depth + 1
        for _ in range(2 * outer):  # 1
            self.add(Forward, 0)
        for _ in range(inner):  # 2
            self.add(Forward, 0)
            self.add(Forward, 1)
        for _ in range(outer):  # 3
            self.add(InputGradient, 1)
            self.weight_gradient()
            self.add(Forward, 1)
        for i in range(each - 2 * half + inner):  # 4
            if i == 0 and outer == 0:
                # The rank in the middle has just sent what it waits for: there is nothing to overlap yet.
                self.add(Forward, 0)
                self.add(Backward, 1)
            else:
                self.pair(0, 1)
            self.pair(1, 0)
        for _ in range(outer):  # 5
            self.add(Backward, 1)
            self.pair(1, 0)
        for i in range(inner):  # 6: from its middle on, weight gradients wait
            for flow in (1, 0):
                late = 2 * i + (flow == 0) >= inner
                self.add(InputGradient if late else Backward, flow)
        for _ in range(outer):  # 7
            self.weight_gradient()
            self.add(InputGradient, 0)
        for _ in range(inner):  # 8
            self.weight_gradient()
        return self.made

    def next(self, kind: type[T], flow: int) -> T:
        """The flow's next pass of a kind; the three kinds of backward passes count together."""
        numbers = self.forwards if kind is Forward else self.backwards
        numbers[flow] += 1
        return kind(self.stages[flow], numbers[flow] - 1)

    def add(self, kind: type[Forward | Backward | InputGradient], flow: int) -> None:
        """One pass alone."""
        made = self.next(kind, flow)
        self.made.append(made)
        if kind is InputGradient:
            self.deferred.append(made)

    def pair(self, forward: int, backward: int) -> None:
        """A forward and a backward pass, overlapped; of these flows."""
        self.made.append(Overlapped(self.next(Forward, forward), self.next(Backward, backward)))

    def weight_gradient(self) -> None:
        """The oldest weight gradient that waits."""
        oldest = self.deferred.popleft()
        self.made.append(WeightGradient(oldest.stage, oldest.micro_batch))
