"""The wiring of the comparison on one GPU, at the size of a toy; what is timed there is timed on a GPU."""

import pytest
import torch

from dsv3.bench import lite
from dsv3.errors import UserError
from dsv3.model.config import ModelConfig


@pytest.mark.prove
def test_all_sides_train_the_same_network(monkeypatch):
    monkeypatch.setattr(lite, "LENGTH", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = ModelConfig.preset("tiny", num_hidden_layers=2, vocab_size=512, num_nextn_predict_layers=0)
    result = lite.bench_lite(1, config=config)
    assert {row.name for row in result.rows} == {*lite.OURS, *lite.THEIRS}
    assert [(each.ours, each.target) for each in result.ratios] == list(lite.OURS.items())
    assert all(each.theirs in lite.THEIRS and each.value.median > 0 for each in result.ratios)


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="measures a GPU"):
        lite.bench_lite()
