"""Tokens that join punctuation with line breaks, and their random splitting.

The pre-tokenizer makes such tokens, so a prompt that ends before its line break ends where no training text does. The report
splits a proportion of them at random in training (section 4.1); it does not say which.
"""

import unicodedata
from random import Random

import numpy as np
import numpy.typing as npt

from dsv3.data.tokenizer import Tokenizer


def joined_newline_splits(tokenizer: Tokenizer) -> dict[int, tuple[list[int], list[int]]]:
    """For each token that joins punctuation or symbols with following line breaks: the ids of its two parts."""
    splits = {}
    for token in range(tokenizer.vocab_size):
        whole = tokenizer.token_bytes(token)
        if not whole.endswith((b"\r", b"\n")):
            continue
        text = whole.decode("utf-8", errors="replace")
        head = text.rstrip("\r\n")
        marks = head.removeprefix(" ")
        if marks and all(unicodedata.category(c)[0] in "PS" and c != "\ufffd" for c in marks):
            splits[token] = (tokenizer.encode(head), tokenizer.encode(text[len(head) :]))
    return splits


class JoinedSplitter:
    """Splits each joined token of a tokenizer with probability `rate`; the decoded text stays the same."""

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        self._rate = rate
        splits = joined_newline_splits(tokenizer) if rate else {}
        self._parts = {token: np.array(head + tail, dtype=np.uint32) for token, (head, tail) in splits.items()}
        self._joined = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        self._joined[list(splits)] = True

    def split(self, ids: npt.NDArray[np.uint32], rng: Random) -> npt.NDArray[np.uint32]:
        """uint32 [length] -> uint32 [no shorter]. Draws one number for each joined token."""
        if self._rate == 0:
            return ids
        pieces, copied = [], 0
        for at in np.flatnonzero(self._joined[ids]).tolist():
            if rng.random() < self._rate:
                pieces += [ids[copied:at], self._parts[int(ids[at])]]
                copied = at + 1
        return np.concatenate([*pieces, ids[copied:]])
