"""ZB1P, the zero-bubble schedule with the memory of 1F1B (Qi et al. 2023, ZB-H1): weight gradients fill idle time.

1F1B's order, with backward in halves. The stage before waits for the first half alone; rank r runs the second r
micro-batches later, so that the activations it keeps for that are those it has fewer of on the way in.
"""

from dsv3.parallel.pipeline.instructions import Compute, Forward, InputGradient, WeightGradient
from dsv3.parallel.pipeline.schedule import Schedule


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """One stage a rank; bubble (P - 1)(F + B - 2W), activations of at most P micro-batches. Any numbers from 1 up."""
    programs = [program(rank, ranks, micro_batches) for rank in range(ranks)]
    return Schedule.of("zero_bubble", tuple((rank,) for rank in range(ranks)), programs)


def program(rank: int, ranks: int, micro_batches: int) -> list[Compute]:
    """One rank's."""
    ahead = min(ranks - rank - 1, micro_batches)
    made: list[Compute] = [Forward(rank, i) for i in range(ahead)]
    for i in range(micro_batches):
        if i + ahead < micro_batches:
            made.append(Forward(rank, i + ahead))
        made.append(InputGradient(rank, i))
        if i >= rank:
            made.append(WeightGradient(rank, i - rank))
    return made + [WeightGradient(rank, i) for i in range(max(micro_batches - rank, 0), micro_batches)]
