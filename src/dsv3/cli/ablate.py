"""`dsv3 ablate`: recipes with several seeds each, some runs at once, then side by side."""

import json
from pathlib import Path

import click

from dsv3.cli.compare import show_comparison
from dsv3.errors import UserError


@click.command(short_help="Every recipe of a directory with several seeds, then `compare`.")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE... [KEY=VALUE]...")
@click.option("--seeds", default="0,1,2", show_default=True, help="Values of training.seed, with commas between.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at once.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/ablations", show_default=True, help="Where all go."
)
def ablate(recipes: tuple[str, ...], seeds: str, jobs: int, out: Path) -> None:
    """Trains each RECIPE (TOML files, or a directory of them) with each seed, and compares the runs.

    All share one tokenizer and one set of shards. The first recipe is what the others are compared with; of a directory, its
    baseline.toml. Running it again skips what is finished and continues what is not. OUT gets comparison.md, .json and .svg.
    """
    numbers = read_seeds(seeds)

    from rich.console import Console

    from dsv3.cli.ui import Progress
    from dsv3.stages.ablate import ablate as run_ablations
    from dsv3.stages.ablate import find_recipes
    from dsv3.stages.compare import compare
    from dsv3.stages.comparison_view import drawing, markdown
    from dsv3.stages.drawing import save

    paths = find_recipes([Path(each) for each in recipes if "=" not in each])
    overrides = [each for each in recipes if "=" in each]
    with Progress(Console(stderr=True)) as progress:
        runs = run_ablations(paths, overrides, numbers, out, jobs, progress, progress.note)
    comparison = compare(runs)
    (out / "comparison.md").write_text(markdown(comparison))
    (out / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=1))
    save(drawing(comparison), out / "comparison.svg")
    show_comparison(comparison)
    click.echo(f"{out / 'comparison.md'}, .json, .svg")


def read_seeds(written: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]; `UserError` for anything else."""
    parts = written.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(f"--seeds {written}: expected different whole numbers with commas between, such as 0,1,2")
    return [int(part) for part in parts]
