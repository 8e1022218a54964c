"""1F1B (PipeDream-Flush; Narayanan et al. 2021): micro-batches all enter at the first stage, and backward passes go first.

A rank's order is that of a run in which a forward pass takes 1, a backward pass 2, a micro-batch enters every 3 units, and
nobody waits. With a stage a rank that is as many forward passes as there are stages to come, then one of each. Whatever
stages the ranks hold, passes are in the order of that run's clock, so no rank can wait for one behind its own.
"""

from dsv3.parallel.pipeline.instructions import Backward, Compute, Forward
from dsv3.parallel.pipeline.schedule import Placement, Schedule


def one_f_one_b(ranks: int, micro_batches: int, placement: Placement | None = None) -> Schedule:
    """By default one stage a rank; bubble (P - 1)(F + B), activations of at most P micro-batches. Any numbers from 1 up.

    Over the `placement` of another schedule, as a batch with too few micro-batches for that one needs it: micro-batches travel up
    the ranks, and where stages are left (DualPipeV's) down again. DualPipe's second copies then compute nothing, and bubble and
    activations are as above; DualPipeV's ranks wait (P - 1)(F + 2B) from P micro-batches on, with at most 2P + 1 chunks of half the size.
    """
    placement = placement or tuple((rank,) for rank in range(ranks))
    stages = 1 + max(map(max, placement))

    def clock(each: Forward | Backward) -> tuple[int, int]:
        first = each.stage if isinstance(each, Forward) else stages + 2 * (stages - 1 - each.stage)
        return first + 3 * each.micro_batch, each.stage

    def program(rank: int) -> list[Compute]:
        own = {rank, 2 * ranks - 1 - rank} & set(range(stages))
        passes: list[Forward | Backward] = [
            kind(stage, i) for stage in own for i in range(micro_batches) for kind in (Forward, Backward)
        ]
        return [*sorted(passes, key=clock)]

    return Schedule.of("one_f_one_b", placement, [program(rank) for rank in range(ranks)])
