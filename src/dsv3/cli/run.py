"""What the commands that run a recipe share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from dsv3.errors import UserError

Stages = Literal["quickstart", "pretrain", "extend"]

overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
allow_option = click.option(
    "--allow",
    default="",
    metavar="KEY,...",
    help="With --resume: keys of the recipe, or sections, that may differ although they change the result.",
)


def out_option(default: str | None) -> Callable[[Any], Any]:
    """`--out`."""
    return out_shown_as(default, default or "runs/ and the name of the recipe's directory")


def out_shown_as(default: str | None, shown: str) -> Callable[[Any], Any]:
    """`--out`, with what its help says of the default."""
    return click.option(
        "--out", type=click.Path(path_type=Path), default=default, help=f"Where everything goes: {shown}."
    )


def recipe_beside(name: str) -> Path:
    """A recipe that comes with dsv3: below `recipes/` here, or in the checkout that is installed."""
    checkout = Path(__file__).resolve().parents[3]
    for root in (Path(), checkout):
        if (root / "recipes" / name).is_file():
            return root / "recipes" / name
    raise UserError(f"there is no recipes/{name} here; run this in a checkout of dsv3, or name a recipe")


def allowed_names(allow: str, resume: bool) -> list[str]:
    """The names in `--allow`; `UserError` where no run is continued."""
    if allow and not resume:
        raise UserError("--allow says what may differ from the run that is continued: add --resume, or leave it out")
    return [name.strip() for name in allow.split(",") if name.strip()]


def refuse_to_mix(out: Path, stage: str, resume: bool) -> None:
    """A run is begun in a new directory, and continued in its own: `UserError` otherwise."""
    if (out / stage).exists() and not resume:
        raise UserError(f"{out} holds a run already: add --resume to continue it, or name another directory with --out")
    if resume and not (out / "stages").is_dir():
        raise UserError(
            f"{out} holds no run to continue: leave --resume out to begin one, or name its directory with --out"
        )


def run_recipe(
    recipe_path: Path,
    overrides: Sequence[str],
    data: list[str],
    out: Path,
    *,
    stages: Stages,
    replace: bool,
    allow: Sequence[str] = (),
) -> None:
    """Shows what was derived from the recipe, then runs its stages with live progress.

    `replace`: see `run_stages`; `allow`: what may differ from the run that is continued.
    """
    from dsv3.recipe.schema import Recipe

    recipe = Recipe.load(recipe_path, overrides)
    click.echo(f"dsv3: {recipe_path} -> {out}", err=True)

    from rich.console import Console

    from dsv3.cli.ui import Progress, panel
    from dsv3.stages.extend import extension_stages
    from dsv3.stages.pretrain import derived, pretraining_stages, with_user_data
    from dsv3.stages.quickstart import quickstart_stages
    from dsv3.stages.runner import run_stages

    recipe = with_user_data(recipe, data)
    console = Console(stderr=True)
    panel(console, str(recipe_path), derived(recipe))
    with Progress(console) as progress:
        make = {"quickstart": quickstart_stages, "pretrain": pretraining_stages, "extend": extension_stages}[stages]
        made = make(recipe, out, progress, progress.note, allow)
        run_stages(made, out, lambda name, state: progress.note(f"{name}: {state}"), replace=replace, allow=allow)
