"""The schedules by name, as recipes and the command line know them."""

from collections.abc import Callable

from dsv3.errors import UserError, nearest
from dsv3.parallel.pipeline.dual_pipe import dual_pipe, dual_pipe_v
from dsv3.parallel.pipeline.one_f_one_b import one_f_one_b
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.zero_bubble import zero_bubble
from dsv3.recipe.parallel import check_ranks, fitting_counts, least_micro_batches

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "one_f_one_b": one_f_one_b,
    "zero_bubble": zero_bubble,
    "dual_pipe": dual_pipe,
    "dual_pipe_v": dual_pipe_v,
}


def make_schedule(name: str, ranks: int, micro_batches: int, below: str | None = None) -> Schedule:
    """The schedule of that name (`parallel.schedule`) for one batch; `UserError` for another name, or numbers that it cannot serve.

    Where `below` is given (`parallel.schedule_below`) and there are fewer micro-batches than the named one needs, the result is 1F1B
    over the same placement: every rank holds the same stages at each batch size, so a trainer makes its modules once and
    asks for a schedule whenever the batch size has changed.
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule {name!r}: {nearest(name, SCHEDULES)}")
    check_ranks(name, ranks)
    if below is not None and 1 <= micro_batches < (least := least_micro_batches(name, ranks)):
        return one_f_one_b(ranks, micro_batches, SCHEDULES[name](ranks, least).placement)
    if micro_batches not in (fitting := fitting_counts(name, ranks, micro_batches)):
        raise UserError(
            f"{name} on {ranks} ranks with {micro_batches} micro-batches: expected {' or '.join(map(str, fitting))}, or one_f_one_b, "
            "which takes any number"
        )
    return SCHEDULES[name](ranks, micro_batches)
