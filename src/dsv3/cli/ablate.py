"""`dsv3 ablate`: recipes with several seeds each, some runs at once, then side by side."""

import json
from functools import partial
from pathlib import Path

import click

from dsv3.cli.compare import show_comparison
from dsv3.cli.options import PATH, Parsed, whole_numbers
from dsv3.cli.ui import Progress
from dsv3.errors import UserError


@click.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE... [KEY=VALUE]...")
@click.option(
    "--seeds",
    type=Parsed("N,N", partial(whole_numbers, least=0)),
    default="0,1,2",
    help="Values of training.seed, with commas between.",
)
@click.option("--jobs", type=click.IntRange(1), default=1, help="Runs at once.")
@click.option("--out", type=PATH, default="runs/ablations", help="Where all go.")
def ablate(recipes: tuple[str, ...], seeds: list[int], jobs: int, out: Path) -> None:
    """Trains each RECIPE (TOML files, or a directory of them) with each seed, and compares the runs.

    All share one tokenizer and one set of shards. The first recipe is what the others are compared with; of a directory, its
    baseline.toml. Running it again skips what is finished and continues what is not. OUT gets comparison.md, .json and .svg.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))}: expected different ones, such as 0,1,2")

    from dsv3.stages.ablate import ablate as run_ablations
    from dsv3.stages.ablate import find_recipes
    from dsv3.stages.compare import compare
    from dsv3.stages.comparison_view import drawing, markdown
    from dsv3.stages.drawing import save

    paths = find_recipes([Path(each) for each in recipes if "=" not in each])
    overrides = [each for each in recipes if "=" in each]
    with Progress() as progress:
        runs = run_ablations(paths, overrides, seeds, out, jobs, progress, progress.note)
    comparison = compare(runs)
    (out / "comparison.md").write_text(markdown(comparison))
    (out / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=1))
    save(lambda: drawing(comparison), out / "comparison.svg")
    show_comparison(comparison)
    click.echo(f"{out / 'comparison.md'}, .json, .svg")
