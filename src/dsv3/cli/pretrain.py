"""`dsv3 pretrain`: a recipe from text to a trained model."""

from pathlib import Path

import click

from dsv3.cli.run import out_option, overrides_argument, run_recipe
from dsv3.errors import UserError


@click.command(short_help="Train a recipe's model: tokenizer, shards, training.")
@click.argument("recipe", type=click.Path(path_type=Path))
@overrides_argument
@click.option("--resume", is_flag=True, help="Continue the run in --out from its newest checkpoint.")
@click.option(
    "--allow",
    default="",
    metavar="KEY,...",
    help="With --resume: keys of the recipe, or sections, that may differ although they change the result.",
)
@out_option(None)
def pretrain(recipe: Path, overrides: tuple[str, ...], resume: bool, allow: str, out: Path | None) -> None:
    """Trains RECIPE (a TOML file), with any KEY=VALUE of it replaced, for instance optimizer.weight_decay=0.05.

    Ctrl-C finishes the step and saves; --resume continues, also with a longer training or other checkpoints. Figures, checkpoints and TensorBoard files are in OUT/pretrain.
    """
    out = out or Path("runs") / recipe.resolve().parent.name
    if allow and not resume:
        raise UserError("--allow says what may differ from the run that is continued: add --resume, or leave it out")
    if (out / "pretrain").exists() and not resume:
        raise UserError(f"{out} holds a run already: add --resume to continue it, or name another directory with --out")
    if resume and not (out / "stages").is_dir():
        raise UserError(
            f"{out} holds no run to continue: leave --resume out to begin one, or name its directory with --out"
        )
    allowed = [name.strip() for name in allow.split(",") if name.strip()]
    run_recipe(recipe, overrides, [], out, report=False, replace=False, allow=allowed)
    click.echo(f"\nThe model is in {out / 'pretrain' / 'checkpoints'}; `dsv3 report {out}` makes a page of the run.")
