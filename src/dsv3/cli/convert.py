"""`dsv3 import` and `dsv3 export`: published files into checkpoints, and back."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv3.cli.options import PATH, ema_option
from dsv3.cli.ui import Progress
from dsv3.errors import UserError
from dsv3.recipe.figures import storage

if TYPE_CHECKING:
    from dsv3.weights.convert import ImportPlan

WORKERS = click.option("--workers", type=click.IntRange(1, 64), default=2, help="Files written at a time.")
GB = 1e9


@click.command("import")
@click.argument("directory", metavar="DIR", type=PATH)
@click.argument("checkpoint", type=PATH)
@click.option("--dtype", default="auto", help="auto (what the files hold, FP8 included), bf16 or fp32.")
@click.option("--config", type=PATH, help="The ModelArgs file of DeepSeek's own layout, if not in DIR.")
@click.option("--dry-run", is_flag=True, help="Check the files and print what would be written.")
@WORKERS
def import_command(
    directory: Path, checkpoint: Path, dtype: str, config: Path | None, dry_run: bool, workers: int
) -> None:
    """Make CHECKPOINT from the published weights in DIR.

    DIR is a Hugging Face directory (DeepSeek-V3, V3.1, R1, Moonlight, ...) or one in the layout of DeepSeek's inference
    code. Stopped, the same command goes on where it was.
    """
    from dsv3.weights.convert import import_weights, plan_import
    from dsv3.weights.opening import named_dtype

    plan = plan_import(directory, named_dtype(dtype), config)
    describe(plan)
    if dry_run:
        return
    with Progress() as progress:
        import_weights(plan, checkpoint, workers, partial(progress, "import", in_bytes=True))
    click.echo(f"checkpoint: {checkpoint}")


@click.command("export")
@click.argument("checkpoint", type=PATH)
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--dtype", help="bf16 or fp32; without it, weights stay what they are.")
@click.option("--fp8", is_flag=True, help="Weights in FP8 blocks, as the released checkpoints have them.")
@ema_option
@click.option("--shard-size", type=float, default=5.0, help="GB of a file at most.")
@WORKERS
def export_command(
    checkpoint: Path, directory: Path, dtype: str | None, fp8: bool, ema: bool, shard_size: float, workers: int
) -> None:
    """Write CHECKPOINT, or a run's newest one, as the Hugging Face directory DIR.

    transformers, vLLM and SGLang load it. CHECKPOINT may also be published weights, for instance to change their dtype.
    Stopped, the same command goes on where it was.
    """
    if fp8 and dtype is not None:
        raise UserError(f"--fp8 and --dtype {dtype}: choose one of them")
    import torch

    from dsv3.weights.convert import export_weights
    from dsv3.weights.opening import named_dtype

    wanted = torch.float8_e4m3fn if fp8 else named_dtype(dtype or "auto")
    with Progress() as progress:
        advance = partial(progress, "export", in_bytes=True)
        export_weights(checkpoint, directory, wanted, int(shard_size * GB), workers, advance, ema)
    click.echo(f"weights: {directory}")


def describe(plan: "ImportPlan") -> None:
    """What an import reads and writes."""
    written = [plan.source.layout[name] for name in plan.names.values()]
    dtypes = sorted({each.dtype for each in written})
    sizes = {dtype: sum(each.bytes for each in written if each.dtype == dtype) for dtype in dtypes}
    read = sum(each.bytes for each in plan.stored.values())
    click.echo(f"reads   {plan.source.where}: {len(plan.stored):,} tensors, {read:,} bytes")
    click.echo(
        f"writes  {len(written):,} of them as {len(plan.layout):,}, {plan.bytes_of(plan.names):,} bytes in "
        f"{len(plan.files):,} files: {', '.join(f'{dtype} {storage(size)}' for dtype, size in sizes.items())}"
    )
    click.echo(f"MTP     {plan.config.num_nextn_predict_layers} modules, without their copies of embedding and head")
