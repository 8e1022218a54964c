from pathlib import Path

import pytest

from dsv3.data.tokenizer import train_tokenizer
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.checkpoint import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with a model of random weights, and other random ones for their average: what they write is noise, but
    always the same."""
    out = tmp_path_factory.mktemp("run")
    train_tokenizer(["def add(first, second):\n    return first + second\n"] * 20, 320).save(out / "tokenizer")
    model, average = (DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", seed=seed) for seed in (1, 2))
    save_checkpoint(
        out / "pretrain" / "checkpoints" / "step-00000001",
        {"model": model.state_dict(), "ema": average.state_dict()},
        {"model": model.config.to_hf()},
        {"tokenizer": out / "tokenizer"},
    )
    return out
