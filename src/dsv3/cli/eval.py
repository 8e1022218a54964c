"""`dsv3 eval`: scores of a model."""

import json
from pathlib import Path
from typing import Any, get_args

import click

from dsv3.cli.options import PATH, QUANTITY, WHOLE_NUMBERS, chosen_of, device_option, ema_option, json_option
from dsv3.cli.ui import Progress, print_table
from dsv3.errors import UserError


@click.command("eval")
@click.argument("checkpoint", type=PATH)
@click.option("--tasks", default="bpb,tinypy,needle", help="Of bpb, tinypy, needle, position and mtp, by commas.")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Text for bpb, position and mtp; the recipe's held-out text by default.",
)
@click.option("--bytes", "size", type=QUANTITY, default="200K", help="Of text, a source.")
@click.option(
    "--length", type=click.IntRange(8), help="Tokens of bpb's windows and position's rows; as trained by default."
)
@click.option("--problems", type=click.IntRange(1), default=300, help="Tasks that tinypy asks.")
@click.option(
    "--needle-lengths", type=WHOLE_NUMBERS, help="Tokens of the haystacks; quarters of the length by default."
)
@click.option("--needle-depths", type=click.IntRange(2), default=5, help="Places of the needle.")
@click.option("--needle-samples", type=click.IntRange(1), default=4, help="Haystacks a length and place.")
@click.option("--plot", type=PATH, help="Draw the needle's heat map: .svg or .png.")
@ema_option
@device_option
@json_option
def evaluate(
    checkpoint: Path, tasks: str, data: tuple[str, ...], size: int, length: int | None, problems: int,
    needle_lengths: list[int] | None, needle_depths: int, needle_samples: int, plot: Path | None, ema: bool, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Scores the model in CHECKPOINT: a run, a checkpoint or a Hugging Face directory."""
    from dsv3.recipe.schema import EvaluationSection, Task
    from dsv3.stages.drawing import check_drawable

    chosen = chosen_of("--tasks", tasks, get_args(Task))
    if plot is not None:
        if "needle" not in chosen:
            raise UserError(f"--plot {plot} draws the needle's heat map: add needle to --tasks")
        check_drawable(plot)

    from dsv3.stages.evaluate import evaluate_path

    wanted = EvaluationSection.model_validate(dict(
        tasks=chosen, bits_per_byte_bytes=size, tinypy_tasks=problems, needle_lengths=needle_lengths or (),
        needle_depths=needle_depths, needle_samples=needle_samples,
    ))  # fmt: skip
    with Progress() as progress:
        found = evaluate_path(checkpoint, wanted, data, length, ema=ema, device=device, progress=progress)
    if plot is not None:
        from dsv3.stages.charts import needles
        from dsv3.stages.drawing import save

        save(lambda: needles([found]), plot)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    print_scores(found)
    if plot is not None:
        click.echo(f"drawn: {plot}")


def print_scores(found: dict[str, Any]) -> None:
    """Tables for people."""
    for name, bits in found.get("bits_per_byte", {}).items():
        click.echo(f"{name}: {bits:.4f} bits per byte")
    for name, score in found.get("pass_at_1", {}).items():
        ways = ", ".join(f"{count} {kind}" for kind, count in found["failures"][name].items())
        click.echo(f"{name}: {score['passed']} of {score['total']} tasks solved{f' (else: {ways})' if ways else ''}")
    for name, shares in found.get("mtp_acceptance", {}).items():
        by_depth = ", ".join(f"draft {depth} {share:.1%}" for depth, share in enumerate(shares, 1))
        click.echo(f"{name}: accepted of the MTP modules' drafts: {by_depth}")
    if needle := found.get("needle"):
        rows = []
        for length, row in zip(needle["lengths"], needle["passed"], strict=True):
            share = sum(row) / (needle["samples"] * len(row))
            rows.append([f"{length:,} tokens", *(f"{each}/{needle['samples']}" for each in row), f"{share:.0%}"])
        print_table(["needle at", *(f"{depth:.0%}" for depth in needle["depths"]), "all"], [rows])
    if positions := found.get("loss_by_position"):
        edges = next(iter(positions.values()))["edges"]
        rows = [[name, *(f"{nats:.3f}" for nats in losses["nats"])] for name, losses in positions.items()]
        print_table(["nats a token, from", *(f"{edge:,}" for edge in edges[:-1])], [rows])
