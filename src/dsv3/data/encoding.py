"""Documents to the ids that are trained on: fill-in-the-middle, words, joined tokens split, bos and eos."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from dsv3.data.files import Document
from dsv3.data.fim import FimUnit, fim_document, fim_prompt
from dsv3.data.joined import JoinedSplitter
from dsv3.data.tokenizer import Tokenizer
from dsv3.data.word_encoder import WordEncoder


@dataclass(frozen=True)
class Encoding:
    """How documents are encoded. What is random depends only on the seed and the document's id."""

    seed: int
    fim_rate: float = 0.0
    """Share of the documents that are rearranged (`fim.py`)."""
    split_joined_rate: float = 0.0
    """Share of the tokens joining punctuation with line breaks that are split (`joined.py`)."""
    fim_unit: FimUnit = "character"
    """Rearranged documents are cut between characters or between lines."""


class DocumentEncoder:
    """Encodes documents with one tokenizer in one way."""

    def __init__(self, tokenizer: Tokenizer, encoding: Encoding) -> None:
        self._tokenizer, self._encoding = tokenizer, encoding
        self._words = WordEncoder(tokenizer)
        self._joined = JoinedSplitter(tokenizer, encoding.split_joined_rate)
        self._bos, self._eos = (np.array([token], dtype=np.uint32) for token in (tokenizer.bos_id, tokenizer.eos_id))

    def encode(self, batch: Sequence[Document]) -> list[npt.NDArray[np.uint32]]:
        """For each document `bos, tokens, eos`, uint32 [length]; a bos per document is a choice: the report does not say."""
        generators = [Random(f"{self._encoding.seed}:{document.id}") for document in batch]
        rate, unit = self._encoding.fim_rate, self._encoding.fim_unit
        cut = [fim_document(d.text, rng, rate, unit) for d, rng in zip(batch, generators, strict=True)]
        texts = [text for d, parts in zip(batch, cut, strict=True) for text in (parts or (d.text,))]
        encoded = iter(self._words.encode_batch(texts))
        found = []
        for parts, rng in zip(cut, generators, strict=True):
            if parts is None:
                body = self._joined.split(next(encoded), rng)
            else:
                prefix, middle, suffix = (self._joined.split(next(encoded), rng).tolist() for _ in parts)
                body = np.array([*fim_prompt(prefix, suffix, self._tokenizer), *middle], dtype=np.uint32)
            found.append(np.concatenate([self._bos, body, self._eos]))
        return found
