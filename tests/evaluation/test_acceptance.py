"""Acceptance of MTP drafts against a loop that runs every draft's passes by themselves."""

import pytest
import torch

from dsv3.data.tokenizer import train_tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.acceptance import acceptance, accepted_drafts
from dsv3.model.block import Pass
from dsv3.model.config import ModelConfig
from dsv3.model.rope import rotations
from dsv3.model.transformer import DeepSeekV3

TEXTS = ["def f(x):\n    return x + 1\n", "for i in range(3):\n    print(i)\n", "a"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 20, vocab_size=300)


def network(depth):
    config = ModelConfig.preset("debug", num_nextn_predict_layers=depth, vocab_size=300)
    return DeepSeekV3(config).initialize(0.2).eval()


def said(model, tokens):
    """What the main model says after these tokens."""
    return int(model(torch.tensor([tokens])).logits[0, -1].argmax())


def drafts(model, tokens, position):
    """What module after module says: of the token k + 1 behind `position`, from the tokens up to k behind it."""
    hidden, found = None, []
    for k, module in enumerate(model.mtp, 1):
        rope = rotations(model.config, torch.arange(position + 1).unsqueeze(0))
        before = model(torch.tensor([tokens[: position + 1]])).hidden if hidden is None else hidden
        hidden, _ = module(before, model.embed(torch.tensor([tokens[k : position + 1 + k]])), Pass(rope))
        found.append(int(model.head(hidden)[0, -1].argmax()))
    return found


@pytest.mark.parametrize("depth", [1, 2])
@torch.inference_mode()
def test_against_passes_one_by_one(depth):
    # Three words are ever said, so that untrained modules agree now and then.
    model, tokens = network(depth), torch.randint(4, (18,), generator=torch.Generator().manual_seed(1)).tolist()
    model.lm_head.weight[3:] = 0
    found = accepted_drafts(model, torch.tensor([tokens]))[:, 0]
    expected = torch.zeros_like(found)
    for position in range(len(tokens) - depth):
        right = True
        for k, draft in enumerate(drafts(model, tokens, position), 1):
            right &= draft == said(model, tokens[: position + k + 1])
            expected[k - 1, position] = right
    assert torch.equal(found, expected)
    assert 0 < found[0].float().mean() < 1


def test_shares_are_over_all_positions_of_all_texts(tokenizer):
    model = network(2)
    with torch.inference_mode():
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
        parts = [accepted_drafts(model, torch.tensor([each[:-1]]))[:, 0] for each in ids if len(each) > 3]
    expected = torch.cat(parts, dim=1).double().mean(1)
    found = acceptance(model, tokenizer, TEXTS, sequence_length=200, batch_rows=2)
    assert found == pytest.approx(expected.tolist())
    assert found[1] <= found[0]


def test_what_cannot_be_drafted_is_refused(tokenizer):
    with pytest.raises(UserError, match="no MTP modules"):
        acceptance(network(0), tokenizer, TEXTS, sequence_length=8, batch_rows=2)
    with pytest.raises(UserError, match="none of 1 texts"):
        acceptance(network(1), tokenizer, [""], sequence_length=8, batch_rows=2)
