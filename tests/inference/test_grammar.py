import json
from dataclasses import replace

import pytest

from dsv3.data.tokenizer import train_tokenizer
from dsv3.errors import UserError
from dsv3.inference import grammar
from dsv3.inference.engine import Engine, EngineConfig
from dsv3.inference.grammar import Grammars
from dsv3.inference.params import SamplingParams
from tests.inference.continuing import drive, tokens_of

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": ["yes", "no"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(['{"a": 1, "b": "yes"} {"name": [true, null]}\n'] * 20, 320)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    return Grammars(tokenizer, 320)


def test_without_the_library_it_says_what_to_install(tokenizer, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(grammar, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'dsv3\[grammar\]'"):
        Grammars(tokenizer, 320)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_a_random_model_says_follows_the_schema_with_and_without_drafts(
    grammars, tokenizer, drafting_model, temperature
):
    params = SamplingParams(max_tokens=80, temperature=temperature, seed=2, grammar=grammars.json_schema(SCHEMA))
    found = []
    for drafts in (0, 1, 3):
        engine = Engine(drafting_model, tokenizer, EngineConfig(num_blocks=64, num_speculative_tokens=drafts))
        deltas = drive(engine, [[3] * 70, [4]], [params, replace(params, seed=3)])
        found.append([tokens_of(own) for own in deltas.values()])
        for own in deltas.values():
            value = json.loads("".join(delta.text for delta in own))
            assert set(value) == {"a", "b"}
            assert value["b"] in ("yes", "no")
            assert own[-1].finish_reason == "stop"
    assert found[0] == found[1] == found[2]


def test_a_grammar_does_not_bind_the_others(grammars, tokenizer, drafting_model):
    engine = Engine(drafting_model, tokenizer, EngineConfig(num_blocks=64, num_speculative_tokens=2))
    free = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    [alone] = drive(engine, [[9, 8, 7]], free).values()
    mixed = drive(engine, [[9, 8, 7], [5]], [free, replace(free, grammar=grammars.regex("(no|yes)!"))])
    assert tokens_of(mixed[0, 0]) == tokens_of(alone)
    assert "".join(delta.text for delta in mixed[1, 0]) in ("no!", "yes!")


@pytest.mark.parametrize(
    "schema", ["not json", {"type": 5}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}], ids=str
)
def test_what_cannot_be_followed_is_refused(grammars, schema):
    with pytest.raises(UserError, match="cannot be followed"):
        grammars.json_schema(schema)


def test_a_grammar_that_does_not_end_compiling_is_refused(tokenizer):
    """Patterns that have to match together: each doubles the time or more, and no limit of llguidance's holds."""
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    patterns = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwxyz"]
    with pytest.raises(UserError, match=r"takes more than 0\.5 seconds to compile"):
        Grammars(tokenizer, 320, seconds=0.5).json_schema({"allOf": patterns})


def test_a_grammar_is_compiled_once_and_its_copies_go_their_own_ways(grammars, tokenizer):
    grammar = grammars.regex("ab")
    assert grammars.regex("ab") is grammar
    first, second = grammar.copy(), grammar.copy()
    [a, b] = [tokenizer.encode(letter)[0] for letter in "ab"]
    first.accept(a)
    assert (first.right([b]), second.right([b]), second.right([a, b])) == ([b], [], [a, b])


def test_a_grammar_that_fails_ends_one_request_alone(grammars, tokenizer, drafting_model):
    free = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    bound = replace(free, grammar=grammars.regex("(no|yes)+"))
    engine = Engine(drafting_model, tokenizer, EngineConfig(num_blocks=64, num_speculative_tokens=2))
    [alone] = drive(engine, [[9, 8, 7]], free).values()
    engine.add("bound", [5], bound)
    engine.requests["bound"][0].grammar.accept(tokenizer.encode("z")[0])  # as beyond a limit
    deltas = {"0": [], "bound": []}
    engine.add("0", [9, 8, 7], free)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    assert tokens_of(deltas["0"]) == tokens_of(alone)
    [last] = deltas["bound"]
    assert (last.token_ids, last.finish_reason) == ([], "abort")
    assert "Parser Error" in last.stop_reason
    assert engine.stats().kv_cache_usage == 0
