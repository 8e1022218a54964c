"""`dsv3 bench`: speeds of this machine, each as a ratio to a named peer measured in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv3.errors import UserError

if TYPE_CHECKING:
    from dsv3.bench.measure import Result, Spread

json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write everything measured to this file."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of both sides; what torch takes when not given."
)


@click.group()
def bench() -> None:
    """Speeds of this machine, each as a ratio to a named peer measured in the same run."""


@bench.command()
@click.option("--preset", default="tiny", show_default=True, help="The network, without its MTP modules.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@threads_option
@json_option
def train(preset: str, rounds: int, threads: int | None, json_path: Path | None) -> None:
    """Training on the CPU: forward, backward and AdamW on 8 x 256 tokens, against transformers."""
    from dsv3.bench.train import bench_train
    from dsv3.cli.ui import Progress

    use_threads(threads)
    with Progress() as progress:
        result = bench_train(preset, rounds, progress=progress)
    show(result, json_path)


@bench.command()
@click.option("--preset", default="tiny", show_default=True, help="The network, without its MTP modules.")
@click.option("--batch", default="1,8", show_default=True, help="Sequences decoded together; several by commas.")
@click.option("--tokens", type=click.IntRange(1), default=512, show_default=True, help="New tokens a sequence.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@threads_option
@json_option
def decode(preset: str, batch: str, tokens: int, rounds: int, threads: int | None, json_path: Path | None) -> None:
    """Greedy decoding on the CPU with a cache, against transformers' generate."""
    from dsv3.bench.decode import bench_decode
    from dsv3.cli.ui import Progress

    batches = whole_numbers("--batch", batch)
    use_threads(threads)
    with Progress() as progress:
        result = bench_decode(preset, rounds, batches=batches, tokens=tokens, progress=progress)
    show(result, json_path)


@bench.command()
@click.option("--vocabularies", default="2048,32768", show_default=True, help="Entries; several by commas.")
@click.option("--megabytes", type=click.FloatRange(0.1), default=4.0, show_default=True, help="Text a turn.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@json_option
def data(vocabularies: str, megabytes: float, rounds: int, json_path: Path | None) -> None:
    """Documents to shards on one core, against tokenizers alone."""
    from dsv3.bench.data import bench_data
    from dsv3.cli.ui import Progress

    with Progress() as progress:
        result = bench_data(
            whole_numbers("--vocabularies", vocabularies), rounds, megabytes=megabytes, progress=progress
        )
    show(result, json_path)


def whole_numbers(option: str, value: str) -> list[int]:
    """An option's numbers."""
    parts = value.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {value!r}: expected whole numbers above 0, separated by commas, such as 1,8")
    return [int(part) for part in parts]


def use_threads(count: int | None) -> None:
    """Has torch compute with so many threads."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def show(result: Result, json_path: Path | None) -> None:
    """Prints the tables, and writes the file that was asked for."""
    from rich import box
    from rich.table import Table

    from dsv3.cli.ui import table_console

    console = table_console()
    where = f"{result.machine['processor']}, {result.machine['threads']} threads"
    shapes = ", ".join(f"{name} {value}" for name, value in result.shapes.items())
    console.print(f"{where}\n{shapes}", highlight=False, soft_wrap=True)
    speeds = Table("", box=box.SIMPLE_HEAD)
    for name in ("tokens/s", "least - most", *result.rows[0].figures):
        speeds.add_column(name, justify="right")
    for row, before in zip(result.rows, ["", *(row.group for row in result.rows)], strict=False):
        if row.group != before:
            speeds.add_section()
            speeds.add_row(row.group)
        low, high = row.tokens_per_second.low, row.tokens_per_second.high
        figures = (f"{value:,.3g}" for value in row.figures.values())
        speeds.add_row(row.name, f"{row.tokens_per_second.median:,.0f}", f"{low:,.0f} - {high:,.0f}", *figures)
    console.print(speeds)
    ratios = Table("times faster", "ours", "theirs", box=box.SIMPLE_HEAD)
    for name in ("median", "least - most", "target"):
        ratios.add_column(name, justify="right")
    for each in result.ratios:
        ratios.add_row(each.title, each.ours, each.theirs, *verdict(each.value, each.target))
    console.print(ratios)
    for name, found in result.checks.items():
        console.print(f"{name}: {found}", highlight=False, soft_wrap=True)
    if json_path is not None:
        result.write(json_path)
        console.print(f"written: {json_path}", highlight=False, soft_wrap=True)


def verdict(value: Spread, target: float | None) -> tuple[str, str, str]:
    """(median, range, target and whether the median reaches it)."""
    aim = "" if target is None else f"{target:g}: {'met' if value.median >= target else 'missed'}"
    return f"{value.median:.2f}", f"{value.low:.2f} - {value.high:.2f}", aim
