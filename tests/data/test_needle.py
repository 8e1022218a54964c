import re
from itertools import islice

from dsv3.data import needle, tinypy
from dsv3.data.sources import documents, fingerprint
from dsv3.data.tokenizer import train_tokenizer


def texts(split, count, seed=0):
    return [text for _, text in islice(needle.documents(split, seed), count)]


def test_one_instruction_is_given_among_functions_and_followed_at_the_end():
    for text in texts("train", 200):
        assert (text.count("User: "), text.count("Assistant:\n")) == (1, 1)
        above, below = text.split("Assistant:\n")
        instruction = re.search(r"^User: (.*)\n", above, re.MULTILINE)[1]
        what = re.match(r'def \w+\((\w+)\):\n    """Return (.*)\."""\n    return .*\n$', below)
        # The instruction names the argument, and says what the docstring says.
        assert what[2] in instruction
        assert re.search(rf"\b{what[1]}\b", instruction)
        assert len(re.findall(r"^def ", above, re.MULTILINE)) in needle.FUNCTIONS
        assert above.count('"""') == 0


def test_distances_are_spread():
    found = [text.index("Assistant:") - text.index("User: ") for text in texts("train", 400)]
    assert sum(distance < 150 for distance in found) > 60
    assert sum(distance > 600 for distance in found) > 40
    depths = [text.index("User: ") / text.index("Assistant:") for text in texts("train", 400)]
    assert sum(depth < 0.2 for depth in depths) > 40


def test_splits_keep_their_combinations():
    held_out = {"_".join(combination) for combination in tinypy.COMBINATIONS["validation"]}
    for text in texts("validation", 50):
        assert set(re.findall(r"def (\w+)\(", text)) <= held_out
    assert not {name for text in texts("train", 50) for name in re.findall(r"def (\w+)\(", text)} & held_out


def test_a_document_is_a_pure_function():
    assert texts("train", 20, seed=3) == texts("train", 20, seed=3)
    assert not set(texts("train", 20, seed=3)) & set(texts("train", 20, seed=4))
    assert len(list(needle.documents("validation", 0))) == needle.VALIDATION_DOCUMENTS


def test_it_is_a_source():
    found = list(islice(documents("builtin:needle", "train", seed=0), 3))
    assert [each.text for each in found] == texts("train", 3)
    assert fingerprint("builtin:needle") not in ("", fingerprint("builtin:tinypy"))


def test_the_answer_follows_from_the_needle():
    """Two tasks with one instruction have one answer, whatever their loop's name; tokens end where it does."""
    for task in tinypy.tasks("train", 0, 50):
        renamed = tinypy.write(
            task.combination, task.constants, phrasing=tinypy.PHRASINGS[0], argument="xs", loop_name="k"
        )
        again = tinypy.write(
            task.combination, task.constants, phrasing=tinypy.PHRASINGS[0], argument="xs", loop_name="n"
        )
        assert needle.statement(renamed) == needle.statement(again)
        assert needle.answer(renamed) == needle.answer(again)
    tokenizer = train_tokenizer(texts("train", 20), 400)
    parts = (needle.QUESTION, needle.answer(task), "    return 0\n")
    assert tokenizer.encode("".join(parts)) == [token for part in parts for token in tokenizer.encode(part)]
