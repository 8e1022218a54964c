"""`--dry-run`: what a recipe would do at every point of its training, without doing any of it."""

from collections.abc import Sequence
from pathlib import Path

import click

from dsv3.cli.ui import print_table


def show_schedules(recipe_path: Path, overrides: Sequence[str], at: Sequence[int], plot: Path | None) -> None:
    """Prints every schedule's value where one of them changes its course and at the points asked for; draws them."""
    from dsv3.recipe.points import points_of
    from dsv3.recipe.schedule import Schedules
    from dsv3.recipe.schema import Recipe

    recipe = Recipe.load(recipe_path, overrides)
    schedules, total = Schedules.resolve(recipe), recipe.training.tokens
    rows = [
        (
            f"{point.tokens:,}", f"{point.step:,}", f"{point.learning_rate:.4g}", f"{point.batch_size:,}",
            f"{point.mtp_weight:g}", f"{point.bias_update_speed:g}", ", ".join(point.changes).replace("_", " "),
        )
        for point in points_of(schedules, total, at)
    ]  # fmt: skip
    length = recipe.data.sequence_length
    click.echo(f"{recipe_path}: {total:,} tokens in {schedules.total_steps:,} steps, sequences of {length:,}")
    print_table(["tokens", "step", "learning rate", "batch", "MTP weight", "bias speed", "changes"], [rows], left=(6,))
    if plot is not None:
        from dsv3.stages.drawing import save
        from dsv3.stages.schedule_chart import draw_schedules

        save(lambda: draw_schedules(schedules, total), plot)
        click.echo(f"drawn: {plot}")
