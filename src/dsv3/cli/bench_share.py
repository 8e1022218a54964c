"""`dsv3 bench train --share`: what one GPU of a cluster makes of DeepSeek-V3's layers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv3.errors import UserError

if TYPE_CHECKING:
    from dsv3.bench.share import Share

AIMS = {"fp8": 600.0}
"""TFLOP/s without MTP; DeepSeek's cluster reached 385, communication and bubbles included."""


def show_share(mtp: bool, json_path: Path | None) -> None:
    """Measures BF16 and FP8, prints them side by side, and writes the JSON file that was asked for."""
    import torch

    from dsv3.bench.limits import measured_rates
    from dsv3.bench.share import bench_share
    from dsv3.cli.options import write_json
    from dsv3.cli.ui import Progress, print_table
    from dsv3.stages.machine import command, machine, versions

    if not torch.cuda.is_available():
        raise UserError("dsv3 bench train --share measures a GPU, and found none")
    with Progress() as progress:
        rates = measured_rates()
        shares = [bench_share(precision, mtp, rates, progress=progress) for precision in ("bf16", "fp8")]
    parts = {
        "dense layer": "dense_layer",
        "MoE layer": "moe_layer",
        "head": "head",
        "optimizer, a step of 8": "optimizer",
    }
    times = [[name, *(f"{getattr(each, part):.1f}" for each in shares)] for name, part in parts.items()]
    totals = [
        ["tokens a second and GPU", *(f"{each.tokens_per_second:,.0f}" for each in shares)],
        ["TFLOP/s, the report's causal accounting", *(f"{each.teraflops:,.0f}" for each in shares)],
        ["peak memory, GB", *(f"{each.peak_memory / 1e9:.0f}" for each in shares)],
    ]
    head = ["a micro-batch of 4,096 tokens, ms", *(each.precision for each in shares)]
    print_table(head, [times, totals])
    budget = [[kind, *(each for share in shares for each in beside_limit(share, kind))] for kind in shares[0].budget]
    total = ["all", *(each for share in shares for each in beside_limit(share, None))]
    columns = [column for each in shares for column in (f"{each.precision}, ms", "limit", "reached")]
    print_table(["1 dense and 4 MoE layers", *columns], [budget, [total]])
    click.echo(
        f"Limits at rates of this run: products {rates.bf16 / 1e12:,.0f} TFLOP/s in BF16 and {rates.fp8 / 1e12:,.0f} in FP8, "
        f"cuDNN's attention {rates.attention:.2f} ms a layer, a copy {rates.copy / 1e12:.2f} TB/s."
    )
    for each in shares:
        if not mtp and each.precision in AIMS:
            aim = AIMS[each.precision]
            verdict = "met" if each.teraflops >= aim else "missed"
            click.echo(f"{each.precision}: {each.teraflops:,.0f} TFLOP/s, {aim:,.0f} wanted: {verdict}")
    click.echo("Without communication between GPUs and without pipeline bubbles.")
    if json_path is not None:
        about = {"machine": machine(torch.device("cuda")), "versions": versions(), "command": command()}
        write_json(json_path, {**about, "rates": asdict(rates), "shares": [asdict(each) for each in shares]})


def beside_limit(share: Share, kind: str | None) -> list[str]:
    """[milliseconds, limit, how much of it is reached] of a kind of kernel, or of all; empty where there is no limit."""
    if kind is None:
        spent, least = sum(share.budget.values()), sum(share.limits.values())
    else:
        spent, least = share.budget[kind], share.limits.get(kind, 0.0)
    if not least:
        return [f"{spent:.1f}", "", ""]
    return [f"{spent:.1f}", f"{least:.1f}", f"{least / spent:.2f}" if spent else ""]
