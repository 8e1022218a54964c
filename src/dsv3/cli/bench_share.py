"""`dsv3 bench train --share`: what one GPU of a cluster makes of DeepSeek-V3's layers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

AIMS = {"fp8": 600.0}
"""TFLOP/s without MTP; DeepSeek's cluster reached 385, communication and bubbles included."""


def show_share(mtp: bool, json_path: Path | None) -> None:
    """Measures BF16 and FP8, prints them side by side, and writes the JSON file that was asked for."""
    import torch

    from dsv3.bench.share import bench_share
    from dsv3.cli.options import write_json
    from dsv3.cli.ui import Progress, print_table
    from dsv3.stages.machine import command, machine, versions

    with Progress() as progress:
        shares = [bench_share(precision, mtp, progress=progress) for precision in ("bf16", "fp8")]
    parts = {
        "dense layer": "dense_layer",
        "MoE layer": "moe_layer",
        "head": "head",
        "optimizer, a step of 8": "optimizer",
    }
    times = [[name, *(f"{getattr(each, part):.1f}" for each in shares)] for name, part in parts.items()]
    kinds = [
        [f"{kind}, 1 dense and 4 MoE layers", *(f"{each.budget[kind]:.1f}" for each in shares)]
        for kind in shares[0].budget
    ]
    totals = [
        ["tokens a second and GPU", *(f"{each.tokens_per_second:,.0f}" for each in shares)],
        ["TFLOP/s, the report's causal accounting", *(f"{each.teraflops:,.0f}" for each in shares)],
        ["peak memory, GB", *(f"{each.peak_memory / 1e9:.0f}" for each in shares)],
    ]
    head = ["a micro-batch of 4,096 tokens, ms", *(each.precision for each in shares)]
    print_table(head, [times, kinds, totals])
    for each in shares:
        if not mtp and each.precision in AIMS:
            aim = AIMS[each.precision]
            verdict = "met" if each.teraflops >= aim else "missed"
            click.echo(f"{each.precision}: {each.teraflops:,.0f} TFLOP/s, {aim:,.0f} wanted: {verdict}")
    click.echo("Without communication between GPUs and without pipeline bubbles.")
    if json_path is not None:
        about = {"machine": machine(torch.device("cuda")), "versions": versions(), "command": command()}
        write_json(json_path, {**about, "shares": [asdict(each) for each in shares]})
