"""Tokens that join punctuation with line breaks, and their random splitting.

The pre-tokenizer makes such tokens; a prompt that ends before its line break then ends where training texts never do. The report
splits a proportion of them at random while training (section 4.1) and leaves the proportion open.
"""

import unicodedata
from collections.abc import Sequence
from random import Random

from dsv3.data.tokenizer import Tokenizer


def joined_newline_splits(tokenizer: Tokenizer) -> dict[int, tuple[list[int], list[int]]]:
    """For each token that joins punctuation or symbols with following line breaks: the ids of its two parts."""
    splits = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
        head = text.rstrip("\r\n")
        marks = head.removeprefix(" ")
        if marks and head != text and all(unicodedata.category(c)[0] in "PS" and c != "\ufffd" for c in marks):
            splits[token] = (tokenizer.encode(head), tokenizer.encode(text[len(head) :]))
    return splits


def split_joined(
    ids: Sequence[int], splits: dict[int, tuple[list[int], list[int]]], rate: float, rng: Random
) -> list[int]:
    """Splits each joined token with probability `rate`; the decoded text stays the same.

    `splits` comes from `joined_newline_splits`.
    """
    if rate == 0:
        return list(ids)
    chosen = [at for at, token in enumerate(ids) if token in splits and rng.random() < rate]
    result: list[int] = []
    copied = 0
    for at in chosen:
        head, tail = splits[ids[at]]
        result += ids[copied:at]
        result += head
        result += tail
        copied = at + 1
    return [*result, *ids[copied:]]
