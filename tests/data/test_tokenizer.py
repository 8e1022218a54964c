import hashlib
import os
import subprocess
import sys
from random import Random

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import tokenizer as module
from dsv3.data.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    FIM_BEGIN,
    FIRST,
    LAST,
    PAD,
    SMALLEST,
    USER,
    Tokenizer,
    train_tokenizer,
)
from dsv3.errors import UserError

MIXED = [
    "",
    " ",
    "def f(x):\n    return x\n",
    "中文和English混排，123456。\n\n新行\r\n",
    "emoji 👩‍👩‍👧 flags 🇫🇷 \u0301 combining e\u0301",
    "tabs\t\tand   spaces   \n \n\n  x",
    "\x00\x01 control \ufeff bom \ufffd replacement",
    f"{USER}not a turn{EOS}",
]


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x" + text])[0] == tokenizer.encode(text)


def test_released_layout_of_the_special_tokens(tokenizer):
    # The released vocabulary ends with the ids 128798 to 128814 in this order.
    released = {
        "<think>": 128798, "</think>": 128799, "<｜fim▁hole｜>": 128800, "<｜fim▁begin｜>": 128801,
        "<｜fim▁end｜>": 128802, "<｜User｜>": 128803, "<｜Assistant｜>": 128804, "<|EOT|>": 128805,
        "<｜tool▁calls▁begin｜>": 128806, "<｜tool▁outputs▁begin｜>": 128810, "<｜tool▁sep｜>": 128814,
    }  # fmt: skip
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    for token, place in released.items():
        assert tokenizer.id(token) == tokenizer.vocab_size - (128815 - place)
    assert tokenizer.fim_begin_id == tokenizer.fim_hole_id + 1 == tokenizer.fim_end_id - 1
    assert tokenizer.vocab_size == 480


def test_pre_tokenizer_cuts_where_the_released_one_does():
    # So few different words that every one of them becomes a token: what is left are the pre-tokenizer's cuts.
    text = "x = 1234567; 你好world。\n\n  if (a):\n\treturn 'b'\n"
    tokenizer = train_tokenizer([text] * 9, 1000)
    assert pieces(tokenizer, text) == [
        "x", " =", " ", "123", "456", "7", ";", " ", "你好", "world", "。\n\n", " ", " if", " (", "a", "):\n",
        "\treturn", " '", "b", "'\n",
    ]  # fmt: skip


@pytest.mark.parametrize(("digits", "expected"), [(1, list("20241")), (2, ["20", "24", "1"]), (3, ["202", "41"])])
def test_digits_bound_the_numbers_in_a_token(digits, expected):
    assert pieces(train_tokenizer(["20241 20241 "] * 9, 320, digits), "20241") == expected


def test_text_of_special_tokens_is_text_unless_asked_for(tokenizer):
    specials = {tokenizer.id(token) for token in (*FIRST, *LAST)}
    for token in (*FIRST, *LAST):
        assert not specials.intersection(tokenizer.encode(f"a{token}b"))
        assert tokenizer.decode(tokenizer.encode(f"a{token}b")) == f"a{token}b"
        middle = tokenizer.encode(f"a{token}b", specials=True)[1:-1]
        assert middle == [tokenizer.id(token)]


def test_transformers_loads_the_directory_and_agrees(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == tokenizer.vocab_size
    for text in MIXED:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text, specials=True)
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text, specials=True)]
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    # Markup stays in the text that servers parse, frame tokens do not.
    assert theirs.decode(theirs(f"{BOS}{USER}hi{EOS}{PAD}").input_ids, skip_special_tokens=True) == f"{USER}hi"


def test_chat_template(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    text = f"{BOS}Be brief.{USER}1+1?{ASSISTANT}2{EOS}{USER}2+2?"
    assert theirs.apply_chat_template(turns, tokenize=False) == text
    assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text + ASSISTANT
    with pytest.raises(Exception, match="unknown role robot"):
        theirs.apply_chat_template([{"role": "robot", "content": ""}], tokenize=False)


def test_load_gives_back_what_was_saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert [loaded.encode(text) for text in MIXED] == [tokenizer.encode(text) for text in MIXED]


def test_training_is_deterministic_across_processes(tokenizer):
    command = (
        "from conftest import TEXTS; from dsv3.data.tokenizer import *; print(train_tokenizer(TEXTS * 20, 480).hash)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])}
    run = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer.hash


def test_too_little_text_is_filled_with_placeholders():
    tokenizer = train_tokenizer(["ab"], 400)
    assert tokenizer.vocab_size == 400
    assert tokenizer.id("<｜place▁holder▁no▁0｜>") == tokenizer.encode("ab")[0] + 1
    assert tokenizer.id(LAST[-1]) == 399
    assert tokenizer.decode(tokenizer.encode("any 字 text\n")) == "any 字 text\n"


def test_one_endless_word_does_not_stall_training():
    random = Random(0)
    word = "".join(random.choices("abcdefghijklmnop", k=300_000))
    tokenizer = train_tokenizer([word], 320)
    assert tokenizer.decode(tokenizer.encode(word)) == word


@given(ids=st.lists(st.integers(0, 500)))
def test_stream_and_decode_agree_on_arbitrary_ids(tokenizer, ids):
    # 480 to 500 are rows that a model may have beyond the vocabulary.
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == tokenizer._marked.decode(ids, skip_special_tokens=False)


def test_stream_never_splits_a_character(tokenizer):
    text = "é你😀👩‍👧 x"
    stream = tokenizer.stream()
    bytes_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    given = [stream.push(bytes_of[bytes([byte])]) for byte in text.encode()]
    assert "\ufffd" not in "".join(given)
    assert [part for part in given if part] == list(text)
    assert stream.flush() == ""
    stream.push(bytes_of[b"\xf0"])
    assert stream.push(bytes_of[b"\x9f"]) == ""
    assert stream.flush() == "\ufffd"


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=f"vocab_size = 275: expected at least {SMALLEST}"):
        train_tokenizer(["text"], SMALLEST - 1)
    assert train_tokenizer(["text"], SMALLEST).vocab_size == SMALLEST == 276
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    for content in ("{}", "{", "[]", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="is no tokenizer"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(UserError, match="holds a Unigram tokenizer"):
        Tokenizer.load(tmp_path)


def test_text_without_utf8_is_refused(tokenizer):
    with pytest.raises(UserError, match="no UTF-8 form"):
        tokenizer.encode("lone \ud800 surrogate")


def test_missing_special_token_is_named(tokenizer):
    foreign = Tokenizer(tokenizer.json.replace(FIM_BEGIN, "<other>"))
    with pytest.raises(UserError, match="no token '<｜fim▁begin｜>'"):
        _ = foreign.fim_begin_id


def test_byte_alphabet_is_the_one_of_the_library():
    assert set(module.BYTES) == set(module.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(module.BYTES.values()) == list(range(256))
