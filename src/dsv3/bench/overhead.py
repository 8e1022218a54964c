"""What training takes beside the steps themselves: data, metrics, logs, checkpoints, the average of the weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.bench.measure import Progress, machine
from dsv3.recipe.schema import Recipe
from dsv3.stages.pretrain import pretraining_stages, train
from dsv3.stages.runner import run_stages
from dsv3.training.device import device_name, pick_device

TARGET = 0.03
"""Share of the training time that all of it together should stay below."""


@dataclass(frozen=True)
class Overhead:
    """Milliseconds a step, as `bench_overhead` measured them."""

    step: float
    """Of training: from the batch that is asked for to the figures that are read."""
    parts: Mapping[str, float]
    """What the loop spends beside, or waits for, by name; of the threads beside it, the processor's time."""
    shapes: Mapping[str, Any]
    machine: Mapping[str, str] = field(default_factory=machine)

    @property
    def share(self) -> float:
        """All parts together over the step."""
        return sum(self.parts.values()) / self.step


def bench_overhead(recipe: Recipe, out: Path, steps: int = 60, progress: Progress = lambda **_: None) -> Overhead:
    """Trains for so many steps in `out`, with two checkpoints, and counts one for as many steps as the recipe has between two.

    The tokenizer and the shards are made in `out` as well. Nothing is evaluated but a few bytes.
    """
    batch = recipe.schedule.batch_size
    size = int(batch if isinstance(batch, int | float) else batch[0].values[0])
    every = recipe.training.checkpoint_every_steps or steps
    content = recipe.to_dict()
    content["evaluation"] = {"bits_per_byte_bytes": 1}
    content["training"] |= {
        "tokens": steps * size * recipe.data.sequence_length, "checkpoint_every_steps": -(-steps // 2),
        "evaluate_every_steps": None,
    }  # fmt: skip
    short = Recipe.from_dict(content)
    *before, _ = pretraining_stages(short, out, progress, lambda _: None)
    run_stages(before, out, lambda *_: None)
    trainer = train(short, out, progress, lambda _: None)
    parts = {name: 1000 * seconds / steps for name, seconds in trainer.spent.items()}
    parts["thread of checkpoints"] = 1000 * trainer.saver.seconds / steps
    if trainer.average is not None:
        parts["thread of the average"] = 1000 * trainer.average.seconds / steps
    for name in ("checkpoints", "thread of checkpoints"):
        parts[name] *= steps / 2 / every
    shapes = {
        "preset": recipe.model.preset, "batch": size, "length": recipe.data.sequence_length, "steps": steps,
        "steps between checkpoints": every, "device": device_name(pick_device(recipe.training.device)),
    }  # fmt: skip
    return Overhead(1000 * trainer.seconds / steps, parts, shapes)
