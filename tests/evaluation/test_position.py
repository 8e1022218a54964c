"""Loss by position against a loop over single tokens."""

from types import SimpleNamespace

import pytest
import torch

from dsv3.errors import UserError
from dsv3.evaluation.position import loss_by_position
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3


class Bytes:
    bos_id, eos_id = 0, 1

    def encode(self, text):
        return [3 + byte for byte in text.encode()]


def test_losses_are_those_of_a_loop():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", 0).eval()
    texts = ["hello world", "abc" * 20, "x"]
    length, shares = 16, 4
    ids = []
    for text in texts:
        ids += [0, *Bytes().encode(text), 1]
    expected = [[] for _ in range(shares)]
    rows = 0
    for start in range(0, len(ids) - length, length):
        row = torch.tensor([ids[start : start + length + 1]])
        log = model(row[:, :-1]).logits[0].log_softmax(-1)
        for at in range(length):
            expected[at * shares // length].append(-log[at, row[0, at + 1]].item())
        rows += 1
    found = loss_by_position(model, Bytes(), texts, length=length, shares=shares)
    assert found.rows == rows == 4
    assert found.edges == (0, 4, 8, 12, 16)
    assert found.nats == pytest.approx([sum(each) / len(each) for each in expected], rel=1e-5)
    assert found.between(4, 12) == pytest.approx((found.nats[1] + found.nats[2]) / 2)


def test_a_model_that_fails_beyond_its_length_is_told(monkeypatch):
    """Sure and right on the first eight tokens, and sure and wrong from there on."""

    class Short(torch.nn.Module):
        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 300)
            logits[:, :8, 3 + ord("a")] = 20.0
            logits[:, 8:, 3 + ord("b")] = 20.0
            return SimpleNamespace(hidden=logits)

        def head(self, hidden):
            return hidden

    found = loss_by_position(Short(), Bytes(), ["a" * 500], length=32, shares=4)
    assert found.between(0, 8) < 0.1
    assert found.between(8, 32) > 19


def test_refusals():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", 0)
    with pytest.raises(UserError, match="the held-out texts have 7 tokens in all; expected at least 17"):
        loss_by_position(model, Bytes(), ["hello"], length=16)
    with pytest.raises(UserError, match="over 20 tokens: expected a multiple of 8"):
        loss_by_position(model, Bytes(), ["hello" * 9], length=20)
