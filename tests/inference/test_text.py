from itertools import pairwise
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.tokenizer import TextStream
from dsv3.inference.params import SamplingParams
from dsv3.inference.text import TextSoFar


def run(pieces, stop, included=False, search=True, special=()):
    """What is shown after each token and at the end, and the stop text that was found; tokens stand for these bytes."""
    tokenizer = SimpleNamespace(token_bytes=lambda token: pieces[token], special_ids=frozenset(special))
    tokenizer.stream = lambda: TextStream(tokenizer)
    text, shown = TextSoFar(tokenizer, SamplingParams(stop=stop, include_stop_str_in_output=included)), []
    for token in range(len(pieces)):
        shown.append(text.push(token, search))
        if text.stopped is not None:
            return shown, text.stopped
    return [*shown, text.flush()], text.stopped


def cut_at_stop(text, stops):
    """The definition: character by character, until a stop text is complete; the longest of those that are."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], max(complete, key=len)
    return text, None


ALPHABET = st.sampled_from("ab\né😀")


@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans())
def test_stop_texts_are_never_shown_however_the_text_comes(data, included):
    text = data.draw(st.text(ALPHABET, min_size=1, max_size=14))
    stops = data.draw(st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(raw) - 1, 1)), max_size=8)))
    bounds = [0, *[cut for cut in cuts if cut < len(raw)], len(raw)]
    shown, stopped = run([raw[a:b] for a, b in pairwise(bounds)], stops, included)
    expected, stop = cut_at_stop(text, stops)
    assert "".join(shown) == expected + (stop or "" if included else "")
    assert stopped == stop


def test_text_that_may_begin_a_stop_is_held_back_until_it_does_not():
    assert run([b"ab", b"\n", b"c", b"\n", b"\n", b"d"], ["\n\n"]) == (["ab", "", "\nc", "", ""], "\n\n")
    assert run([b"a", b"\n"], ["\n\n"]) == (["a", "", "\n"], None)  # nothing follows


def test_a_stop_text_is_no_stop_before_it_is_searched_for():
    assert run([b"ab", b"c"], ["b"], search=False) == (["ab", "c", ""], None)


def test_a_character_is_shown_whole_and_a_cut_one_at_the_end_is_marked():
    raw = "é😀".encode()
    assert run([raw[:1], raw[1:4], raw[4:]], [])[0] == ["", "é", "😀", ""]
    assert run([b"x", raw[:1]], [])[0] == ["x", "", "\ufffd"]


def test_special_tokens_are_not_shown():
    assert run([b"a", b"<end>", b"b"], [], special={1})[0] == ["a", "", "b", ""]
