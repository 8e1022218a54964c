from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.joined import JoinedSplitter, joined_newline_splits


def test_joined_newline_tokens_split_at_the_line_break(tokenizer):
    splits = joined_newline_splits(tokenizer)
    joined = [tokenizer.decode([token]) for token in splits]
    assert "):\n" in joined
    assert "。\n" in joined
    assert not [text for text in joined if not text.strip() or text.strip().isalnum()]
    for token, (head, tail) in splits.items():
        assert tokenizer.decode(head) + tokenizer.decode(tail) == tokenizer.decode([token])
        assert tokenizer.decode(tail).strip("\r\n") == ""
        assert not tokenizer.decode(head).endswith(("\r", "\n"))


@given(seed=st.integers(0, 2**32), rate=st.floats(0, 1))
def test_splitting_leaves_the_text_alone(tokenizer, seed, rate):
    text = "f(x):\n    g(),\n\n[1];\nend.\r\n" * 5
    found = JoinedSplitter(tokenizer, rate).split(np.array(tokenizer.encode(text), dtype=np.uint32), Random(seed))
    assert found.dtype == np.uint32
    assert tokenizer.decode(found.tolist()) == text


def test_splitting_rate(tokenizer):
    splits = joined_newline_splits(tokenizer)
    ids = np.array(tokenizer.encode("f(x):\n" * 2000), dtype=np.uint32)

    def left(rate):
        return sum(token in splits for token in JoinedSplitter(tokenizer, rate).split(ids, Random(0)).tolist())

    assert (left(0), left(1)) == (2000, 0)
    assert 1300 < left(0.3) < 1500


@pytest.mark.parametrize("text", ["", "word", "):\n", "f():\n", "):\nf"])
def test_texts_of_few_tokens(tokenizer, text):
    ids = np.array(tokenizer.encode(text), dtype=np.uint32)
    assert tokenizer.decode(JoinedSplitter(tokenizer, 1).split(ids, Random(0)).tolist()) == text
