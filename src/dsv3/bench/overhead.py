"""What training takes beside the steps themselves: data, metrics, logs, checkpoints, the average of the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.bench.measure import Progress
from dsv3.model.device import pick_device
from dsv3.recipe.schema import Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.machine import machine
from dsv3.stages.pretrain import pretraining_stages, train
from dsv3.stages.runner import run_stages
from dsv3.training.device import device_name

TARGET = 0.03
"""Share of the training time that all of it together should stay below."""
CHECKPOINTS = 2
"""Written while measuring."""
WARM_UP = 4
"""Steps of a run of its own before."""


@dataclass(frozen=True)
class Overhead:
    """Milliseconds a step, as `bench_overhead` measured them."""

    step: float
    """Of training: from the batch that is asked for to the figures that are read."""
    parts: Mapping[str, float]
    """What the loop spends beside the step, or waits for, by name. On a CPU, where background threads take its cores, their
    processor time as well."""
    threads: Mapping[str, float]
    """Processor time of background threads; on a GPU they run beside it, and what they delay is among the parts."""
    shapes: Mapping[str, Any]
    machine: Mapping[str, str]

    @property
    def share(self) -> float:
        """All parts together over the step."""
        return sum(self.parts.values()) / self.step


def bench_overhead(recipe: Recipe, out: Path, steps: int = 60, progress: Progress = lambda **_: None) -> Overhead:
    """Trains for so many steps in `out`, with two checkpoints, and counts one for as many steps as the recipe has between two.

    What is done once is spread over the recipe's whole run. Waiting for the one before counts as far as
    writing takes longer than the steps between two of the recipe's. The tokenizer and the shards are made in `out` as well.
    Nothing is evaluated but a few bytes.
    """
    batch = recipe.schedule.batch_size
    size = int(batch if isinstance(batch, int | float) else batch[0].values[0])
    every = recipe.training.checkpoint_every_steps or steps
    content = recipe.to_dict()
    content["evaluation"] = {"bits_per_byte_bytes": 1}

    def short(steps: int) -> Recipe:
        content["training"] |= {
            "tokens": steps * size * recipe.data.sequence_length, "checkpoint_every_steps": -(-steps // CHECKPOINTS),
            "evaluate_every_steps": None,
        }  # fmt: skip
        return Recipe.from_dict(content)

    *before, _ = pretraining_stages(RunContext(short(steps), out, progress))
    run_stages(before, out, lambda *_: None)
    # What is compiled for the first steps would be counted as training.
    train(RunContext(short(WARM_UP), out, progress), stage="warm-up")
    trainer = train(RunContext(short(steps), out, progress))
    step, saver = trainer.seconds / steps, trainer.saver.spent
    parts = {name: seconds / steps for name, seconds in trainer.spent.items()}
    blocked = trainer.spent["checkpoints"] - saver["waiting"] + saver.get("copying", 0.0)
    late = max(0.0, saver["writing"] / CHECKPOINTS - every * step)
    whole_run = recipe.training.tokens / (size * recipe.data.sequence_length)
    parts["checkpoints"] = (blocked / CHECKPOINTS + late) / every
    threads = {
        "thread of checkpoints": saver["processor"] / CHECKPOINTS / every,
        "room for them, once": saver["preparing"] / whole_run,
    }
    if trainer.average is not None:
        threads["thread of the average"] = trainer.average.seconds / steps
    device = pick_device(recipe.training.device)
    parts |= threads if device.type == "cpu" else {}
    shapes = {
        "preset": recipe.model.preset, "batch": size, "length": recipe.data.sequence_length, "steps": steps,
        "steps between checkpoints": every, "device": device_name(device),
    }  # fmt: skip
    parts, threads = ({name: 1000 * each for name, each in seconds.items()} for seconds in (parts, threads))
    return Overhead(1000 * step, parts, threads, shapes, machine(device))
