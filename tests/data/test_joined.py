from random import Random

from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.joined import joined_newline_splits, split_joined


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
    ids, splits = tokenizer.encode(text), joined_newline_splits(tokenizer)
    assert tokenizer.decode(split_joined(ids, splits, rate, Random(seed))) == text


def test_splitting_rate(tokenizer):
    splits = joined_newline_splits(tokenizer)
    ids = tokenizer.encode("f(x):\n" * 2000)
    joined = sum(token in splits for token in ids)
    assert joined == 2000
    assert split_joined(ids, splits, 0, Random(0)) == ids
    assert not splits.keys() & set(split_joined(ids, splits, 1, Random(0)))
    left = sum(token in splits for token in split_joined(ids, splits, 0.3, Random(0)))
    assert 1300 < left < 1500
