"""`dsv3 bench train --gpus N`: what several GPUs do together."""

from dataclasses import asdict
from pathlib import Path

import click

from dsv3.bench.gpus.findings import Figure, Findings, Part
from dsv3.bench.gpus.ranks import PARTS, bench_gpus
from dsv3.cli.options import chosen_of, write_json
from dsv3.cli.ui import Progress, print_table, verdict


def show_gpus(gpus: int, only: str | None, json_path: Path | None) -> None:
    """Measures all parts, or those that are named; prints them, and writes the JSON file that was asked for."""
    parts = list(PARTS) if only is None else chosen_of("--only", only, PARTS)
    with Progress() as progress:

        def tell(part: Part) -> None:
            for each in part.figures:
                progress.note(f"{part.title}: {each.name} {written(each.value.median, each.unit)}")

        found = bench_gpus(gpus, parts, progress=progress, tell=tell)
    print_findings(found)
    write_json(json_path, asdict(found))


def print_findings(found: Findings) -> None:
    """One table, a section a part."""
    click.echo(f"{found.gpus} x {found.machine['device']}, {found.seconds:.0f} s")
    sections = []
    for part in found.parts:
        times = [
            [f"  {name}", f"{each.median:.2f} ms", f"{each.low:.2f} - {each.high:.2f}"]
            for name, each in part.times.items()
        ]
        sections.append([[part.title], *times, *(figure_row(each) for each in part.figures)])
    print_table(["", "median", "least - most", "target"], sections)
    for part in found.parts:
        for name, each in part.checks.items():
            click.echo(f"{part.title}: {name}: {each}")


def figure_row(figure: Figure) -> list[str]:
    """Its name, median, range, and target with the verdict."""
    value, low, high = (written(each, figure.unit) for each in asdict(figure.value).values())
    aim = "" if figure.target is None else verdict(written(figure.target, figure.unit), figure.met)
    return [f"  {figure.name}", value, "" if low == high else f"{low} - {high}", aim]


def written(value: float, unit: str) -> str:
    """With its unit, to three digits or more."""
    if unit == "%":
        return f"{value:.1%}"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{number} {unit}".strip()
