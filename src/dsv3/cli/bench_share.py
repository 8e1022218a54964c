"""`dsv3 bench train --share`: what one GPU of a cluster makes of DeepSeek-V3's layers."""

from dataclasses import asdict
from pathlib import Path

import click

from dsv3.bench.limits import Rates, measured_rates
from dsv3.bench.measure import about, gpu
from dsv3.bench.share import Share, bench_share
from dsv3.cli.options import write_json
from dsv3.cli.ui import Progress, print_table, verdict

AIM = 600.0
"""TFLOP/s in FP8 without MTP; DeepSeek's cluster reached 385, communication and bubbles included."""


def show_share(mtp: bool, json_path: Path | None) -> None:
    """Measures BF16 and FP8, prints them side by side, and writes the JSON file that was asked for."""
    device = gpu("dsv3 bench train --share")
    with Progress() as progress:
        rates = measured_rates()
        shares = [bench_share(precision, mtp, rates, progress) for precision in ("bf16", "fp8")]
    print_shares(shares, rates)
    write_json(json_path, {**about(device), "rates": asdict(rates), "shares": [asdict(each) for each in shares]})


def print_shares(shares: list[Share], rates: Rates) -> None:
    """The tables."""
    times = [
        ["dense layer", *(f"{each.dense_layer:.1f}" for each in shares)],
        ["MoE layer", *(f"{each.moe_layer:.1f}" for each in shares)],
        ["head", *(f"{each.head:.1f}" for each in shares)],
        ["optimizer, a step of 8", *(f"{each.optimizer:.1f}" for each in shares)],
    ]
    totals = [
        ["tokens a second and GPU", *(f"{each.tokens_per_second:,.0f}" for each in shares)],
        ["TFLOP/s, the report's causal accounting", *(f"{each.teraflops:,.0f}" for each in shares)],
        ["peak memory, GB", *(f"{each.peak_memory / 1e9:.0f}" for each in shares)],
    ]
    print_table(["a micro-batch of 4,096 tokens, ms", *(each.precision for each in shares)], [times, totals])
    budget = [
        [kind, *(cell for each in shares for cell in beside_limit(each.budget[kind], each.limits.get(kind, 0.0)))]
        for kind in shares[0].budget
    ]
    sums = [(sum(each.budget.values()), sum(each.limits.values())) for each in shares]
    columns = [column for each in shares for column in (f"{each.precision}, ms", "limit", "reached")]
    total = ["all", *(cell for each in sums for cell in beside_limit(*each))]
    network = "1 dense, 3 MoE, 1 MTP layer" if shares[0].mtp else "1 dense and 4 MoE layers"
    print_table([network, *columns], [budget, [total]])
    click.echo(
        f"Limits at rates of this run: products {rates.bf16 / 1e12:,.0f} TFLOP/s in BF16 and {rates.fp8 / 1e12:,.0f} in FP8, "
        f"cuDNN's attention {rates.attention:.2f} ms a layer, a copy {rates.copy / 1e12:.2f} TB/s."
    )
    for each in shares:
        if each.precision == "fp8" and not each.mtp:
            click.echo(f"fp8: {each.teraflops:,.0f} TFLOP/s, {verdict(f'{AIM:,.0f} wanted', each.teraflops >= AIM)}")
    click.echo("Without communication between GPUs and without pipeline bubbles.")


def beside_limit(spent: float, least: float) -> list[str]:
    """[milliseconds, limit, how much of it is reached]; the last two are empty where there is no limit."""
    if not least:
        return [f"{spent:.1f}", "", ""]
    return [f"{spent:.1f}", f"{least:.1f}", f"{least / spent:.2f}" if spent else ""]
