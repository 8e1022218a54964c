"""Documents that a tiny model learns in a few steps, and trainers on them."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dsv3.data.files import SkipReport
from dsv3.data.loader import Loader
from dsv3.data.token_shard_writer import ShardWriter
from dsv3.data.token_shards import ShardSet
from dsv3.recipe.schema import Recipe
from dsv3.training.trainer import Trainer

PAD = 2
CONTENT: dict[str, Any] = {
    "model": {"preset": "debug"},
    "data": {"sources": [{"name": "counts", "uri": "builtin:stdlib"}], "sequence_length": 32},
    "schedule": {"learning_rate": 3e-3, "batch_size": 4, "bias_update_speed": 0.01},
    "training": {
        "tokens": 4 * 32 * 6, "precision": "fp32", "device": "cpu", "initialization": "fan_in", "load_every_steps": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def shard_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count in steps of 1 to 3, modulo 60."""
    directory = tmp_path_factory.mktemp("shards")
    rng = Random(0)
    writer = ShardWriter(directory, vocab_size=320, tokenizer_hash="t", origin={})
    for number in range(80):
        start, step = rng.randrange(60), rng.randint(1, 3)
        ids = [0, *(3 + (start + step * i) % 60 for i in range(rng.randint(4, 50))), 1]
        writer.add(f"counts/{number}.txt", ids, len(ids))
    writer.finish(SkipReport())
    return directory


@pytest.fixture(scope="session")
def shards(shard_directory: Path) -> ShardSet:
    return ShardSet.open(shard_directory)


@pytest.fixture
def make_trainer(shards: ShardSet) -> Callable[..., Trainer]:
    def make(directory: Path, *overrides: str, **options: Any) -> Trainer:
        recipe = Recipe.from_dict(CONTENT, overrides)
        data, training = recipe.data, recipe.training
        loader = Loader([("counts", shards, 1.0)], data.sequence_length + 1, training.seed, PAD, data.document_mask)
        return Trainer(recipe, loader, directory, files={}, **options)

    return make
