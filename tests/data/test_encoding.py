from random import Random

import numpy as np
import pytest

from dsv3.data.encoding import DocumentEncoder, Encoding
from dsv3.data.files import Document
from dsv3.data.fim import fim_document
from dsv3.data.joined import joined_newline_splits
from tests.data.conftest import TEXTS


@pytest.fixture(scope="module")
def batch():
    return [Document(f"{number}.txt", text) for number, text in enumerate(TEXTS * 40)] + [Document("empty", "")]


def test_a_document_is_its_tokens_between_bos_and_eos(batch, tokenizer):
    found = DocumentEncoder(tokenizer, Encoding(seed=0)).encode(batch)
    for document, ids in zip(batch, found, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]


@pytest.mark.parametrize("unit", ["character", "line"])
def test_rates_seeds_and_documents_decide_one_by_one(batch, tokenizer, unit):
    """By the rule written out: a generator a document first chooses and cuts it, then splits token by token."""
    seed, fim_rate, split_rate = 7, 0.4, 0.5
    splits = joined_newline_splits(tokenizer)
    found = DocumentEncoder(tokenizer, Encoding(seed, fim_rate, split_rate, unit)).encode(batch)
    rearranged = split = 0
    for document, ids in zip(batch, found, strict=True):
        rng = Random(f"{seed}:{document.id}")
        parts = fim_document(document.text, rng, fim_rate, unit)
        bodies = []
        for text in parts or [document.text]:
            body = []
            for token in tokenizer.encode(text):
                if token in splits and rng.random() < split_rate:
                    body += splits[token][0] + splits[token][1]
                    split += 1
                else:
                    body.append(token)
            bodies.append(body)
        if parts is not None:
            rearranged += 1
            prefix, middle, suffix = bodies
            begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
            bodies = [[begin, *prefix, hole, *suffix, end, *middle]]
        assert ids.tolist() == [tokenizer.bos_id, *bodies[0], tokenizer.eos_id]
    assert 0.25 < rearranged / len(batch) < 0.55
    assert split > 10
    alone = DocumentEncoder(tokenizer, Encoding(seed, fim_rate, split_rate, unit))
    assert all(np.array_equal(alone.encode([d])[0], ids) for d, ids in zip(batch, found, strict=True))
