"""`dsv3 quickstart`: everything, small, on this machine."""

import shlex
import time
from pathlib import Path

import click

from dsv3.cli.options import PATH
from dsv3.cli.run import overrides_argument, recipe_beside, run_recipe
from dsv3.recipe.figures import duration


@click.command()
@overrides_argument
@click.option("--recipe", type=PATH, help="Another recipe than recipes/quickstart/pretrain.toml.")
@click.option("--data", multiple=True, metavar="PATH", help="Train on these texts instead; may be given several times.")
@click.option("--out", type=PATH, default="runs/quickstart", help="Where everything goes.")
def quickstart(overrides: tuple[str, ...], recipe: Path | None, data: tuple[str, ...], out: Path) -> None:
    """Trains a tokenizer and a small DeepSeek-V3, scores it before and after, and writes OUT/report.html.

    Running it again continues where it stopped, and repeats only what a changed recipe or corpus touches.
    """
    started = time.monotonic()
    recipe = recipe or recipe_beside("quickstart/pretrain.toml")
    run_recipe("quickstart", recipe, overrides, out, data=data)
    click.echo(f"\n{duration(time.monotonic() - started)}. Look at {out / 'report.html'}, then try")
    run = shlex.quote(str(out))
    click.echo(f'  dsv3 generate {run} --prompt "def read_file("')
    click.echo(f"  dsv3 chat {run} --template 'User: {{}}\\nAssistant:\\n'")
