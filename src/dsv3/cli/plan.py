"""`dsv3 plan`: what a layout would do, before any GPU is rented."""

import json
from dataclasses import astuple
from pathlib import Path

import click

from dsv3.cli.options import PATH, Parsed, at_option, json_option
from dsv3.cli.run import overrides_argument
from dsv3.errors import UserError
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.parallel.pipeline.simulator import Costs, Timeline, peak_activations, simulate


def parse_costs(text: str) -> Costs:
    """`1,2,1,3` -> `Costs(1, 2, 1, 3)`; `ValueError` for anything else."""
    try:
        numbers = [float(each) for each in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (4, 5) or min(numbers) < 0 or not 0 < numbers[2] < numbers[1]:
        raise ValueError(
            "expected the times of a forward pass, a backward pass, its part for weights (shorter), and an overlapped pair, with "
            "commas between, such as 1,2,1,3; a fifth is a message's"
        )
    return Costs(*numbers)


@click.command()
@click.argument("recipe", type=PATH, required=False)
@overrides_argument
@at_option("With a recipe: also the step at 100B; several times.")
@click.option("--tflops", type=float, help="With a recipe: what a GPU sustains, 400 by default.")
@click.option(
    "--share", type=PATH, help="Instead of --tflops: layers' times, as `dsv3 bench train --share --json` wrote them."
)
@click.option("--bandwidth", type=float, default=50.0, help="With a recipe: GB/s of a GPU to other nodes.")
@click.option("--nvlink", type=float, default=160.0, help="With a recipe: GB/s of a GPU within its node.")
@click.option("--node", type=int, default=8, help="With a recipe: GPUs of a node.")
@click.option("--schedule", "name", help="Without one: one_f_one_b, zero_bubble, dual_pipe or dual_pipe_v.")
@click.option("--pipeline", "ranks", type=int, help="Without a recipe: ranks of the pipeline.")
@click.option("--microbatches", "micro_batches", type=int, help="Without a recipe: micro-batches a step.")
@click.option(
    "--costs",
    type=Parsed("F,B,W,F&B[,MESSAGE]", parse_costs),
    help="Without a recipe: times of a chunk's passes, in any unit; by default 1,2,1,3.",
)
@click.option("--out", "path", type=PATH, help="Draw the schedule (a recipe's last): a name that ends in .svg or .png.")
@json_option
def plan(
    recipe: Path | None, overrides: tuple[str, ...], at: tuple[int, ...], tflops: float | None, share: Path | None, bandwidth: float,
    nvlink: float, node: int, name: str | None, ranks: int | None, micro_batches: int | None, costs: Costs | None,
    path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """What training RECIPE [key=value ...] on the GPUs of its [parallel] takes: memory, time and bubble of a step, wire traffic.

    Steps are those where the batch size changes its course, and at --at. Without a recipe: time, bubble and activations of a
    pipeline schedule alone. With --out the schedule's picture.
    """
    if recipe is None and name is not None and ranks is not None and micro_batches is not None:
        schedule, timeline = plan_schedule(name, ranks, micro_batches, costs or Costs(), as_json)
    elif recipe is not None and name is ranks is micro_batches is costs is None:
        if tflops is not None and share is not None:
            raise UserError("--tflops and --share both say how fast a GPU computes: leave one out")
        rates = {"flops": (tflops or 400.0) * 1e12, "between": bandwidth * 1e9, "within": nvlink * 1e9}
        if node < 1 or min(rates.values()) <= 0:
            raise UserError("--tflops, --bandwidth, --nvlink, --node: expected numbers above 0")
        from dsv3.cli.plan_recipe import plan_recipe

        schedule, timeline = plan_recipe(recipe, overrides, at, rates, node, share, as_json)
    else:
        raise UserError(
            "expected a recipe, whose layout is in its [parallel] (parallel.pipeline=8, ... after it), or --schedule, --pipeline "
            "and --microbatches without one"
        )
    if path is not None:
        from dsv3.stages.drawing import save
        from dsv3.stages.pipeline_chart import draw_schedule

        save(lambda: draw_schedule(schedule, timeline), path)
        click.echo(f"drawn: {path}", err=as_json)


def plan_schedule(name: str, ranks: int, micro_batches: int, costs: Costs, as_json: bool) -> tuple[Schedule, Timeline]:
    """Prints a schedule's figures, in the unit of `costs`."""
    schedule = make_schedule(name, ranks, micro_batches)
    timeline = simulate(schedule.programs, costs)
    peaks = [peak_activations(program) for program in schedule.programs]
    total, bubble = timeline.total, timeline.bubble
    if as_json:
        found = dict(
            schedule=name, ranks=ranks, stages=schedule.stages, micro_batches=micro_batches, costs=astuple(costs),
            time=total, bubble=bubble, bubble_share=bubble / total, peak_activations=peaks,
        )  # fmt: skip
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(
            f"{name}: {schedule.stages} stages on {ranks} ranks, {micro_batches} micro-batches: time {total:.4g}, bubble "
            f"{bubble:.4g} ({bubble / total:.1%}), activations of at most {max(peaks)} chunks a rank"
        )
    return schedule, timeline
