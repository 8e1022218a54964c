"""`dsv3 bench`: speeds of this machine, each as a ratio to a named peer measured in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv3.cli.bench_ops import ops
from dsv3.cli.bench_options import json_option, threads_option, write_json
from dsv3.errors import UserError

if TYPE_CHECKING:
    from dsv3.bench.measure import Result, Spread
    from dsv3.recipe.schema import Precision


@click.group()
def bench() -> None:
    """Speeds of this machine, each as a ratio to a named peer measured in the same run."""


bench.add_command(ops)


@bench.command()
@click.option("--preset", default="tiny", show_default=True, help="The network, without its MTP modules.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--overhead", is_flag=True, help="Instead: what a recipe's training takes beside its steps.")
@click.option("--share", is_flag=True, help="Instead: the layers of DeepSeek-V3 that one GPU of a cluster holds.")
@click.option("--mtp", is_flag=True, help="For --share: with its MTP module.")
@click.option("--recipe", type=click.Path(path_type=Path), help="For --overhead; the quickstart's when not given.")
@click.option("--steps", type=click.IntRange(2), default=60, show_default=True, help="For --overhead.")
@threads_option
@json_option
def train(
    preset: str,
    rounds: int,
    overhead: bool,
    share: bool,
    mtp: bool,
    recipe: Path | None,
    steps: int,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Training on the CPU: forward, backward and AdamW on 8 x 256 tokens, against transformers.

    With --overhead: the share of the training time that goes into data, metrics, logs and checkpoints. With --share, on a GPU:
    full-width layers in BF16 and FP8, as 64-way expert parallelism leaves them to one GPU.
    """
    from dsv3.bench.train import bench_train
    from dsv3.cli.ui import Progress

    use_threads(threads)
    if overhead:
        show_overhead(recipe, steps, json_path)
        return
    if share:
        from dsv3.cli.bench_share import show_share

        show_share(mtp, json_path)
        return
    with Progress() as progress:
        result = bench_train(preset, rounds, progress=progress)
    print_result(result, json_path)


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
    print_result(result, json_path)


def show_overhead(recipe: Path | None, steps: int, json_path: Path | None) -> None:
    """Measures and prints `dsv3 bench train --overhead`."""
    import tempfile
    from dataclasses import asdict

    from rich.console import Console

    from dsv3.bench.overhead import TARGET, bench_overhead
    from dsv3.cli.run import recipe_beside
    from dsv3.cli.ui import Progress
    from dsv3.recipe.schema import Recipe

    loaded = Recipe.load(recipe or recipe_beside("quickstart/pretrain.toml"))
    with Progress() as progress, tempfile.TemporaryDirectory() as directory:
        found = bench_overhead(loaded, Path(directory), steps, progress)
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in found.shapes.items()), highlight=False, soft_wrap=True)
    for name, milliseconds in {"step": found.step, **found.parts}.items():
        console.print(f"{name:24} {milliseconds:9.3f} ms  {milliseconds / found.step:7.2%}", highlight=False)
    for name, milliseconds in found.threads.items():
        if name not in found.parts:
            console.print(f"{name:24} {milliseconds:9.3f} ms  beside the GPU, not counted", highlight=False)
    aim = "met" if found.share < TARGET else "missed"
    console.print(f"{'beside the step':24} {'':12}  {found.share:7.2%}  below {TARGET:.0%}: {aim}", highlight=False)
    if json_path is not None:
        write_json(json_path, {**asdict(found), "share": found.share})


@bench.command()
@click.option("--preset", default="tiny", show_default=True, help="The network, with its MTP modules.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--length", type=click.IntRange(4), default=1024, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@click.option("--precision", type=click.Choice(["bf16", "fp32", "fp8"]), default="bf16", show_default=True)
@json_option
def memory(preset: str, batch: int, length: int, device: str, precision: Precision, json_path: Path | None) -> None:
    """What waits for the backward pass, and what training.recompute saves of it."""
    from dataclasses import asdict

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dsv3.bench.memory import bench_memory
    from dsv3.cli.ui import Progress
    from dsv3.model.device import pick_device
    from dsv3.training.device import device_name

    where = pick_device(device)
    with Progress() as progress:
        rows = bench_memory(preset, batch=batch, length=length, device=where, precision=precision, progress=progress)
    console = Console()
    console.print(f"{preset}, {batch} x {length} tokens, {precision}, {device_name(where)}", highlight=False)
    table = Table("computed again", box=box.SIMPLE_HEAD)
    for name in ("kept, MB", "peak, MB", "of the peak", "ms", "time"):
        table.add_column(name, justify="right")
    first = rows[0]
    for row in rows:
        figures = f"{row.kept / 1e6:,.0f}", f"{row.peak / 1e6:,.0f}", f"{row.peak / first.peak:.0%}"
        times = f"{1000 * row.seconds:,.1f}", f"{row.seconds / first.seconds:.2f}"
        table.add_row(", ".join(row.recompute) or "nothing", *figures, *times)
    console.print(table)
    if json_path is not None:
        write_json(json_path, [asdict(row) for row in rows])


@bench.command()
@click.option("--vocabularies", default="2048,32768", show_default=True, help="Entries; several by commas.")
@click.option("--megabytes", type=click.FloatRange(0.1), default=8.0, show_default=True, help="Text a turn.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@json_option
def data(vocabularies: str, megabytes: float, rounds: int, json_path: Path | None) -> None:
    """Documents to shards on one core, against tokenizers alone."""
    from dsv3.bench.data import bench_data
    from dsv3.cli.ui import Progress

    with Progress() as progress:
        result = bench_data(
            whole_numbers("--vocabularies", vocabularies), rounds, megabytes=megabytes, progress=progress
        )
    print_result(result, json_path)


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


def print_result(result: Result, json_path: Path | None) -> None:
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
