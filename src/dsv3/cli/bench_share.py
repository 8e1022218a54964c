"""`dsv3 bench train --share`: what one GPU of a cluster makes of DeepSeek-V3's layers."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path

AIMS = {"fp8": 600.0}
"""TFLOP/s without MTP; DeepSeek's cluster reached 385, communication and bubbles included."""


def show_share(mtp: bool, json_path: Path | None) -> None:
    """Measures BF16 and FP8, prints them side by side, and writes the JSON file that was asked for."""
    import torch
    from rich import box
    from rich.table import Table

    from dsv3.bench.measure import versions
    from dsv3.bench.share import bench_share
    from dsv3.cli.bench_options import write_json
    from dsv3.cli.ui import Progress, table_console
    from dsv3.stages.pretrain import machine

    with Progress() as progress:
        shares = [bench_share(precision, mtp, progress=progress) for precision in ("bf16", "fp8")]
    table = Table("a micro-batch of 4,096 tokens, ms", *(each.precision for each in shares), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("dense_layer", "moe_layer", "head", "optimizer"):
        label = {"optimizer": "optimizer, a step of 8"}.get(name, name.replace("_", " "))
        table.add_row(label, *(f"{getattr(each, name):.1f}" for each in shares))
    table.add_section()
    for kind in shares[0].budget:
        table.add_row(f"{kind}, 1 dense and 4 MoE layers", *(f"{each.budget[kind]:.1f}" for each in shares))
    table.add_section()
    table.add_row("tokens a second and GPU", *(f"{each.tokens_per_second:,.0f}" for each in shares))
    table.add_row("TFLOP/s, the report's causal accounting", *(f"{each.teraflops:,.0f}" for each in shares))
    table.add_row("peak memory, GB", *(f"{each.peak_memory / 1e9:.0f}" for each in shares))
    console = table_console()
    console.print(table)
    for each in shares:
        if not mtp and each.precision in AIMS:
            aim = AIMS[each.precision]
            verdict = "met" if each.teraflops >= aim else "missed"
            console.print(f"{each.precision}: {each.teraflops:,.0f} TFLOP/s, {aim:,.0f} wanted: {verdict}")
    console.print("Without communication between GPUs and without pipeline bubbles.", highlight=False)
    if json_path is not None:
        about = {"machine": machine(torch.device("cuda")), "versions": versions()}
        command = shlex.join(["dsv3", *sys.argv[1:]])
        write_json(json_path, {**about, "command": command, "shares": [asdict(each) for each in shares]})
