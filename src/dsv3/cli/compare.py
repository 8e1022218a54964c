"""`dsv3 compare`: runs side by side, over seeds, with the report's signs beside them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv3.cli.options import PATH, json_option
from dsv3.cli.ui import print_table

if TYPE_CHECKING:
    from dsv3.stages.compare import Comparison


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("--plot", type=PATH, help="Draw every figure over the training: a .svg or .png file.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@json_option
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
        save(lambda: drawing(comparison), plot)
        click.echo(f"drawn: {plot}", err=True)
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=1))
    elif as_markdown:
        click.echo(markdown(comparison), nl=False)
    else:
        show_comparison(comparison)


def show_comparison(comparison: "Comparison") -> None:
    """The table and its notes, on stdout."""
    from dsv3.stages.comparison_view import EXPLANATION, summary, table

    head, *rows = table(comparison)
    sections: list[list[list[str]]] = []
    for row in rows:
        if row[0]:
            sections.append([])
        sections[-1].append(row)
    print_table(head, sections, left=range(len(head)))
    for text in (summary(comparison), EXPLANATION, *comparison.notes):
        click.echo(text)
