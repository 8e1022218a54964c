"""`dsv3 bench ops`."""

from dataclasses import asdict
from pathlib import Path

import click

from dsv3.cli.options import chosen_of, json_file_option, write_json
from dsv3.cli.ui import Progress, print_table, verdict


@click.command()
@click.option("--only", help="Families by commas: quantise, routing, products, attention, decode; all when not given.")
@click.option(
    "--warm", is_flag=True, help="Only compile every kernel into Triton's cache on the disk, for the runs to come."
)
@json_file_option
def ops(only: str | None, warm: bool, json_path: Path | None) -> None:
    """Operations on this GPU, each against a named peer or limit of the same run."""
    import torch

    from dsv3.bench import ops
    from dsv3.stages.machine import command

    families = list(ops.FAMILIES) if only is None else chosen_of("--only", only, ops.FAMILIES)
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
        aim = "" if row.target is None else f"{row.target:g}{'' if row.unit == 'of the peer' else ' ' + row.unit}"
        lines.append([row.op, row.shape, f"{row.microseconds:,.1f}", *rates, row.peer, ratio, verdict(aim, row.met)])
    print_table(["operation", "shape", "us", "TB/s", "TFLOP/s", "against", "ratio", "target"], [lines], left=(0, 1, 5))
    gpu = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "command": command(),
    }
    write_json(json_path, {**gpu, "copy_rate": copy_rate, "rows": [asdict(row) for row in rows]})
