"""`dsv3 pretrain`: a recipe from text to a trained model; `dsv3 extend`: a trained model to a greater context length."""

import json
import os
from pathlib import Path
from typing import Any

import click

from dsv3.cli.eval import print_scores
from dsv3.cli.options import PATH, at_option, several
from dsv3.cli.run import Stages, is_first_rank, overrides_argument, run_recipe
from dsv3.cli.schedule import show_schedules
from dsv3.errors import UserError

training_options = several(
    click.argument("recipe", type=PATH),
    overrides_argument,
    click.option("--resume", is_flag=True, help="Continue the run in --out from its newest checkpoint."),
    click.option(
        "--allow",
        default="",
        show_default=False,
        metavar="KEY,...",
        help="With --resume: keys of the recipe, or sections, that may differ although they change the result.",
    ),
    click.option(
        "--out", type=PATH, help="Where everything goes; below runs/, named after the recipe, when not given."
    ),
    click.option("--dry-run", is_flag=True, help="Print and draw the schedules, and train nothing."),
    at_option("With --dry-run: also the values at 10T; several times."),
    click.option("--plot", type=PATH, help="With --dry-run: draw the schedules, .svg or .png."),
)


@click.command()
@training_options
def pretrain(recipe: Path, out: Path | None, **options: Any) -> None:
    """Trains RECIPE (a TOML file), with any KEY=VALUE of it replaced, for instance optimizer.weight_decay=0.05.

    Ctrl-C finishes the step and saves; --resume continues, also with a longer training or other checkpoints. Prints
    the last scores; figures, checkpoints and TensorBoard files are in OUT/pretrain.
    """
    out = out or Path("runs") / recipe.resolve().parent.name
    train("pretrain", recipe, out, f"`dsv3 report {out}` makes a page of the run.", **options)


@click.command()
@training_options
def extend(recipe: Path, out: Path | None, **options: Any) -> None:
    """One phase of context extension: RECIPE's [extension] names the run that it starts from.

    Any KEY=VALUE of the recipe is replaced, for instance extension.initial_from=runs/mine. Ctrl-C finishes the step and
    saves; --resume continues. Figures and checkpoints are in OUT/extend.
    """
    out = out or Path("runs") / recipe.resolve().parent.name / recipe.stem
    train("extend", recipe, out, f"`dsv3 eval {out} --tasks needle,position` scores it.", **options)


def train(
    stage: Stages, recipe: Path, out: Path, next_step: str, *,
    overrides: tuple[str, ...], resume: bool, allow: str, dry_run: bool, at: tuple[int, ...], plot: Path | None,
) -> None:  # fmt: skip
    """Begins a run in a new directory, or continues one in its own; or shows what it would do."""
    if dry_run:
        show_schedules(recipe, overrides, at, plot)
        return
    if at or plot is not None:
        raise UserError("--at and --plot belong to --dry-run: add it, or leave them out")
    # `torchrun --max-restarts` starts every rank again when one has ended.
    resume = resume or (os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (out / "stages").is_dir())
    if allow and not resume:
        raise UserError("--allow says what may differ from the run that is continued: add --resume, or leave it out")
    if (out / stage).exists() and not resume:
        raise UserError(f"{out} holds a run already: add --resume to continue it, or name another directory with --out")
    if resume and not (out / "stages").is_dir():
        raise UserError(
            f"{out} holds no run to continue: leave --resume out to begin one, or name its directory with --out"
        )
    allowed = [name.strip() for name in allow.split(",") if name.strip()]
    run_recipe(stage, recipe, overrides, out, allow=allowed)
    if is_first_rank():
        print_scores(json.loads((out / stage / "evaluations.jsonl").read_text().splitlines()[-1]))
        click.echo(f"\nThe model is in {out / stage / 'checkpoints'}; {next_step}")
