"""Does context extension do what it is for? The quickstart's model at 4 times its length, before and after the two phases.

    python -m tools.extension --start runs/quickstart --out runs/quickstart

runs `recipes/quickstart/extend-512.toml` and `extend-1024.toml` from the run in `--start`, scores the start (as it is, and
with YaRN switched on but nothing trained) and the results of both phases on needles and loss by position up to 1024 tokens,
and prints what it found. It exits with 1 when the loss beyond the start's length ends higher than within it, or the needles
are not found more often than before. `--without-yarn` runs both phases with plain RoPE as well, for comparison.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from dsv3.cli import main as dsv3
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import RunError
from dsv3.evaluation.tasks import run_tasks
from dsv3.model.config import RopeScaling
from dsv3.model.device import pick_device
from dsv3.model.transformer import DeepSeekV3
from dsv3.recipe.schema import Recipe
from dsv3.stages.evaluate import recipe_of
from dsv3.stages.machine import machine, versions
from dsv3.stages.scores import held_out
from dsv3.weights.opening import load_model

RECIPES = Path(__file__).parents[1] / "recipes" / "quickstart"
PHASES = ("extend-512", "extend-1024")
SOURCES = ("stdlib", "tinypy")


@click.command(help=__doc__)
@click.option("--start", type=click.Path(path_type=Path), default="runs/quickstart", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/quickstart", show_default=True)
@click.option("--samples", default=8, show_default=True, help="Haystacks a length and place.")
@click.option("--without-yarn", is_flag=True, help="Both phases with plain RoPE as well.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write everything measured to this file."
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def main(
    start: Path, out: Path, samples: int, without_yarn: bool, device: str, json_path: Path | None, overrides: tuple[str, ...]
) -> None:  # fmt: skip
    """See the module's docstring."""
    trained, _ = recipe_of(start)
    assert trained is not None
    last = Recipe.load(RECIPES / f"{PHASES[-1]}.toml", overrides)
    old, new = trained.data.sequence_length, last.data.sequence_length
    lengths = tuple(new * k // 8 for k in (1, 2, 4, 6, 8))
    asked = {"tasks": ("needle", "position"), "needle_lengths": lengths, "needle_samples": samples}
    wanted = trained.evaluation.model_copy(update=asked)
    texts = held_out(trained, wanted.bits_per_byte_bytes)

    def scored(path: Path, scaling: RopeScaling | None = None) -> dict[str, Any]:
        model, tokenizer = opened(path, device, scaling)
        return run_tasks(model, tokenizer, wanted, new, texts)

    scaling = last.model.config().rope_scaling
    found = {
        "start": scored(start),
        "start, YaRN on": scored(start, scaling),
    }
    runs = {"": ()} | ({" without YaRN": ("model.rope_scaling=none",)} if without_yarn else {})
    for label, more in runs.items():
        before = start
        for phase in PHASES:
            run = out / (phase + label.replace(" ", "-"))
            extend(phase, run, [f"extension.initial_from={before}", *overrides, *more])
            found[phase + label] = scored(run)
            before = run
    for name, figures in found.items():
        say(name, figures, old, new)
    if json_path is not None:
        content = {
            "machine": machine(pick_device(device)),
            "versions": versions(),
            "old_length": old,
            "new_length": new,
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({**content, "scores": found}, indent=1) + "\n")
    missed = [
        f"{source}: {beyond:.3f} nats beyond {old} tokens, {within:.3f} within"
        for source in SOURCES
        for within, beyond in [losses(found[PHASES[-1]], source, old, new)]
        if beyond > within
    ]
    was, now = (found_share(found[name], new) for name in ("start", PHASES[-1]))
    missed += [f"needles at {new} tokens: {was:.0%} before, {now:.0%} after"] if now <= was else []
    for line in missed:
        click.echo(f"missed: {line}", err=True)
    sys.exit(1 if missed else 0)


def extend(phase: str, run: Path, overrides: list[str]) -> None:
    """One phase through the command line, as a user runs it; a finished one is skipped."""
    resume = ["--resume"] if (run / "stages").is_dir() else []
    if code := dsv3.run(["extend", str(RECIPES / f"{phase}.toml"), "--out", str(run), *resume, *overrides]):
        raise RunError(f"dsv3 extend ended with {code}")


def opened(path: Path, device: str, scaling: RopeScaling | None) -> tuple[DeepSeekV3, Tokenizer]:
    """A run's model and tokenizer; with `scaling`, its weights in a network that scales its positions so."""
    model, tokenizer = load_model(path, device=device)
    if scaling is not None:
        weights, device_of = model.state_dict(), model.lm_head.weight.device
        model = DeepSeekV3(model.config.replace(rope_scaling=scaling), model.compute_dtype).to(device_of)
        model.load_state_dict(weights)
    return model, Tokenizer.load(tokenizer)


def losses(figures: dict[str, Any], source: str, old: int, new: int) -> tuple[float, float]:
    """Mean loss within the old length, and beyond it up to the new one."""
    nats = figures["loss_by_position"][source]["nats"]
    border = len(nats) * old // new
    return sum(nats[:border]) / border, sum(nats[border:]) / (len(nats) - border)


def found_share(figures: dict[str, Any], length: int) -> float:
    """Share of the needles found in texts of one length."""
    needle = figures["needle"]
    row = needle["passed"][needle["lengths"].index(length)]
    return sum(row) / (len(row) * needle["samples"])


def say(name: str, figures: dict[str, Any], old: int, new: int) -> None:
    """One paragraph."""
    shares = ", ".join(f"{length}: {found_share(figures, length):.0%}" for length in figures["needle"]["lengths"])
    click.echo(f"\n{name}\n  needles found, by tokens: {shares}")
    for source in SOURCES:
        within, beyond = losses(figures, source, old, new)
        parts = " ".join(f"{nats:.3f}" for nats in figures["loss_by_position"][source]["nats"])
        click.echo(f"  {source}: {within:.3f} nats within {old} tokens, {beyond:.3f} beyond; by eighths {parts}")


if __name__ == "__main__":
    main()
