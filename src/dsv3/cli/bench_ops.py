"""`dsv3 bench ops`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from dsv3.cli.bench_options import json_option, write_json
from dsv3.errors import UserError, nearest


@click.command()
@click.option(
    "--only", default=None, help="Families by commas: quantise, routing, products, attention; all when not given."
)
@click.option(
    "--warm", is_flag=True, help="Only compile every kernel into Triton's cache on the disk, for the runs to come."
)
@json_option
def ops(only: str | None, warm: bool, json_path: Path | None) -> None:
    """Operations on this GPU, each against a named peer or limit of the same run."""
    from dataclasses import asdict

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dsv3.bench import ops
    from dsv3.cli.ui import Progress

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
    console = Console()
    console.print(f"copy of 1 GiB: {copy_rate:.2f} TB/s, read and written", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("operation", "shape"):
        table.add_column(name)
    for name in ("us", "TB/s", "TFLOP/s"):
        table.add_column(name, justify="right")
    table.add_column("against")
    for name in ("ratio", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        rates = ("" if each is None else f"{each:,.2f}" for each in (row.terabytes, row.teraflops))
        ratio = "" if row.of_the_peer is None else f"{row.of_the_peer:.2f}"
        wanted = "" if row.target is None else f"{row.target:g}{'' if row.unit == 'of the peer' else ' ' + row.unit}"
        verdict = {True: "met", False: "missed", None: ""}[row.met]
        table.add_row(row.op, row.shape, f"{row.microseconds:,.1f}", *rates, row.peer, ratio, wanted, verdict)
    console.print(table)
    if json_path is not None:
        write_json(
            json_path,
            {
                **device(),
                "command": shlex.join(["dsv3", *sys.argv[1:]]),
                "copy_rate": copy_rate,
                "rows": [asdict(row) for row in rows],
            },
        )


def device() -> dict[str, str]:
    """The GPU, and what drives it."""
    import torch

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
