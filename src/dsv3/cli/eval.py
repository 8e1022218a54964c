"""`dsv3 eval`: scores of a model."""

import json
from pathlib import Path
from typing import Any, get_args

import click

from dsv3.errors import UserError, nearest


@click.command("eval", short_help="Score a model: bits per byte, tasks, needles, loss by position.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--tasks", default="bpb,tinypy,needle", show_default=True, help="Of bpb, tinypy, needle and position, by commas."
)
@click.option(
    "--data", multiple=True, metavar="PATH", help="Text for bpb and position; the recipe's held-out text by default."
)
@click.option("--bytes", "size", default="200K", show_default=True, help="Of text, a source.")
@click.option(
    "--length", type=click.IntRange(8), help="Tokens of bpb's windows and position's rows; as trained by default."
)
@click.option("--problems", type=click.IntRange(1), default=300, show_default=True, help="Tasks that tinypy asks.")
@click.option("--needle-lengths", metavar="N,N", help="Tokens of the haystacks; quarters of the length by default.")
@click.option("--needle-depths", type=click.IntRange(2), default=5, show_default=True, help="Places of the needle.")
@click.option(
    "--needle-samples", type=click.IntRange(1), default=4, show_default=True, help="Haystacks a length and place."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the needle's heat map: .svg or .png.")
@click.option("--ema", is_flag=True, help="With the average of the weights that the run kept.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def evaluate(
    checkpoint: Path, tasks: str, data: tuple[str, ...], size: str, length: int | None, problems: int,
    needle_lengths: str | None, needle_depths: int, needle_samples: int, plot: Path | None, ema: bool, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Scores the model in CHECKPOINT: a run, a checkpoint or a Hugging Face directory."""
    from dsv3.recipe.quantity import parse_quantity
    from dsv3.recipe.schema import EvaluationSection, Task
    from dsv3.stages.drawing import check_drawable

    chosen = [task.strip() for task in tasks.split(",") if task.strip()]
    if not chosen:
        raise UserError(f"--tasks {tasks!r} names none: expected some of bpb, tinypy, needle and position, by commas")
    for task in chosen:
        if task not in get_args(Task):
            raise UserError(f"unknown task {task!r}: {nearest(task, get_args(Task))}")
    if plot is not None:
        if "needle" not in chosen:
            raise UserError(f"--plot {plot} draws the needle's heat map: add needle to --tasks")
        check_drawable(plot)
    lengths = (needle_lengths or "").split(",") if needle_lengths else []
    if not all(part.isdecimal() and int(part) > 0 for part in lengths):
        raise UserError(
            f"--needle-lengths {needle_lengths!r}: expected numbers of tokens by commas, such as 256,512,1024"
        )
    try:
        most = parse_quantity(size)
    except ValueError as error:
        raise UserError(f"--bytes {size!r}: {error}") from None

    from dsv3.cli.ui import Progress
    from dsv3.stages.evaluate import evaluate_path

    wanted = EvaluationSection.model_validate(dict(
        tasks=chosen, bits_per_byte_bytes=most, tinypy_tasks=problems, needle_lengths=[int(part) for part in lengths],
        needle_depths=needle_depths, needle_samples=needle_samples,
    ))  # fmt: skip
    with Progress() as progress:

        def show(task: str, done: int, total: int) -> None:
            progress(stage=task, done=done, total=total)

        found = evaluate_path(checkpoint, wanted, data, length, ema=ema, device=device, progress=show)
    if plot is not None:
        from dsv3.stages.needle_chart import draw_needle

        draw_needle(found["needle"], plot)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    print_scores(found)
    if plot is not None:
        click.echo(f"drawn: {plot}")


def print_scores(found: dict[str, Any]) -> None:
    """Tables for people."""
    from rich import box
    from rich.table import Table

    from dsv3.cli.ui import table_console

    console = table_console()
    for name, bits in found.get("bits_per_byte", {}).items():
        click.echo(f"{name}: {bits:.4f} bits per byte")
    for name, score in found.get("pass_at_1", {}).items():
        ways = ", ".join(f"{count} {kind}" for kind, count in found["failures"][name].items())
        click.echo(f"{name}: {score['passed']} of {score['total']} tasks solved{f' (else: {ways})' if ways else ''}")
    if needle := found.get("needle"):
        table = Table("needle at", box=box.SIMPLE_HEAD)
        for depth in needle["depths"]:
            table.add_column(f"{depth:.0%}", justify="right")
        table.add_column("all", justify="right")
        for length, row in zip(needle["lengths"], needle["passed"], strict=True):
            share = sum(row) / (needle["samples"] * len(row))
            table.add_row(f"{length:,} tokens", *(f"{each}/{needle['samples']}" for each in row), f"{share:.0%}")
        console.print(table)
    if positions := found.get("loss_by_position"):
        edges = next(iter(positions.values()))["edges"]
        table = Table("nats a token, from", box=box.SIMPLE_HEAD)
        for edge in edges[:-1]:
            table.add_column(f"{edge:,}", justify="right")
        for name, losses in positions.items():
            table.add_row(name, *(f"{nats:.3f}" for nats in losses["nats"]))
        console.print(table)
