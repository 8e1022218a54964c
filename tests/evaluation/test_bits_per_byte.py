import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dsv3.errors import UserError
from dsv3.evaluation.bits_per_byte import bits_per_byte, cut, pad
from dsv3.ops.cross_entropy import IGNORE


class Bytes:
    """One token a byte, of 1 to 256; `bos` is 0."""

    bos_id = 0

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]


class Pairs(Bytes):
    """One token a pair of characters, below 257."""

    def encode(self, text):
        return [sum(map(ord, text[i : i + 2])) % 256 + 1 for i in range(0, len(text), 2)]


class Uniform(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens):
        return SimpleNamespace(logits=torch.full((*tokens.shape, self.vocab_size), 0.3, dtype=torch.bfloat16))


class Causal(nn.Module):
    """Logits that depend on every token before, and on how many there are, but on none after."""

    def __init__(self, vocab_size=257, width=16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(vocab_size, width, generator=generator))
        self.head = nn.Parameter(torch.randn(width, vocab_size, generator=generator))
        self.modes = []

    def forward(self, tokens):
        self.modes.append((self.training, torch.is_grad_enabled()))
        state = torch.zeros(len(tokens), self.embedding.shape[1])
        states = []
        for column in tokens.unbind(1):
            state = torch.tanh(0.5 * state + self.embedding[column])
            states.append(state)
        return SimpleNamespace(logits=torch.stack(states, 1) @ self.head)


TEXTS = ["def f(x):\n    return x\n", "é中😀", "a", "", "the quick brown fox jumps over the lazy dog" * 2]


def one_by_one(model, tokenizer, texts, sequence_length):
    """Bits, from one forward pass for every single token."""
    bits = 0.0
    with torch.no_grad():
        for text in texts:
            tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
            for position in range(1, len(tokens)):
                first = (position - 1) // sequence_length * sequence_length
                logits = model(torch.tensor([tokens[first:position]])).logits[0, -1]
                bits -= torch.log_softmax(logits.double(), 0)[tokens[position]].item() / math.log(2)
    return bits


@pytest.mark.parametrize("sequence_length", [1, 3, 7, 500])
@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_equals_one_token_at_a_time(sequence_length, batch_rows):
    model = Causal()
    result = bits_per_byte(model, Bytes(), TEXTS, sequence_length=sequence_length, batch_rows=batch_rows)
    size = sum(len(text.encode()) for text in TEXTS)
    assert result == pytest.approx(one_by_one(model, Bytes(), TEXTS, sequence_length) / size, rel=1e-6)


def test_longer_windows_are_other_numbers():
    model = Causal()
    short, long = (bits_per_byte(model, Bytes(), TEXTS, sequence_length=n, batch_rows=4) for n in (2, 500))
    assert abs(short - long) > 0.01


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 4))
def test_uniform_logits_cost_log2_of_the_vocabulary_a_token(texts, sequence_length, batch_rows):
    texts = [*texts, "x"]
    result = bits_per_byte(Uniform(300), Pairs(), texts, sequence_length=sequence_length, batch_rows=batch_rows)
    tokens = sum(len(Pairs().encode(text)) for text in texts)
    bytes_ = sum(len(text.encode()) for text in texts)
    assert result == pytest.approx(math.log2(300) * tokens / bytes_, rel=1e-6)


def test_a_uniform_byte_model_has_eight_bits():
    result = bits_per_byte(Uniform(256), Bytes(), ["any text"], sequence_length=4, batch_rows=2)
    assert result == pytest.approx(8.0, rel=1e-7)


@given(st.integers(0, 60), st.integers(1, 12))
def test_each_token_is_predicted_once(n, sequence_length):
    tokens = list(range(n + 1))
    windows = cut(tokens, sequence_length)
    assert [token for window in windows for token in window[1:]] == tokens[1:]
    assert [token for window in windows for token in window[:-1]] == tokens[:-1]
    assert all(2 <= len(window) <= sequence_length + 1 for window in windows)


def test_padding_is_ignored():
    inputs, targets = pad([[5, 6, 7], [8, 9]])
    assert inputs.tolist() == [[5, 6], [8, 0]]
    assert targets.tolist() == [[6, 7], [9, IGNORE]]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = Causal().train(training)
    bits_per_byte(model, Bytes(), TEXTS, sequence_length=8, batch_rows=4)
    assert set(model.modes) == {(False, False)}
    assert model.training is training


def test_no_text():
    with pytest.raises(UserError, match="2 texts without a byte"):
        bits_per_byte(Uniform(10), Bytes(), ["", ""], sequence_length=8, batch_rows=4)
