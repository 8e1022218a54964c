"""`--dry-run`: what a recipe would do at every point of its training, without doing any of it."""

from collections.abc import Sequence
from pathlib import Path

import click

from dsv3.errors import UserError


def dry_run_options(command: click.decorators.FC) -> click.decorators.FC:
    """The options that `pretrain` and `extend` share."""
    for option in (
        click.option(
            "--plot", type=click.Path(path_type=Path), help="With --dry-run: draw the schedules, .svg or .png."
        ),
        click.option(
            "--at", multiple=True, metavar="TOKENS", help="With --dry-run: also the values at 10T; several times."
        ),
        click.option("--dry-run", "dry", is_flag=True, help="Print and draw the schedules, and train nothing."),
    ):
        command = option(command)
    return command


def refuse_without_dry_run(at: Sequence[str], plot: Path | None) -> None:
    """A training has no use for these options."""
    if at or plot is not None:
        raise UserError("--at and --plot belong to --dry-run: add it, or leave them out")


def dry_run(recipe_path: Path, overrides: Sequence[str], at: Sequence[str], plot: Path | None) -> None:
    """Prints every schedule's value where one of them changes its course and at the points asked for; draws them."""
    from rich import box
    from rich.table import Table

    from dsv3.cli.ui import table_console
    from dsv3.recipe.points import points_of
    from dsv3.recipe.quantity import parse_quantity
    from dsv3.recipe.schedule import Schedules
    from dsv3.recipe.schema import Recipe

    recipe = Recipe.load(recipe_path, overrides)
    schedules = Schedules.resolve(recipe)
    try:
        asked = [parse_quantity(each) for each in at]
    except ValueError as error:
        raise UserError(f"--at {' '.join(at)}: {error}") from None
    console = table_console()
    length = recipe.data.sequence_length
    tokens = f"{recipe.training.tokens:,} tokens"
    console.print(
        f"{recipe_path}: {tokens} in {schedules.total_steps:,} steps, sequences of {length:,}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("tokens", "step", "learning rate", "batch", "MTP weight", "bias speed", "changes"):
        table.add_column(name, justify="left" if name == "changes" else "right")
    for point in points_of(schedules, recipe.training.tokens, asked):
        table.add_row(
            f"{point.tokens:,}", f"{point.step:,}", f"{point.learning_rate:.4g}", f"{point.batch_size:,}",
            f"{point.mtp_weight:g}", f"{point.bias_update_speed:g}", ", ".join(change.replace("_", " ") for change in point.changes),
        )  # fmt: skip
    console.print(table)
    if plot is not None:
        from dsv3.stages.schedule_chart import draw_schedules

        draw_schedules(schedules, recipe.training.tokens, plot)
        click.echo(f"drawn: {plot}")
