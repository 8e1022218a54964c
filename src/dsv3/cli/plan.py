"""`dsv3 plan`: what a layout would do, before any GPU is rented."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import click

from dsv3.cli.options import PATH, json_option
from dsv3.errors import UserError
from dsv3.parallel.pipeline.simulator import Costs


class CostsOption(click.ParamType):
    """`1,2,1,3` -> `Costs(1, 2, 1, 3)`."""

    name = "F,B,W,F&B[,MESSAGE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Costs:
        """Raises `UserError` for what is no such list."""
        try:
            numbers = [float(each) for each in value.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (4, 5) or min(numbers) < 0 or not 0 < numbers[2] < numbers[1]:
            raise UserError(
                f"--costs {value!r}: expected the times of a forward pass, a backward pass, its part for weights (shorter), and "
                "an overlapped pair, with commas between, such as 1,2,1,3; a fifth is a message's"
            )
        return Costs(*numbers)


@click.command()
@click.option("--schedule", "name", required=True, help="one_f_one_b, zero_bubble, dual_pipe or dual_pipe_v.")
@click.option("--pipeline", "ranks", type=int, required=True, help="Ranks of the pipeline.")
@click.option("--microbatches", "micro_batches", type=int, required=True, help="Micro-batches a step.")
@click.option("--costs", type=CostsOption(), default="1,2,1,3", help="Times of the passes of a chunk, in any unit.")
@click.option("--out", "path", type=PATH, help="Draw it: a name that ends in .svg or .png.")
@json_option
def plan(name: str, ranks: int, micro_batches: int, costs: Costs, path: Path | None, as_json: bool) -> None:
    """Time, bubble and activations of a pipeline schedule; with --out its picture."""
    from dsv3.parallel.pipeline.schedules import make_schedule
    from dsv3.parallel.pipeline.simulator import peak_activations, simulate

    schedule = make_schedule(name, ranks, micro_batches)
    timeline = simulate(schedule.programs, costs)
    peaks = [peak_activations(program) for program in schedule.programs]
    figures = {
        "schedule": name,
        "ranks": ranks,
        "stages": schedule.stages,
        "micro_batches": micro_batches,
        "costs": astuple(costs),
        "time": timeline.total,
        "bubble": timeline.bubble,
        "bubble_share": timeline.bubble / timeline.total,
        "peak_activations": peaks,
    }
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        click.echo(
            f"{name}: {schedule.stages} stages on {ranks} ranks, {micro_batches} micro-batches: time {timeline.total:g}, bubble "
            f"{timeline.bubble:g} ({timeline.bubble / timeline.total:.1%}), activations of at most {max(peaks)} chunks a rank"
        )
    if path is not None:
        from dsv3.stages.drawing import save
        from dsv3.stages.pipeline_chart import draw_schedule

        save(lambda: draw_schedule(schedule, timeline), path)
        click.echo(f"drawn: {path}", err=as_json)
