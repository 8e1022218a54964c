"""`dsv3 bench`: speeds of this machine, each as a ratio to a named peer measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from dsv3.cli.bench_ops import ops
from dsv3.cli.options import PATH, WHOLE_NUMBERS, device_option, json_file_option, write_json
from dsv3.cli.ui import Progress, print_table, verdict
from dsv3.errors import UserError

if TYPE_CHECKING:
    from dsv3.bench.measure import Result

threads_option = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of both sides; what torch takes when not given."
)


@click.group()
def bench() -> None:
    """Speeds of this machine, each as a ratio to a named peer measured in the same run."""


bench.add_command(ops)


@bench.command()
@click.option("--preset", default="tiny", help="The network, without its MTP modules.")
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--overhead", is_flag=True, help="Instead: what a recipe's training takes beside its steps.")
@click.option("--share", is_flag=True, help="Instead: the layers of DeepSeek-V3 that one GPU of a cluster holds.")
@click.option("--lite", is_flag=True, help="Instead: a model of Moonlight's width on one GPU, against transformers.")
@click.option("--gpus", type=click.IntRange(2), help="Instead: what so many GPUs do together.")
@click.option("--only", help="For --gpus: some of overlap,pipeline,zero,scaling.")
@click.option("--mtp", is_flag=True, help="For --share: with its MTP module.")
@click.option("--recipe", type=PATH, help="For --overhead; the quickstart's when not given.")
@click.option("--steps", type=click.IntRange(2), default=60, help="For --overhead.")
@threads_option
@json_file_option
def train(
    preset: str, rounds: int, overhead: bool, share: bool, lite: bool, gpus: int | None, only: str | None, mtp: bool, recipe: Path | None,
    steps: int, threads: int | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Training on the CPU: forward, backward and AdamW on 8 x 256 tokens, against transformers.

    With --overhead: the share of the training time that goes into data, metrics, logs and checkpoints. With --share, on a GPU:
    full-width layers in BF16 and FP8, as 64-way expert parallelism leaves them to one GPU. With --gpus: experts, pipeline, optimizer
    state and batch over several GPUs of this machine.
    """
    use_threads(threads)
    if overhead:
        show_overhead(recipe, steps, json_path)
    elif gpus is not None:
        from dsv3.cli.bench_gpus import show_gpus

        show_gpus(gpus, only, json_path)
    elif share:
        from dsv3.cli.bench_share import show_share

        show_share(mtp, json_path)
    elif lite:
        from dsv3.bench.lite import bench_lite

        show_result(partial(bench_lite, rounds), json_path)
    else:
        from dsv3.bench.train import bench_train

        show_result(partial(bench_train, preset, rounds), json_path)


@bench.command()
@click.option("--preset", default="tiny", help="The network, without its MTP modules.")
@click.option("--batch", type=WHOLE_NUMBERS, default="1,8", help="Sequences decoded together; several by commas.")
@click.option("--tokens", type=click.IntRange(1), help="New tokens a sequence.  [default: 512; of a checkpoint 256]")
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--checkpoint", type=PATH, help="Instead: drafts of this run's MTP modules on its held-out text.")
@click.option("--streams", type=click.IntRange(1), help="With --checkpoint, instead: so many streams of `dsv3 serve`.")
@click.option("--slice", "a_slice", is_flag=True, help="Instead: full-width layers of DeepSeek-V3 in FP8 on one GPU.")
@device_option
@threads_option
@json_file_option
def decode(
    preset: str, batch: list[int], tokens: int | None, rounds: int, checkpoint: Path | None, streams: int | None,
    a_slice: bool, device: str, threads: int | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Greedy decoding on the CPU with a cache, against transformers' generate.

    With --checkpoint, on any device: what speculation brings, drafts against none; with --streams as well, what the server takes
    beside the model. With --slice, on a GPU: 5 layers with all their experts, beside what memory and arithmetic allow and
    transformers in BF16.
    """
    use_threads(threads)
    if streams is not None and checkpoint is None:
        raise UserError("--streams serves a model: name it with --checkpoint")
    if a_slice:
        from dsv3.cli.bench_slice import show_slice

        show_slice(json_path)
    elif checkpoint is None:
        from dsv3.bench.decode import bench_decode

        show_result(partial(bench_decode, preset, rounds, batches=batch, tokens=tokens or 512), json_path)
    elif streams is None:
        from dsv3.bench.speculation import bench_speculation

        show_result(partial(bench_speculation, checkpoint, rounds, tokens=tokens or 256, device=device), json_path)
    else:
        from dsv3.bench.streams import bench_streams

        show_result(partial(bench_streams, checkpoint, streams, tokens or 256, device=device), json_path)


@bench.command()
@click.option("--preset", default="tiny", help="The network, with its MTP modules.")
@click.option("--batch", type=click.IntRange(1), default=8)
@click.option("--length", type=click.IntRange(4), default=1024)
@device_option
@json_file_option
def memory(preset: str, batch: int, length: int, device: str, json_path: Path | None) -> None:
    """Memory of a training step in BF16 and FP8, and what each of the report's ways to save some of it saves."""
    from dsv3.bench.measure import about
    from dsv3.bench.memory import BF16, TECHNIQUES, bench_memory
    from dsv3.model.device import pick_device
    from dsv3.training.device import device_name

    where = pick_device(device)
    with Progress() as progress:
        found = bench_memory(preset, batch=batch, length=length, device=where, progress=progress)
    click.echo(f"{preset}, {batch} x {length} tokens, {device_name(where)}")
    lines = []
    for name, pair in TECHNIQUES.items():
        without, used = (found[each] for each in pair)
        saved = without.peak - used.peak
        megabytes = (f"{each / 1e6:,.0f}" for each in (without.peak, used.peak, saved, used.resting, used.kept))
        lines.append([name, *megabytes, f"{saved / found[BF16].peak:.1%}", f"{used.seconds / without.seconds:.2f}"])
    print_table(["peak, MB", "without", "with", "saved", "resting", "kept", "saved, of BF16", "time"], [lines])
    rows = [{"setting": asdict(setting), **asdict(row)} for setting, row in found.items()]
    write_json(json_path, {**about(where), "preset": preset, "batch": batch, "length": length, "steps": rows})


@bench.command()
@click.option("--vocabularies", type=WHOLE_NUMBERS, default="2048,32768", help="Entries; several by commas.")
@click.option("--megabytes", type=click.FloatRange(0.1), default=8.0, help="Text a turn.")
@click.option("--rounds", type=click.IntRange(1), default=5)
@json_file_option
def data(vocabularies: list[int], megabytes: float, rounds: int, json_path: Path | None) -> None:
    """Documents to shards on one core, against tokenizers alone."""
    from dsv3.bench.data import bench_data

    show_result(partial(bench_data, vocabularies, rounds, megabytes=megabytes), json_path)


def use_threads(count: int | None) -> None:
    """Sets the number of torch's CPU threads."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def show_overhead(recipe: Path | None, steps: int, json_path: Path | None) -> None:
    """Measures and prints `dsv3 bench train --overhead`."""
    from dsv3.bench.overhead import TARGET, bench_overhead
    from dsv3.cli.run import recipe_beside
    from dsv3.recipe.schema import Recipe

    loaded = Recipe.load(recipe or recipe_beside("quickstart/pretrain.toml"))
    with Progress() as progress, TemporaryDirectory() as directory:
        found = bench_overhead(loaded, Path(directory), steps, progress)
    click.echo(listed(found.shapes))
    for name, milliseconds in {"step": found.step, **found.parts}.items():
        click.echo(f"{name:24} {milliseconds:9.3f} ms  {milliseconds / found.step:7.2%}")
    for name, milliseconds in found.threads.items():
        if name not in found.parts:
            click.echo(f"{name:24} {milliseconds:9.3f} ms  beside the GPU, not counted")
    aim = verdict(f"below {TARGET:.0%}", found.share < TARGET)
    click.echo(f"{'beside the step':24} {'':12}  {found.share:7.2%}  {aim}")
    write_json(json_path, {**asdict(found), "share": found.share})


def show_result(measure: Callable[..., Result], json_path: Path | None) -> None:
    """Measures with a progress bar, prints, and writes the file that was asked for."""
    with Progress() as progress:
        result = measure(progress=progress)
    print_result(result, json_path)


def print_result(result: Result, json_path: Path | None) -> None:
    """Prints the tables, and writes the file that was asked for."""
    click.echo(f"{result.machine['processor']}, {result.machine['threads']} threads")
    click.echo(listed(result.shapes))
    sections: list[list[list[str]]] = []
    for group, rows in groupby(result.rows, lambda row: row.group):
        sections.append([[group]])
        for row in rows:
            speed = row.tokens_per_second
            figures = (f"{value:,.3g}" for value in row.figures.values())
            sections[-1].append([row.name, f"{speed.median:,.0f}", f"{speed.low:,.0f} - {speed.high:,.0f}", *figures])
    print_table(["", "tokens/s", "least - most", *result.rows[0].figures], sections)
    ratios = []
    for each in result.ratios:
        value, target = each.value, each.target
        aim = "" if target is None else verdict(f"{target:g}", value.median >= target)
        times = f"{value.median:.2f}", f"{value.low:.2f} - {value.high:.2f}"
        ratios.append([each.title, each.ours, each.theirs, *times, aim])
    print_table(["times faster", "ours", "theirs", "median", "least - most", "target"], [ratios], left=range(3))
    for name, found in result.checks.items():
        click.echo(f"{name}: {found}")
    write_json(json_path, asdict(result))


def listed(shapes: Mapping[str, object]) -> str:
    """Shapes in one line."""
    return ", ".join(f"{name} {value}" for name, value in shapes.items())
