"""A run that is killed at a random moment, while saving too, goes on to the same end as one that was not."""

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.data.loader import Loader
from dsv3.data.token_shards import ShardSet
from dsv3.recipe.schema import Recipe
from dsv3.training.trainer import Trainer
from dsv3.weights.checkpoint import latest_checkpoint, read_state
from tests.training.conftest import CONTENT, PAD

OVERRIDES = ["training.checkpoint_every_steps=1", "training.keep_last=2", "training.ema_decay=0.9"]


def make(shards: Path, directory: Path, overrides: list[str]) -> Trainer:
    recipe = Recipe.from_dict(CONTENT, overrides)
    loader = Loader([("counts", ShardSet.open(shards), 1.0)], 33, recipe.training.seed, PAD)
    return Trainer(recipe, loader, directory, files={})


def train(shards: Path, directory: Path, overrides: list[str], trains: Any) -> None:
    """What the killed process does; `trains` is set after its third step, when at least two saves are done."""
    torch.set_num_threads(1)
    trainer = make(shards, directory, overrides)
    trainer.resume()
    first = trainer.step_count

    def progress(**figures: Any) -> None:
        if figures["step"] == first + 3:
            trains.set()

    trainer.progress = progress
    trainer.run()


def killed(shards: Path, directory: Path, overrides: list[str], rng: random.Random) -> int:
    """Kills a run at a random moment after its third step; the newest step that it leaves."""
    # Processes made by a server that has torch loaded begin at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dsv3.training.trainer"])
    trains = context.Event()
    process = context.Process(target=train, args=(shards, directory, overrides, trains))
    process.start()
    assert trains.wait(120)
    time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.join()
    assert process.exitcode == -9
    found = latest_checkpoint(directory / "checkpoints")
    return 0 if found is None else read_state(found)["step"]


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a process that is killed leaves the same on any file system."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as directory:
        yield Path(directory)


@pytest.mark.parametrize(("times", "steps"), [(3, 16), pytest.param(20, 200, marks=pytest.mark.prove)])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(memory_path, shard_directory, times, steps):
    overrides = [*OVERRIDES, f"training.tokens={steps * 128}"]
    rng, saved = random.Random(times), [0]
    for _ in range(times):
        saved.append(killed(shard_directory, memory_path / "killed", overrides, rng))
        assert saved[-2] + 2 <= saved[-1] < steps
    rarely = [*overrides, "training.checkpoint_every_steps=1000"]
    last = make(shard_directory, memory_path / "killed", rarely)
    assert last.resume()
    whole = make(shard_directory, memory_path / "whole", rarely)
    for trainer in (last, whole):
        trainer.run()
    for group, tensors in whole.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, last.tensors()[group][name]), f"{group}.{name}"
    newest = [f"step-{step:08d}" for step in (saved[-1], steps)]
    assert sorted(path.name for path in (memory_path / "killed" / "checkpoints").iterdir()) == ["latest", *newest]
