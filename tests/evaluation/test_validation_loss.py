import pytest
import torch
import torch.nn.functional as F

from dsv3.data.files import SkipReport
from dsv3.data.token_shard_writer import ShardWriter
from dsv3.data.token_shards import ShardSet
from dsv3.evaluation.validation_loss import ValidationLoss
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3

PAD, ROW = 2, 13


@pytest.fixture(scope="module")
def model():
    return DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", seed=1)


def shard_set(directory, documents):
    writer = ShardWriter(directory, vocab_size=300, tokenizer_hash="t", origin={})
    for number, ids in enumerate(documents):
        writer.add(str(number), ids, len(ids))
    writer.finish(SkipReport())
    return ShardSet.open(directory)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    return {
        name: shard_set(
            tmp_path_factory.mktemp(name),
            [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths],
        )
        for name, lengths in {"long": [60, 30, 7, 13, 5], "short": [4, 4]}.items()
    }


def expected(model, validation, name, rows, mask):
    """Token by token, from whole logits."""
    nats, count = 0.0, 0
    batch = validation._loaders[name].rows(0, rows)
    segments = batch.segment_ids[:, :-1] if mask else None
    logits = model(batch.tokens[:, :-1], positions=batch.positions[:, :-1], segment_ids=segments).logits
    for k in range(rows):
        for t in range(ROW - 1):
            crosses = batch.segment_ids[k, t] != batch.segment_ids[k, t + 1]
            if batch.valid[k, t + 1] and not (mask and crosses):
                nats += F.cross_entropy(logits[k, t], batch.tokens[k, t + 1]).item()
                count += 1
    return nats / count


@pytest.mark.parametrize("mask", [False, True])
def test_it_is_the_mean_over_the_targets_of_each_source(model, sets, mask):
    validation = ValidationLoss(sets, ROW, 10_000, PAD, mask)
    model.train()
    found = validation(model)
    assert model.training
    assert found.keys() == {"long", "short"}
    model.eval()
    for name in sets:
        rows = validation._loaders[name].plans[0].rows
        assert rows > 8 if name == "long" else rows == 1
        with torch.no_grad():
            assert found[name] == pytest.approx(expected(model, validation, name, rows, mask), rel=1e-4)


def test_the_tokens_are_bounded_and_the_rows_the_same_each_time(model, sets):
    validation = ValidationLoss(sets, ROW, 25, PAD)
    found = validation(model)
    assert validation(model) == found
    with torch.no_grad():
        assert found["long"] == pytest.approx(expected(model.eval(), validation, "long", 2, False), rel=1e-4)
