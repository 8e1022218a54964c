"""The wiring of the comparison on one GPU, at the size of a toy; what is timed there is timed on a GPU."""

import pytest
import torch

from dsv3.bench import lite
from dsv3.bench.limits import Rates
from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.planning.parameters import count_parameters


@pytest.mark.prove
def test_all_sides_train_the_same_network(monkeypatch):
    monkeypatch.setattr(lite, "LENGTH", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = ModelConfig.preset("tiny", num_hidden_layers=2, vocab_size=512, num_nextn_predict_layers=0)
    result = lite.bench_lite(1, config=config)
    assert {row.name for row in result.rows} == {*lite.OURS, *lite.THEIRS}
    assert [(each.ours, each.target) for each in result.ratios] == list(lite.OURS.items())
    assert all(each.theirs in lite.THEIRS and each.value.median > 0 for each in result.ratios)


def test_ceilings_are_what_all_operations_at_their_limits_give():
    config = ModelConfig.preset("lite", num_hidden_layers=6, vocab_size=32_768, num_nextn_predict_layers=0)
    rates = Rates(bf16=700e12, fp8=1200e12, copy=4.2e12, attention=5.0)
    found, tokens = lite.ceilings(config, 8192, rates), 4 * 8192
    # By hand: 5 GFLOP a token without attention's, 3.5 billion parameters at 24 bytes.
    counted = count_parameters(config)
    products = 6 * (counted.active_with_head) * tokens / rates.bf16
    attention = 4 * 6 * 5e-3 * 2 * 16 / 128
    update = 24 * counted.main / rates.copy
    assert found["dsv3 bf16"] < tokens / (products + attention + update)
    assert found["dsv3 bf16"] > 0.8 * tokens / (products + attention + update)
    assert 1.1 < found["dsv3 fp8"] / found["dsv3 bf16"] < 1200 / 700


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="measures a GPU"):
        lite.bench_lite()
