"""What the commands that run a recipe share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.console import Console

from dsv3.cli.ui import Progress, panel, print_table
from dsv3.errors import UserError

if TYPE_CHECKING:
    from dsv3.recipe.schema import Recipe

Stages = Literal["quickstart", "pretrain", "extend"]

overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def is_first_rank() -> bool:
    """Whether this process speaks to the user: of those that `torchrun` starts, the first."""
    return os.environ.get("RANK", "0") == "0"


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
    if is_first_rank():
        click.echo(f"dsv3: {recipe_path} -> {out}", err=True)

    from dsv3.parallel.launch import launched
    from dsv3.stages.context import RunContext
    from dsv3.stages.extend import extension_stages
    from dsv3.stages.pretrain import derived, pretraining_stages, with_user_data
    from dsv3.stages.quickstart import quickstart_stages
    from dsv3.stages.together import run_together

    recipe = with_user_data(recipe, list(data))
    with launched(recipe) as mesh, Progress(None if mesh.first else Console(quiet=True)) as progress:
        panel(progress.console, str(recipe_path), derived(recipe))
        if mesh.first and mesh.world.size > 1:
            print_layout(recipe)
        make = {"quickstart": quickstart_stages, "pretrain": pretraining_stages, "extend": extension_stages}[stages]
        context = RunContext(recipe, out, progress, progress.note, allow, mesh)
        run_together(make(context), context, replace_changed=stages == "quickstart")


def few(ranks: Sequence[int]) -> str:
    """Some numbers, the last of them included: 0, 2 ... 14."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 3 else f"{ranks[0]}, {ranks[1]} ... {ranks[-1]}"


def print_layout(recipe: "Recipe") -> None:
    """Who holds what, at the start of a job of many ranks."""
    from dsv3.planning.layout import holdings
    from dsv3.recipe.figures import human

    head = ("ranks", "layers", "experts", "parameters", "weights", "gradients", "moments")
    held, experts = holdings(recipe), recipe.parallel.expert
    shown = held if len(held) <= 32 else [each for n, each in enumerate(held) if n % experts in (0, experts - 1)]
    rows = [
        (
            few(each.ranks), each.layers, f"{each.experts.start}-{each.experts.stop - 1}", f"{each.parameters:,}",
            *(f"{human(size)}B" for size in (each.weights, each.gradients, each.moments)),
        )
        for each in shown
    ]  # fmt: skip
    print_table(head, [rows])
