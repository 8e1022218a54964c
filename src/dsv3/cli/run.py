"""What the commands that run a recipe share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from dsv3.errors import UserError

Stages = Literal["quickstart", "pretrain", "extend"]

overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def recipe_beside(name: str) -> Path:
    """A recipe that comes with dsv3: below `recipes/` here, or in the checkout that is installed."""
    checkout = Path(__file__).resolve().parents[3]
    for root in (Path(), checkout):
        if (root / "recipes" / name).is_file():
            return root / "recipes" / name
    raise UserError(f"there is no recipes/{name} here; run this in a checkout of dsv3, or name a recipe")


def run_recipe(
    stages: Stages, recipe_path: Path, overrides: Sequence[str], out: Path, *, data: Sequence[str] = (), allow: Sequence[str] = ()
) -> None:  # fmt: skip
    """Shows what was derived from the recipe, then runs its stages with live progress.

    `data` are the user's own texts in place of the recipe's; `allow` is what may differ from the run that is continued.
    Only the quickstart replaces what was made from other inputs unasked.
    """
    from dsv3.recipe.schema import Recipe

    recipe = Recipe.load(recipe_path, overrides)
    click.echo(f"dsv3: {recipe_path} -> {out}", err=True)

    from dsv3.cli.ui import Progress, panel
    from dsv3.stages.extend import extension_stages
    from dsv3.stages.pretrain import derived, pretraining_stages, with_user_data
    from dsv3.stages.quickstart import quickstart_stages
    from dsv3.stages.runner import run_stages

    recipe = with_user_data(recipe, list(data))
    with Progress() as progress:
        panel(progress.console, str(recipe_path), derived(recipe))
        make = {"quickstart": quickstart_stages, "pretrain": pretraining_stages, "extend": extension_stages}[stages]
        made = make(recipe, out, progress, progress.note, allow)
        run_stages(made, out, progress.note, replace=stages == "quickstart", allow=allow)
