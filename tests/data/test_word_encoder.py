import json
import unicodedata
from itertools import islice

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import word_encoder
from dsv3.data.sources import documents
from dsv3.data.tokenizer import Tokenizer, train_tokenizer
from dsv3.data.word_encoder import WordEncoder, parts_of, patterns, unchanged_classes
from dsv3.errors import UserError

PIECES = [
    *"aZé字あーンΩ½7٣€+.(“、。・゛\u0301\u3099\u3000\u00a0\u2028\x00\x0c\x85\u200b\u1b4e😀𝒳\t \n\r",
    "  ", "\n\n", "\r\n", " \n", "word", " word", "1234", "...", ");\n", "漢字かな", "\n  x", "naïve", "\t\t",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    single = train_tokenizer(["def f(x):\n    return 123 + x\n\n\n"] * 20, 400, digits=1)
    return [(each, WordEncoder(each)) for each in (tokenizer, single)]


def encode(encoder, texts):
    found = encoder.encode_batch(texts)
    assert all(ids.dtype == np.uint32 for ids in found)
    return [ids.tolist() for ids in found]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_the_tokenizers_own(encoders, texts):
    for tokenizer, encoder in encoders:
        assert encoder.fast
        assert encode(encoder, texts) == tokenizer.encode_batch(texts)


@settings(max_examples=20, deadline=None)
@given(batches=st.lists(st.lists(TEXTS, max_size=4), max_size=6), room=st.integers(0, 2000))
def test_batches_one_after_another_while_the_table_starts_again(tokenizer, batches, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_encoder, "TABLE_CHARACTERS", room)
        encoder = WordEncoder(tokenizer)
        for texts in batches:
            assert encode(encoder, texts) == tokenizer.encode_batch(texts)


@given(text=TEXTS)
def test_the_parts_are_the_text_and_hold_known_characters_where_they_say_so(text):
    found = list(parts_of(text, patterns(3)))
    assert "".join(part for _, part in found) == text
    for known, part in found:
        assert (patterns(3).other.search(part) is None) == known
        if known:
            assert "".join(patterns(3).words.findall(part)) == part


def test_the_classes_are_those_of_tokenizers():
    """Over all characters below U+10000, one by one."""
    kinds = unchanged_classes()
    known = set("".join(kinds.values()))
    assert len(known) > 50_000
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    for kind, name in {kind: rf"\p{{{kind}}}" for kind in "LMNPS"}.items() | {"Z": r"\s"}.items():
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(name), "removed")
        theirs = set(text).difference(*(part for part, _ in split.pre_tokenize_str(text)))
        assert theirs & known - set("\t\n\r\x0b\x0c") == set(kinds[kind])


def test_characters_of_later_versions_of_unicode_are_not_known():
    later = "\u1b4e\u0870\u20c0"  # Unicode 15, 14, 14
    assert not set(later) & set("".join(unchanged_classes().values()))
    assert unicodedata.ucd_3_2_0.category("\u20c0") == "Cn"


def test_real_text_in_a_table_that_starts_again(tokenizer, monkeypatch):
    texts = [document.text for document in islice(documents("builtin:stdlib", "train", seed=0), 25)]
    expected = tokenizer.encode_batch(texts)
    assert encode(WordEncoder(tokenizer), texts) == expected
    monkeypatch.setattr(word_encoder, "TABLE_CHARACTERS", 2000)
    encoder = WordEncoder(tokenizer)
    assert [encode(encoder, [text])[0] for text in texts] == expected


@pytest.mark.prove
@pytest.mark.parametrize("vocab_size", [2048, 32_768])
def test_every_document_of_the_test_corpora(vocab_size):
    texts = [
        document.text for split in ("train", "validation") for document in documents("builtin:stdlib", split, seed=0)
    ]
    tokenizer = train_tokenizer(texts, vocab_size)
    encoder = WordEncoder(tokenizer)
    for start in range(0, len(texts), 50):
        batch = texts[start : start + 50]
        assert encode(encoder, batch) == tokenizer.encode_batch(batch)


def test_another_pre_tokenizer_does_the_work_itself(tokenizer):
    other = Tokenizer(tokenizer.json.replace(r"\\p{N}{1,3}", r"\\p{N}{2,3}"))
    assert other.json != tokenizer.json
    encoder = WordEncoder(other)
    assert not encoder.fast
    text = "1 22 333 4444 a-b.\n"
    assert encode(encoder, [text]) == other.encode_batch([text])


def test_a_normalizer_before_the_words_leaves_the_work_to_it(tokenizer):
    other = Tokenizer(json.dumps(json.loads(tokenizer.json) | {"normalizer": {"type": "Lowercase"}}))
    assert other.encode("A1") != tokenizer.encode("A1")
    encoder = WordEncoder(other)
    assert not encoder.fast
    assert encode(encoder, ["A1"]) == other.encode_batch(["A1"])


def test_a_text_without_a_utf8_form_is_refused(encoders):
    tokenizer, encoder = encoders[0]
    with pytest.raises(UserError, match="has no UTF-8 form"):
        encoder.encode_batch(["fine", "never 😀 seen\n", "bad \ud800"])
    assert encode(encoder, ["fine", "never 😀 seen\n"]) == tokenizer.encode_batch(["fine", "never 😀 seen\n"])
