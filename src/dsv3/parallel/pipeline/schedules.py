"""The schedules by name, as recipes and the command line know them."""

from collections.abc import Callable

from dsv3.errors import UserError, nearest
from dsv3.parallel.pipeline.dual_pipe import dual_pipe
from dsv3.parallel.pipeline.dual_pipe_v import dual_pipe_v
from dsv3.parallel.pipeline.one_f_one_b import one_f_one_b
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.zero_bubble import zero_bubble

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "one_f_one_b": one_f_one_b,
    "zero_bubble": zero_bubble,
    "dual_pipe": dual_pipe,
    "dual_pipe_v": dual_pipe_v,
}


def make_schedule(name: str, ranks: int, micro_batches: int) -> Schedule:
    """The schedule of that name; `UserError` for another name, or for numbers that it cannot serve."""
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule {name!r}: {nearest(name, SCHEDULES)}")
    return SCHEDULES[name](ranks, micro_batches)
