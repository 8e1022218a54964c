"""`dsv3 plan RECIPE`: memory, steps and wire traffic of a recipe's layout."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dsv3.cli.ui import print_table
from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.simulator import Timeline
from dsv3.planning.parallel import Machine, Plan
from dsv3.recipe.points import points_of
from dsv3.recipe.quantity import format_quantity
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe


def plan_recipe(
    path: Path, overrides: Sequence[str], at: Sequence[int], rates: dict[str, float], node: int, share: Path | None,
    as_json: bool,
) -> tuple[Schedule, Timeline]:  # fmt: skip
    """Prints the plan of a recipe; returns the schedule of its last step.

    Steps are those where a schedule changes its course, and those asked for, each batch size once.
    """
    recipe = Recipe.load(path, overrides)
    machine = Machine(**rates, node=node, layers=None if share is None else measured_layers(share, recipe))
    sizes: dict[int, int] = {}
    for point in points_of(Schedules.resolve(recipe), recipe.training.tokens, at):
        sizes.setdefault(point.batch_size, point.tokens)
    plans = {tokens: Plan(recipe, size, machine) for size, tokens in sizes.items()}
    last, found = list(plans.values())[-1], figures(recipe, plans)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show(path, found)
    return last.schedule, last.timeline


def figures(recipe: Recipe, plans: dict[int, Plan]) -> dict[str, Any]:
    """All of it, JSON-able, by tokens before the step. Memory and traffic are those of the last plan."""
    last, parallel = list(plans.values())[-1], recipe.parallel
    memory = [last.memory(rank) for rank in range(parallel.pipeline)]
    return {
        "gpus": parallel.ranks,
        "parallel": parallel.model_dump(),
        "machine": asdict(last.machine),
        "memory": [{**asdict(each), "total": each.total} for each in memory],
        "wire_bytes": last.wire,
        "steps": [
            {
                "tokens": tokens, "batch": plan.batch, "schedule": plan.schedule.name, "micro_batches": plan.micro_batches,
                **asdict(plan.step), "tokens_per_second_and_gpu": plan.batch * recipe.data.sequence_length / plan.step.total / parallel.ranks,
            }
            for tokens, plan in plans.items()
        ],
    }  # fmt: skip


def show(path: Path, found: dict[str, Any]) -> None:
    """The same as tables."""
    parallel = found["parallel"]
    click.echo(
        f"{path}: {found['gpus']:,} GPUs, {parallel['pipeline']} stages x {parallel['data']}, experts over {parallel['expert']}"
    )
    sizes = ("weights", "gradients", "moments", "activations", "total")
    ranks = [
        [str(n), each["layers"], f"{each['parameters'] / 1e9:.2f}B", *(f"{each[name] / 1e9:.1f}" for name in sizes)]
        for n, each in enumerate(found["memory"])
    ]
    print_table(["rank", "layers", "parameters", *(f"{name}, GB" for name in sizes)], [ranks], left=(1,))
    times = ("total", "forward", "backward", "weight_gradient", "pair", "bubble", "update", "exposed")
    steps = [
        [
            format_quantity(each["tokens"]), f"{each['batch']:,}", each["schedule"], str(each["micro_batches"]),
            *(f"{each[name]:.2f}" for name in times), f"{each['tokens_per_second_and_gpu']:,.0f}",
        ]
        for each in found["steps"]
    ]  # fmt: skip
    columns = ["from token", "batch", "schedule", "micro-batches", *(name.replace("_", " ") for name in times)]
    print_table([*columns, "tokens/s/GPU"], [steps], left=(2,))
    for what, size in found["wire_bytes"].items():
        click.echo(f"  {what}: {size / 1e6:,.1f} MB from each GPU")


def measured_layers(path: Path, recipe: Recipe) -> dict[str, float]:
    """Seconds a token of DeepSeek-V3's layers in the recipe's precision, from a file of `dsv3 bench train --share --json`.

    Raises `UserError` for a file that has them not, and for a recipe of other layers or lengths.
    """
    from dsv3.bench.share import TOKENS  # imports torch

    depth = ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers")
    config, whole = recipe.model.config(), ModelConfig.preset("deepseek-v3")
    if (
        whole.replace(**{name: getattr(config, name) for name in depth}) != config
        or recipe.data.sequence_length != TOKENS
    ):
        raise UserError(
            f"--share {path} has times of DeepSeek-V3's layers on sequences of {TOKENS} tokens, and the recipe is of others: use "
            "--tflops"
        )
    try:
        shares = {each["precision"]: each for each in json.loads(path.read_text())["shares"] if not each["mtp"]}
        share = shares[recipe.training.precision]
        return {name: share[name] / 1000 / TOKENS for name in ("dense_layer", "moe_layer", "head")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--share {path}: expected a file that `dsv3 bench train --share --json` wrote, with times in "
            f"{recipe.training.precision} ({type(error).__name__}: {error})"
        ) from None
