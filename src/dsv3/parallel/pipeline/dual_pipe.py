"""DualPipe (report, section 3.2.1): micro-batches enter at both ends, and meet in overlapped pairs of passes.

Every rank holds two stages, one of each direction. What enters nearest to a rank is its flow 0, the other its flow 1. The
eight phases are those of DeepSeek's own repository, DualPipe; DualPipeV is the same seen from one rank of a half.
"""

from collections import deque

from dsv3.parallel.pipeline.instructions import Backward, Compute, Forward, InputGradient, Overlapped, WeightGradient
from dsv3.parallel.pipeline.schedule import Schedule


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


class Flows:
    """The two flows of micro-batches through a rank, and its program as it grows."""

    def __init__(self, stages: tuple[int, int], first: tuple[int, int]):
        self.stages = stages
        self.forwards, self.backwards = list(first), list(first)
        self.deferred: deque[InputGradient] = deque()
        self.made: list[Compute] = []

    def program(self, depth: int, half: int, each: int) -> list[Compute]:
        """The eight phases of a rank with `depth` others between it and its end, of `half` ranks; `each` flow has so many
        micro-batches."""
        outer, inner = half - depth - 1, depth + 1
        for _ in range(2 * outer):  # 1
            self.forward(0)
        for _ in range(inner):  # 2
            self.forward(0)
            self.forward(1)
        for _ in range(outer):  # 3
            self.input_gradient(1)
            self.weight_gradient()
            self.forward(1)
        for i in range(each - 2 * half + inner):  # 4
            if i == 0 and outer == 0:
                # The rank in the middle has just sent what it waits for: there is nothing to overlap yet.
                self.forward(0)
                self.backward(1)
            else:
                self.pair(0, 1)
            self.pair(1, 0)
        for _ in range(outer):  # 5
            self.backward(1)
            self.pair(1, 0)
        for i in range(inner):  # 6: from its middle on, weight gradients wait
            for flow in (1, 0):
                late = 2 * i + (flow == 0) >= inner
                self.input_gradient(flow) if late else self.backward(flow)
        for _ in range(outer):  # 7
            self.weight_gradient()
            self.input_gradient(0)
        for _ in range(inner):  # 8
            self.weight_gradient()
        return self.made

    def next(self, numbers: list[int], flow: int) -> tuple[int, int]:
        """(stage, micro-batch) of the flow's next pass of a kind."""
        numbers[flow] += 1
        return self.stages[flow], numbers[flow] - 1

    def forward(self, flow: int) -> None:
        """F."""
        self.made.append(Forward(*self.next(self.forwards, flow)))

    def backward(self, flow: int) -> None:
        """B."""
        self.made.append(Backward(*self.next(self.backwards, flow)))

    def pair(self, forward: int, backward: int) -> None:
        """F&B."""
        passes = Forward(*self.next(self.forwards, forward)), Backward(*self.next(self.backwards, backward))
        self.made.append(Overlapped(*passes))

    def input_gradient(self, flow: int) -> None:
        """B without W."""
        self.deferred.append(InputGradient(*self.next(self.backwards, flow)))
        self.made.append(self.deferred[-1])

    def weight_gradient(self) -> None:
        """The oldest W that waits."""
        oldest = self.deferred.popleft()
        self.made.append(WeightGradient(oldest.stage, oldest.micro_batch))
