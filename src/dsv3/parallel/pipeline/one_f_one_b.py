"""1F1B (PipeDream-Flush; Narayanan et al. 2021): as many forward passes as there are stages to come, then one of each."""

from dsv3.parallel.pipeline.instructions import Backward, Compute, Forward
from dsv3.parallel.pipeline.schedule import Schedule, at_least


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """One stage a rank; bubble (P - 1)(F + B), activations of at most P micro-batches. Any numbers from 1 up."""
    at_least(1, "1F1B", ranks, micro_batches)
    return Schedule.of("one_f_one_b", ranks, [program(rank, ranks, micro_batches) for rank in range(ranks)])


def program(rank: int, ranks: int, micro_batches: int) -> list[Compute]:
    """One rank's."""
    ahead = min(ranks - rank - 1, micro_batches)
    made: list[Compute] = [Forward(rank, i) for i in range(ahead)]
    for i in range(ahead, micro_batches):
        made += [Forward(rank, i), Backward(rank, i - ahead)]
    return made + [Backward(rank, i) for i in range(micro_batches - ahead, micro_batches)]
