import time
from pathlib import Path

import pytest

from dsv3.bench.overhead import bench_overhead
from dsv3.recipe.schema import Recipe
from dsv3.training.metrics import Metrics

REDUCED = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"
OVERRIDES = [
    "model.preset=debug", 'data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', 'tokenizer.training_bytes="50K"',
    "training.ema_decay=0.9", "training.checkpoint_every_steps=50",
]  # fmt: skip


def test_what_is_spent_beside_the_steps_is_counted(tmp_path, monkeypatch):
    step = Metrics.step

    def slow(self, record):
        time.sleep(0.02)
        step(self, record)

    monkeypatch.setattr(Metrics, "step", slow)
    found = bench_overhead(Recipe.load(REDUCED, OVERRIDES), tmp_path, steps=4)
    assert found.parts.keys() == {
        "data", "metrics", "logging", "checkpoints", "thread of checkpoints", "room for them, once", "average", "thread of the average",
    }  # fmt: skip
    assert all(milliseconds > 0 for milliseconds in found.parts.values())
    assert 20 <= found.parts["logging"] < 200
    assert found.machine["device"] == found.shapes["device"]
    assert found.share == pytest.approx(sum(found.parts.values()) / found.step)
    assert (found.shapes["batch"], found.shapes["length"], found.shapes["steps between checkpoints"]) == (4, 128, 50)
    names = [path.name for path in sorted((tmp_path / "pretrain" / "checkpoints").glob("step-*"))]
    assert names == ["step-00000002", "step-00000004"]
