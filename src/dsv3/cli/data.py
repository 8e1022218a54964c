"""`dsv3 data build`: a recipe's texts to token shards."""

import json
from pathlib import Path
from typing import Any

import click

from dsv3.cli.options import PATH, json_option
from dsv3.cli.run import overrides_argument
from dsv3.cli.ui import Progress, print_table


@click.group()
def data() -> None:
    """Documents to token shards."""


@data.command()
@click.argument("recipe", type=PATH)
@overrides_argument
@click.option("--workers", type=click.IntRange(1), help="Processes that tokenize; one a core when not given.")
@json_option
@click.option(
    "--out", type=PATH, help="Where everything goes; runs/ and the name of the recipe's directory when not given."
)
def build(recipe: Path, overrides: tuple[str, ...], workers: int | None, as_json: bool, out: Path | None) -> None:
    """Builds the tokenizer and the shards of RECIPE (a TOML file), with any KEY=VALUE of it replaced.

    What is built already is checked and kept; a build that was stopped or killed continues. `dsv3 pretrain` with the same
    OUT trains on the result.
    """
    from dsv3.recipe.schema import Recipe
    from dsv3.stages.context import RunContext
    from dsv3.stages.data import SPLITS, data_stages, open_sets
    from dsv3.stages.runner import run_stages

    out = out or Path("runs") / recipe.resolve().parent.name
    content = Recipe.load(recipe, overrides)
    speeds: dict[str, float] = {}
    with Progress() as progress:
        context = RunContext(content, out, progress, progress.note)
        stages = data_stages(context, workers=workers, built=speeds.__setitem__)
        run_stages(stages, out, progress.note, replace=True)
    sets = {f"{name}/{split}": each for split in SPLITS for name, each in open_sets(content, out, split).items()}
    rows = {name: figures_of_source(each.manifest, speeds.get(name)) for name, each in sorted(sets.items())}
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        head = (name.replace("_per_", "/") for name in next(iter(rows.values())))
        print_table(["", *head], [[[name, *map(cell, row.values())] for name, row in rows.items()]])
        click.echo(f"The shards are in {out / 'shards'}.")


def figures_of_source(manifest: Any, speed: float | None) -> dict[str, float | None]:
    """A row of the table: what a set holds, and the tokens a second of its building, None where it was there already."""
    skipped = manifest.skipped
    return {
        "documents": manifest.documents, "tokens": manifest.tokens, "megabytes": manifest.bytes / 1e6,
        "bytes_per_token": manifest.bytes / manifest.tokens, "tokens_per_second": speed,
        "skipped": skipped["count"], "empty": skipped["empty"], "duplicates": skipped["duplicates"],
    }  # fmt: skip


def cell(value: float | None) -> str:
    """A figure in the table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value > 1000 else f"{value:.2f}"
