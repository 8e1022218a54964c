"""Loss by position against a loop over single tokens."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dsv3.errors import UserError
from dsv3.evaluation.position import loss_by_position
from dsv3.model.config import ModelConfig, RopeScaling
from dsv3.model.transformer import DeepSeekV3

A, B = (3 + ord(letter) for letter in "ab")


class Bytes:
    bos_id, eos_id = 0, 1

    def encode(self, text):
        return [3 + byte for byte in text.encode()]


def test_rows_overlap_and_count_the_same_tokens_in_every_share():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", 0).eval()
    length, shares, texts = 16, 4, ["hello world", "abc" * 9, "x"]
    ids = [token for text in texts for token in (0, *Bytes().encode(text), 1)]
    expected = [[] for _ in range(shares)]
    rows = (len(ids) - 1 - length) // 4 + 1
    assert rows > shares
    for target in range(13, 13 + 4 * (rows - shares + 1)):
        for share in range(shares):
            start = (target - 1) // 4 * 4 - 4 * share
            row = torch.tensor([ids[start : start + length + 1]])
            log = model(row[:, :-1]).logits[0].log_softmax(-1)
            expected[share].append(-log[target - 1 - start, ids[target]].item())
    found = loss_by_position(model, Bytes(), texts, length=length, shares=shares)
    assert found.rows == rows
    assert found.edges == (0, 4, 8, 12, 16)
    assert found.nats == pytest.approx([sum(each) / len(each) for each in expected], rel=1e-5)


def test_a_model_that_sees_no_context_is_as_good_everywhere():
    """Text that is harder at some places than at others makes no difference; in rows side by side it would."""

    class Blind(torch.nn.Module):
        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 300)
            logits[..., 3 + ord("a")] = 3.0
            return SimpleNamespace(hidden=logits)

        def head(self, hidden):
            return hidden

    text = ("a" * 40 + "b" * 24) * 20
    nats = loss_by_position(Blind(), Bytes(), [text], length=64, shares=8).nats
    assert max(nats) - min(nats) < 1e-6
    hard = [sum(text[at : at + 8].count("b") for at in range(8 * k, len(text), 64)) for k in range(8)]
    assert (min(hard), max(hard)) == (0, 160)


def test_a_model_that_fails_beyond_its_length_is_told():
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
    assert found.nats[0] < 0.1
    assert min(found.nats[1:]) > 19


def test_refusals():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", 0)
    with pytest.raises(UserError, match="the held-out texts have 7 tokens in all; expected at least 31"):
        loss_by_position(model, Bytes(), ["hello"], length=16)
    with pytest.raises(UserError, match="have 30 tokens in all; expected at least 31"):
        loss_by_position(model, Bytes(), ["a" * 28], length=16)
    with pytest.raises(UserError, match="over 20 tokens: expected a multiple of 8"):
        loss_by_position(model, Bytes(), ["hello" * 9], length=20)


def prefers_the_near(rope_scaling):
    """One head built by hand that looks at what is near, and says that it comes again; made for 64 tokens.

    Its logits are `8 cos(pi d / 64)` at the distance d: the furthest token that it was made for counts least. All that
    comes before the last norm is a constant (feature 0), what a token is (1, 2) and what the head saw (3, 4).
    """
    made_for, strength = 64, 8.0
    config = ModelConfig.preset(
        "debug", num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0, num_attention_heads=1,
        q_lora_rank=None, qk_rope_head_dim=4, rope_theta=(made_for / math.pi) ** 2, max_position_embeddings=320,
        rope_scaling=rope_scaling,
    )  # fmt: skip
    model = DeepSeekV3(config)
    weights = model.state_dict()
    for tensor in weights.values():
        tensor.fill_(1.0 if tensor.dim() == 1 else 0.0)
    attention = model.layers[0].self_attn
    scale = (config.hidden_size / 2) ** 0.5  # what the norm makes of a feature of 1 beside another one
    latent = config.kv_lora_rank**0.5
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = 1.0
        for feature, token in enumerate((A, B), 1):
            model.embed_tokens.weight[token, feature] = 1.0
            attention.kv_a_proj_with_mqa.weight[feature - 1, feature] = 1.0
            attention.kv_b_proj.weight[config.qk_nope_head_dim + feature - 1, feature - 1] = 1.0 / latent
            attention.o_proj.weight[2 + feature, feature - 1] = 1.0
            model.lm_head.weight[token, 2 + feature] = 1.0
        # The slow pair of the rotated part: constant keys, and queries that make up for all scales of a plain head.
        attention.kv_a_proj_with_mqa.weight[config.kv_lora_rank + 2, 0] = 1.0
        attention.q_proj.weight[config.qk_nope_head_dim + 2, 0] = strength * config.qk_head_dim**0.5 / scale**2
    return model


@pytest.mark.parametrize("yarn", [True, False])
def test_beyond_its_length_a_model_is_as_good_as_within_and_only_with_yarn(yarn):
    """Text that is `a` 31 times and `b` from then on: without YaRN, what is two lengths away turns as near again."""
    scaling = RopeScaling(factor=5.0, original_max_position_embeddings=64) if yarn else None
    row = torch.tensor([0] + [A] * 31 + [B] * 225)
    with torch.no_grad():
        logits = prefers_the_near(scaling)(row[None, :-1]).logits[0]
    nats = F.cross_entropy(logits, row[1:], reduction="none").view(8, 32).mean(1).tolist()
    within, beyond = max(nats[:2]), max(nats[2:])
    assert (beyond < within) if yarn else (beyond > 1.2 * within)
