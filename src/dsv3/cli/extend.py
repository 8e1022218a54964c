"""`dsv3 extend`: a trained model to a greater context length."""

from pathlib import Path

import click

from dsv3.cli.run import allow_option, allowed_names, out_shown_as, overrides_argument, refuse_to_mix, run_recipe
from dsv3.cli.schedule import dry_run, dry_run_options, refuse_without_dry_run


@click.command(short_help="Train on at a greater length, from a run or published weights.")
@click.argument("recipe", type=click.Path(path_type=Path))
@overrides_argument
@click.option("--resume", is_flag=True, help="Continue the run in --out from its newest checkpoint.")
@allow_option
@out_shown_as(None, "runs/, the name of the recipe's directory, and that of the recipe")
@dry_run_options
def extend(
    recipe: Path, overrides: tuple[str, ...], resume: bool, allow: str, out: Path | None, dry: bool, at: tuple[str, ...], plot: Path | None,
) -> None:  # fmt: skip
    """One phase of context extension: RECIPE's [extension] names the run that it starts from.

    Any KEY=VALUE of the recipe is replaced, for instance extension.initial_from=runs/mine. Ctrl-C finishes the step and
    saves; --resume continues. Figures and checkpoints are in OUT/extend.
    """
    if dry:
        dry_run(recipe, overrides, at, plot)
        return
    refuse_without_dry_run(at, plot)
    out = out or Path("runs") / recipe.resolve().parent.name / recipe.stem
    allowed = allowed_names(allow, resume)
    refuse_to_mix(out, "extend", resume)
    run_recipe(recipe, overrides, [], out, stages="extend", replace=False, allow=allowed)
    click.echo(
        f"\nThe model is in {out / 'extend' / 'checkpoints'}; `dsv3 eval {out} --tasks needle,position` scores it."
    )
