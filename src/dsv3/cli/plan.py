"""`dsv3 plan`: what a layout would do, before any GPU is rented."""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import click

from dsv3.cli.options import PATH, json_option
from dsv3.errors import UserError
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.parallel.pipeline.simulator import Costs, Timeline, peak_activations, simulate


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
@click.argument("recipe", type=PATH, required=False)
@click.argument("overrides", nargs=-1)
@click.option("--schedule", "name", default="dual_pipe_v", help="one_f_one_b, zero_bubble, dual_pipe or dual_pipe_v.")
@click.option("--pipeline", "ranks", type=int, default=1, help="Ranks of the pipeline.")
@click.option(
    "--microbatches", "micro_batches", type=int, help="Micro-batches a step; a recipe's follow from its batch."
)
@click.option("--costs", type=CostsOption(), help="Times of the passes of a chunk, in any unit; by default 1,2,1,3.")
@click.option("--data", type=int, default=1, help="With a recipe: data-parallel ranks of each stage.")
@click.option("--expert", type=int, default=1, help="With a recipe: those among them that share the experts.")
@click.option("--tflops", type=float, default=400.0, help="With a recipe: what a GPU sustains.")
@click.option("--bandwidth", type=float, default=50.0, help="With a recipe: GB/s from one GPU to others.")
@click.option("--out", "path", type=PATH, help="Draw it: a name that ends in .svg or .png.")
@json_option
def plan(
    recipe: Path | None, overrides: tuple[str, ...], name: str, ranks: int, micro_batches: int | None, costs: Costs | None,
    data: int, expert: int, tflops: float, bandwidth: float, path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """What training RECIPE [key=value ...] on many GPUs would take: memory, time and bubble of a step, wire traffic.

    Without a recipe: time, bubble and activations of a pipeline schedule alone. With --out the schedule's picture.
    """
    if (recipe is None) == (micro_batches is None) or (recipe is not None and costs is not None):
        raise UserError(
            "expected a recipe, whose micro-batches and costs follow from its network, or --microbatches (and --costs) without one"
        )
    if recipe is not None:
        schedule, timeline, figures, unit = plan_recipe(
            recipe, overrides, name, (ranks, data, expert), tflops * 1e12, bandwidth * 1e9, as_json
        )
    else:
        assert micro_batches is not None
        costs = costs or Costs()
        schedule, unit = make_schedule(name, ranks, micro_batches), ""
        timeline = simulate(schedule.programs, costs)
        figures = {"costs": astuple(costs)}
    peaks = [peak_activations(program) for program in schedule.programs]
    total, bubble = timeline.total, timeline.bubble
    count = len({each for rank in range(schedule.ranks) for each in schedule.micro_batches(rank, 0)})
    if as_json:
        common = {"schedule": name, "ranks": ranks, "stages": schedule.stages, "micro_batches": count}
        measured = {"time": total, "bubble": bubble, "bubble_share": bubble / total, "peak_activations": peaks}
        click.echo(json.dumps(common | figures | measured, indent=2))
    else:
        click.echo(
            f"{name}: {schedule.stages} stages on {ranks} ranks, {count} micro-batches: time {total:.4g}{unit}, bubble "
            f"{bubble:.4g}{unit} ({bubble / total:.1%}), activations of at most {max(peaks)} chunks a rank"
        )
    if path is not None:
        from dsv3.stages.drawing import save
        from dsv3.stages.pipeline_chart import draw_schedule

        save(lambda: draw_schedule(schedule, timeline), path)
        click.echo(f"drawn: {path}", err=as_json)


def plan_recipe(
    path: Path, overrides: Sequence[str], name: str, layout: tuple[int, int, int], rate: float, bandwidth: float,
    as_json: bool,
) -> tuple[Schedule, Timeline, dict[str, Any], str]:  # fmt: skip
    """The plan of a recipe at its last batch size, on (pipeline, data, expert) ranks: prints what a schedule alone has not."""
    from dsv3.planning.parallel import make_plan
    from dsv3.recipe.schedule import Schedules
    from dsv3.recipe.schema import Recipe

    recipe = Recipe.load(path, overrides)
    training, (pipeline, data, expert) = recipe.training, layout
    schedules = Schedules.resolve(recipe)
    batch = schedules.batch_size.at(schedules.total_steps - 1, training.tokens - 1)
    found = make_plan(
        recipe.model.config(), name, pipeline=pipeline, data=data, expert=expert, batch=batch,
        micro_batch=training.micro_batch_size or 1, length=recipe.data.sequence_length, rate=rate, bandwidth=bandwidth,
        recompute=training.recompute, moment_bytes=2 if recipe.optimizer.moments == "bf16" else 4,
        fp8=training.precision == "fp8",
    )  # fmt: skip
    memory = [found.memory(rank) for rank in range(pipeline)]
    wire = {
        "dispatch of a block": found.dispatch_bytes,
        "combine of a block": found.combine_bytes,
        "activation to the next stage": found.message_bytes,
        "gradients and weights of a step": max(found.zero_bytes(rank) for rank in range(pipeline)),
    }
    if not as_json:
        from dsv3.cli.ui import print_table

        head = ["rank", "blocks", "parameters", "weights", "gradients", "moments", "activations", "GB in all"]
        rows = [
            (
                str(rank),
                " ".join(each.blocks),
                f"{each.parameters / 1e9:.2f}B",
                *(f"{size / 1e9:.1f}" for size in sizes),
            )
            for rank, each in enumerate(memory)
            for sizes in [(each.weights, each.gradients, each.moments, each.activations, each.total)]
        ]
        click.echo(f"{path}: {pipeline * data:,} GPUs, batches of {batch:,} sequences")
        print_table(head, [rows], left=(1,))
        for what, size in wire.items():
            click.echo(f"  {what}: {size / 1e6:,.1f} MB from each GPU")
    figures = {"memory": [{**asdict(each), "total": each.total} for each in memory], "wire_bytes": wire}
    return found.schedule, found.timeline, figures, " s"
