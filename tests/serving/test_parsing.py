import json

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.tokenizer import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, THINK_BEGIN, THINK_END, TOOL_SEPARATOR
from dsv3.serving.parsing import Parser, merge


def v3(name, arguments):
    return f"{CALL_BEGIN}function{TOOL_SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def parse(text, **options):
    return merge(Parser(**options).push(text, last=True))


def calls(message):
    return [(each["function"]["name"], each["function"]["arguments"]) for each in message.get("tool_calls", ())]


def test_content_alone():
    assert parse("hello") == {"role": "assistant", "content": "hello"}
    assert parse("") == {"role": "assistant", "content": ""}


def test_reasoning_with_and_without_its_opening_tag():
    expected = {"role": "assistant", "content": "4", "reasoning_content": "2+2\n"}
    assert parse(f"2+2\n{THINK_END}\n\n4", thinking=True) == expected
    assert parse(f"{THINK_BEGIN}2+2\n{THINK_END}\n\n4") == expected
    assert parse("2+2", thinking=True) == {"role": "assistant", "content": "", "reasoning_content": "2+2"}
    assert parse(f"a {THINK_BEGIN}b")["content"] == f"a {THINK_BEGIN}b"


def test_calls_of_v3_and_v3_1():
    text = "Wait." + CALLS_BEGIN + v3("add", '{"a": 1}') + "\n" + v3("sub", "{}") + CALLS_END
    message = parse(text, tools=True)
    assert message["content"] == "Wait."
    assert calls(message) == [("add", '{"a": 1}'), ("sub", "{}")]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    newer = f'{CALLS_BEGIN}{CALL_BEGIN}add{TOOL_SEPARATOR}{{"a": "```"}}{CALL_END}{CALLS_END}'
    message = parse(newer, tools=True)
    assert (message["content"], calls(message)) == (None, [("add", '{"a": "```"}')])
    assert parse(text)["content"] == text


def test_a_call_that_the_prompt_began():
    assert calls(parse('{"a": 1}', call="add")) == [("add", '{"a": 1}')]
    assert calls(parse('{"a": 1}\n```', call="add")) == [("add", '{"a": 1}')]
    assert calls(parse('sub\n```json\n{"a": 1}\n```' + CALL_END + CALLS_END, call="")) == [("sub", '{"a": 1}')]


def test_a_call_that_was_cut_short_or_is_malformed():
    assert calls(parse(CALLS_BEGIN + v3("add", "x")[: -len(CALL_END) - 2], tools=True)) == [("add", "x")]
    message = parse(f"{CALLS_BEGIN}{CALL_BEGIN}nonsense{CALL_END}{v3('add', '{}')}{CALLS_END}", tools=True)
    assert message["content"] == "nonsense"
    assert calls(message) == [("add", "{}")]


def test_a_fence_is_no_part_of_a_name():
    """Where the first line of what comes could be a whole header already."""
    text, parser = "``````json\n```json\n", Parser(call="")
    parts = parser.push(text[:10]) + parser.push(text[10:], last=True)
    assert merge(parts) == merge(Parser(call="").push(text, last=True))
    assert merge(parts)["content"] == f"function{TOOL_SEPARATOR}{text}"


MARKUP = (THINK_BEGIN, THINK_END, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, TOOL_SEPARATOR, "```", "```json\n")
OTHERS = ("function", "\n", "add", "{}", " ", "<", "`", v3("add", '{"a": "x y"}'))
PIECES = st.lists(st.sampled_from(MARKUP + OTHERS), max_size=12).map("".join)


@settings(deadline=None)
@given(PIECES, st.booleans(), st.booleans(), st.sampled_from([None, None, "f", ""]), st.randoms())
def test_the_pieces_do_not_matter(text, thinking, tools, call, random):
    """sglang#18236: streamed arguments are those of the whole answer."""
    whole, streamed = (Parser(thinking, tools, call) for _ in range(2))
    parts, at = [], 0
    while at < len(text):
        size = random.randint(1, 9)
        parts += streamed.push(text[at : at + size])
        at += size
    parts += streamed.push("", last=True)
    expected, got = merge(whole.push(text, last=True)), merge(parts)
    for message in (expected, got):
        for each in message.get("tool_calls", ()):
            del each["id"]
    assert got == expected
    json.dumps(got)
