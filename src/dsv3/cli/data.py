"""`dsv3 data build`: a recipe's texts to token shards."""

import json
from pathlib import Path
from typing import Any

import click

from dsv3.cli.run import out_option, overrides_argument

COLUMNS = ("documents", "tokens", "megabytes", "bytes_per_token", "tokens_per_second", "skipped", "empty", "duplicates")


@click.group()
def data() -> None:
    """Documents to token shards."""


@data.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@overrides_argument
@click.option("--workers", type=click.IntRange(1), help="Processes that tokenize; one a core when not given.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@out_option(None)
def build(recipe: Path, overrides: tuple[str, ...], workers: int | None, as_json: bool, out: Path | None) -> None:
    """Builds the tokenizer and the shards of RECIPE (a TOML file), with any KEY=VALUE of it replaced.

    What is built already is checked and kept; a build that was stopped or killed continues. `dsv3 pretrain` with the same
    OUT trains on the result.
    """
    from rich.console import Console

    from dsv3.cli.ui import Progress
    from dsv3.recipe.schema import Recipe
    from dsv3.stages.data import SPLITS, data_stages, open_sets
    from dsv3.stages.runner import run_stages

    out = out or Path("runs") / recipe.resolve().parent.name
    content = Recipe.load(recipe, overrides)
    speeds: dict[str, float] = {}
    with Progress(Console(stderr=True)) as progress:
        stages = data_stages(content, out, progress, progress.note, workers=workers, built=speeds.__setitem__)
        run_stages(stages, out, lambda name, state: progress.note(f"{name}: {state}"), replace=True)
    sets = {f"{name}/{split}": each for split in SPLITS for name, each in open_sets(content, out, split).items()}
    rows = {name: figures_of_source(each.manifest, speeds.get(name)) for name, each in sorted(sets.items())}
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        print_sources(rows)
        click.echo(f"The shards are in {out / 'shards'}.")


def figures_of_source(manifest: Any, speed: float | None) -> dict[str, float | None]:
    """A row of the table: what a set holds, and the tokens a second of its building, None where it was there already."""
    values = (
        manifest.documents, manifest.tokens, manifest.bytes / 1e6, manifest.bytes / manifest.tokens, speed,
        manifest.skipped["count"], manifest.skipped["empty"], manifest.skipped["duplicates"],
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def print_sources(rows: dict[str, dict[str, float | None]]) -> None:
    """Prints the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 140
    table = Table("", box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name.replace("_per_", "/").replace("_", " "), justify="right")
    for name, row in rows.items():
        cells = (
            "-" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:,.0f}" if x > 1000 else f"{x:.2f}"
            for x in row.values()
        )
        table.add_row(name, *cells)
    console.print(table)
