"""`dsv3 pretrain`: a recipe from text to a trained model."""

from pathlib import Path

import click

from dsv3.cli.run import allow_option, allowed_names, out_option, overrides_argument, refuse_to_mix, run_recipe
from dsv3.cli.schedule import dry_run, dry_run_options, refuse_without_dry_run


@click.command(short_help="Train a recipe's model: tokenizer, shards, training.")
@click.argument("recipe", type=click.Path(path_type=Path))
@overrides_argument
@click.option("--resume", is_flag=True, help="Continue the run in --out from its newest checkpoint.")
@allow_option
@out_option(None)
@dry_run_options
def pretrain(
    recipe: Path, overrides: tuple[str, ...], resume: bool, allow: str, out: Path | None, dry: bool, at: tuple[str, ...], plot: Path | None,
) -> None:  # fmt: skip
    """Trains RECIPE (a TOML file), with any KEY=VALUE of it replaced, for instance optimizer.weight_decay=0.05.

    Ctrl-C finishes the step and saves; --resume continues, also with a longer training or other checkpoints. Figures, checkpoints and TensorBoard files are in OUT/pretrain.
    """
    if dry:
        dry_run(recipe, overrides, at, plot)
        return
    refuse_without_dry_run(at, plot)
    out = out or Path("runs") / recipe.resolve().parent.name
    allowed = allowed_names(allow, resume)
    refuse_to_mix(out, "pretrain", resume)
    run_recipe(recipe, overrides, [], out, stages="pretrain", replace=False, allow=allowed)
    click.echo(f"\nThe model is in {out / 'pretrain' / 'checkpoints'}; `dsv3 report {out}` makes a page of the run.")
