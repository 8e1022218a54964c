import re
from collections import Counter
from itertools import islice

from dsv3.data import needle, tinypy
from dsv3.data.sources import documents, fingerprint
from dsv3.data.tokenizer import train_tokenizer

LINE = re.compile(r"^# the code of (\w+) is (\d{4})$", re.MULTILINE)


def texts(split, count, seed=0):
    return [text for _, text in islice(needle.documents(split, seed), count)]


def test_each_code_is_stated_once_and_asked_for_once_at_the_end():
    for text in texts("train", 200):
        lines = LINE.findall(text)
        stated, asked = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        assert Counter(stated) == Counter(asked)
        assert 1 <= len({name for name, _ in asked}) == len(asked) <= needle.MOST_NAMES
        assert text.endswith("".join(f"{needle.question(name)}{code}\n" for name, code in asked))


def test_what_lies_between_are_tinypy_documents_of_the_same_split():
    wanted = set(tinypy.COMBINATIONS["validation"])
    names = {"_".join(combination) for combination in wanted}
    for text in texts("validation", 50):
        assert set(re.findall(r"def (\w+)\(", text)) <= names


def test_depths_and_codes_are_spread():
    depths, codes = [], Counter()
    for text in texts("train", 400):
        found = list(LINE.finditer(text))
        depths.append(found[0].start() / len(text))
        codes.update("".join(code for _, code in LINE.findall(text)))
    assert sum(depth < 0.1 for depth in depths) > 40
    assert sum(depth > 0.4 for depth in depths) > 40
    assert len(codes) == 10
    assert max(codes.values()) < 1.2 * min(codes.values())


def test_a_document_is_a_pure_function_and_splits_differ():
    assert texts("train", 20, seed=3) == texts("train", 20, seed=3)
    assert not set(texts("train", 20, seed=3)) & set(texts("train", 20, seed=4))
    assert not set(texts("train", 20)) & set(texts("validation", 20))
    assert len(list(needle.documents("validation", 0))) == needle.VALIDATION_DOCUMENTS


def test_it_is_a_source():
    found = list(islice(documents("builtin:needle", "train", seed=0), 3))
    assert [each.text for each in found] == texts("train", 3)
    assert fingerprint("builtin:needle") not in ("", fingerprint("builtin:tinypy"))


def test_a_question_s_tokens_are_those_of_the_line_up_to_the_code():
    tokenizer = train_tokenizer(texts("train", 50), 400)
    for name in needle.NAMES:
        line = tokenizer.encode(f"{needle.question(name)}7391\n")
        asked, code = tokenizer.encode(needle.question(name)), tokenizer.encode("7391")
        assert line[: len(asked) + len(code)] == asked + code
