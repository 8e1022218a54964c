from random import Random

from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.fim import fim_document, fim_prompt, line_ends

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def unfim(ids: list[int], tokenizer) -> str:
    """The document from its rearranged ids."""
    assert ids[0] == tokenizer.fim_begin_id
    hole, end = ids.index(tokenizer.fim_hole_id), ids.index(tokenizer.fim_end_id)
    return tokenizer.decode([*ids[1:hole], *ids[end + 1 :], *ids[hole + 1 : end]])


@given(text=st.lists(st.sampled_from(["a", "\n", "b\r\n", "字", "\r", "\x85"]), max_size=12).map("".join))
def test_lines_end_behind_line_breaks(text):
    ends = line_ends(text)
    assert ends == [at for at in range(len(text) + 1) if at in (0, len(text)) or text[at - 1] == "\n"]


def test_cuts_between_lines_are_uniform():
    random = Random(0)
    text = "first\n\n    third = 3\nlast"
    counts = dict.fromkeys([0, 6, 7, 21, 25], 0)
    for _ in range(10_000):
        parts = fim_document(text, random, 1.0, "line")
        assert "".join(parts) == text
        counts[len(parts.prefix)] += 1
        counts[len(parts.prefix) + len(parts.middle)] += 1
    assert all(3800 < count < 4200 for count in counts.values())


@given(text=TEXT, seed=st.integers(0, 2**32))
def test_rearranged_documents_can_be_put_back(tokenizer, text, seed):
    parts = fim_document(text, Random(seed), 1.0)
    prefix, middle, suffix = map(tokenizer.encode, parts)
    ids = [*fim_prompt(prefix, suffix, tokenizer), *middle]
    assert unfim(ids, tokenizer) == text
    assert parts.prefix + parts.middle + parts.suffix == text
    assert sorted(set(ids) & {tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id}) == sorted(
        {tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id}
    )


def test_order_is_prefix_suffix(tokenizer):
    order = fim_prompt([10], [12], tokenizer)
    assert order == [tokenizer.fim_begin_id, 10, tokenizer.fim_hole_id, 12, tokenizer.fim_end_id]


def test_rate():
    random = Random(0)
    assert 900 < sum(fim_document("text", random, 0.1) is not None for _ in range(10_000)) < 1100
    assert all(fim_document("text", random, 0.0) is None for _ in range(1000))
    assert all(fim_document("text", random, 1.0) is not None for _ in range(1000))


def test_cuts_are_uniform_over_the_positions_between_characters():
    random = Random(0)
    cuts = [0] * 5
    for _ in range(10_000):
        parts = fim_document("a😀字b", random, 1.0)
        cuts[len(parts.prefix)] += 1
        cuts[len(parts.prefix) + len(parts.middle)] += 1
    assert all(3800 < count < 4200 for count in cuts)
