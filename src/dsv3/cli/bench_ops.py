"""`dsv3 bench ops`."""

from __future__ import annotations

from pathlib import Path

import click

from dsv3.cli.options import json_file_option, write_json
from dsv3.errors import UserError, nearest


@click.command()
@click.option(
    "--only", default=None, help="Families by commas: quantise, routing, products, attention; all when not given."
)
@click.option(
    "--warm", is_flag=True, help="Only compile every kernel into Triton's cache on the disk, for the runs to come."
)
@json_file_option
def ops(only: str | None, warm: bool, json_path: Path | None) -> None:
    """Operations on this GPU, each against a named peer or limit of the same run."""
    from dataclasses import asdict

    from dsv3.bench import ops
    from dsv3.cli.ui import Progress, print_table
    from dsv3.stages.machine import command

    families = list(ops.FAMILIES) if only is None else [name for name in only.split(",") if name]
    for name in families:
        if name not in ops.FAMILIES:
            raise UserError(f"--only {name}: {nearest(name, list(ops.FAMILIES))}")
    with Progress() as progress:
        if warm:
            count = ops.warm(families, progress)
            click.echo(f"compiled what {count} cases launch; Triton keeps it in $TRITON_CACHE_DIR, or ~/.triton/cache")
            return
        copy_rate, rows = ops.bench_ops(families, progress)
    click.echo(f"copy of 1 GiB: {copy_rate:.2f} TB/s, read and written")
    lines = []
    for row in rows:
        rates = ("" if each is None else f"{each:,.2f}" for each in (row.terabytes, row.teraflops))
        ratio = "" if row.of_the_peer is None else f"{row.of_the_peer:.2f}"
        wanted = "" if row.target is None else f"{row.target:g}{'' if row.unit == 'of the peer' else ' ' + row.unit}"
        verdict = {True: "met", False: "missed", None: ""}[row.met]
        lines.append([row.op, row.shape, f"{row.microseconds:,.1f}", *rates, row.peer, ratio, wanted, verdict])
    head = ["operation", "shape", "us", "TB/s", "TFLOP/s", "against", "ratio", "target", ""]
    print_table(head, [lines], left=(0, 1, 5, 8))
    if json_path is not None:
        measured = {"copy_rate": copy_rate, "rows": [asdict(row) for row in rows]}
        write_json(json_path, {**device(), "command": command(), **measured})


def device() -> dict[str, str]:
    """The GPU, and what drives it."""
    import torch

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
