"""DualPipeV (DeepSeek's DualPipe repository): DualPipe's rank and its mirror image in one, so that no stage is held twice.

Micro-batches go down the ranks through the first half of the stages, and up again through the second.
"""

from dsv3.parallel.pipeline.dual_pipe import Flows
from dsv3.parallel.pipeline.schedule import Schedule


def dual_pipe_v(ranks: int, micro_batches: int) -> Schedule:
    """Twice as many stages as ranks: rank r holds stages r and 2P - 1 - r, the first rank both ends of the network.

    Bubble (P - 1)(F&B + B - 3W), activations of at most 2P + 1 chunks. Needs at least 2P micro-batches.
    """
    placement = tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    flows = (Flows(stages, (0, 0)) for stages in placement)
    programs = [each.program(rank, ranks, micro_batches) for rank, each in enumerate(flows)]
    return Schedule.of("dual_pipe_v", placement, programs)
