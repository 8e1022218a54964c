"""`dsv3 report`: writes the page about a run."""

from pathlib import Path

import click

from dsv3.cli.options import PATH


@click.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="The file to write; RUN/report.html when not given.")
def report(run: Path, out: Path | None) -> None:
    """Write one HTML page about RUN, a run directory such as runs/quickstart, finished or still going."""
    # Here, because drawing takes half a second to import, which `dsv3 --help` must not pay.
    from dsv3.stages.report import write_report

    out = out or run / "report.html"
    write_report(run, out)
    click.echo(f"report: {out}")
