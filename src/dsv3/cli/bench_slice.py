"""`dsv3 bench decode --slice`: what one GPU makes of inference over DeepSeek-V3's layers."""

from dataclasses import asdict
from pathlib import Path

import click

from dsv3.bench.decode_slice import GOAL, PUBLISHED, SliceResult, bench_slice
from dsv3.bench.limits import measured_rates
from dsv3.bench.measure import about, gpu
from dsv3.bench.slices import DEPTHS
from dsv3.cli.options import write_json
from dsv3.cli.ui import Progress, print_table, verdict


def show_slice(json_path: Path | None) -> None:
    """Measures, writes the JSON file that was asked for, and prints the tables."""
    device = gpu("dsv3 bench decode --slice")
    with Progress() as progress:
        progress(stage="rates", done=0, total=1)
        rates = measured_rates()
        progress(stage="rates", done=1, total=1)
        found = bench_slice(rates, device, progress)
    points = [{**asdict(each), "times_the_limit": each.times_the_limit} for each in found.points]
    write_json(json_path, {**about(device), "published": PUBLISHED, **asdict(found), "points": points})
    print_slice(found)


def print_slice(found: SliceResult) -> None:
    """The tables."""
    lines = [
        [
            each.name, f"{each.milliseconds:.2f}", f"{each.limit:.2f}", each.bound, f"{each.times_the_limit:.2f}",
            f"{each.experts:.0f}", shown(each.step), shown(each.theirs),
            "" if each.theirs is None or each.step is None else f"{each.theirs / each.step:.1f}",
        ]
        for each in found.points
    ]  # fmt: skip
    dense, moe = DEPTHS[0]
    head = [f"{dense} dense and {moe} MoE layers, ms", "pass", "limit", "of", "times", "experts", "engine's step",
            "transformers, BF16", "times faster"]  # fmt: skip
    print_table(head, [lines])
    lines = [
        [each.name, *(f"{ms:.2f}" for ms in (each.dense_layer, each.moe_layer, each.rest)), f"{each.total:.1f}",
         f"{each.limit:.1f}", f"{each.tokens_per_second:,.0f}"]
        for each in found.whole
    ]  # fmt: skip
    columns = ["dense layer", "MoE layer", "rest", "61 layers", "limit", "tokens/s"]
    print_table(["extrapolated, one GPU, no communication, ms", *columns], [lines])
    published = [[name, f"{value:,.0f}"] for name, value in PUBLISHED.items()]
    print_table(["published, whole systems with experts spread over GPUs", "tokens/s and GPU"], [published])
    rates = found.rates
    click.echo(
        f"Limits at rates of this run: a copy {rates.copy / 1e12:.2f} TB/s, products {rates.fp8 / 1e12:,.0f} TFLOP/s in FP8 and "
        f"{rates.bf16 / 1e12:,.0f} in BF16. Most memory of ours: {found.peak_memory / 1e9:.0f} GB."
    )
    largest = max((each for each in found.points if each.context), key=lambda each: (each.tokens, each.times_the_limit))
    times = largest.times_the_limit
    click.echo(f"{largest.name}: {times:.2f} times the limit, {verdict(f'at most {GOAL:g} wanted', times <= GOAL)}")


def shown(value: float | None) -> str:
    """A figure that may be missing."""
    return "" if value is None else f"{value:.2f}"
