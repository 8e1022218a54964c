"""`dsv3 compare`: runs side by side, over seeds, with the report's signs beside them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsv3.stages.compare import Comparison


@click.command(short_help="Runs side by side, and the report's signs.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw every figure over the training: a .svg or .png file."
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def compare(runs: tuple[Path, ...], plot: Path | None, as_markdown: bool, as_json: bool) -> None:
    """Compares run directories: validation loss, bits per byte, solved tasks and MaxVio at the last evaluation that all have.

    Runs of one recipe with different seeds are one variant; differences are to the variant of the first RUN. A directory
    that is named twice counts once: `dsv3 compare runs/ablations/baseline-* runs/ablations/*-seed*`.
    """
    from dsv3.stages.compare import compare as compare_runs
    from dsv3.stages.comparison_view import drawing, markdown
    from dsv3.stages.drawing import check_drawable, save

    if plot is not None:
        check_drawable(plot)
    comparison = compare_runs(runs)
    if plot is not None:
        save(drawing(comparison), plot)
        click.echo(f"drawn: {plot}", err=True)
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=1))
    elif as_markdown:
        click.echo(markdown(comparison), nl=False)
    else:
        show_comparison(comparison)


def show_comparison(comparison: "Comparison") -> None:
    """The table and its notes, on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dsv3.stages.comparison_view import EXPLANATION, summary, table

    head, *rows = table(comparison)
    shown = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        if row[0] and shown.row_count:
            shown.add_section()
        shown.add_row(*row)
    # Where no terminal has a width, no cell is broken.
    Console(width=None if sys.stdout.isatty() else 200).print(shown, markup=False, highlight=False)
    for text in (summary(comparison), EXPLANATION, *comparison.notes):
        click.echo(text)
