"""Needles against greedy decoding, and with models that know all, nothing, or only what is near."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import tinypy
from dsv3.data.needle import QUESTION, answer, statement
from dsv3.data.tokenizer import train_tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.needle import Trial, known, needle, trial
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3

TOKENIZER = train_tokenizer([tinypy.document(task) for task in tinypy.tasks("train", 0, 200)], 500, digits=1)
ANSWERS = {statement(task): answer(task) for task in tinypy.tasks("validation", 0, tinypy.VALIDATION_DOCUMENTS)}


class Reader(torch.nn.Module):
    """Follows an instruction that stands at most `reach` tokens back, as it was taught to; says 0 for all else."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, ids):
        chosen = torch.zeros_like(ids)
        for row, tokens in enumerate(ids.tolist()):
            text = TOKENIZER.decode(tokens[1:])
            asked = len(TOKENIZER.encode(text[: text.index(QUESTION) + len(QUESTION)]))
            seen = TOKENIZER.decode(tokens[1:][max(asked - self.reach, 0) : asked])
            said = next((ANSWERS[line] for line in seen.splitlines(keepends=True) if line in ANSWERS), "")
            reply = TOKENIZER.encode(said)[: len(tokens) - asked]
            chosen[row, asked : asked + len(reply)] = torch.tensor(reply, dtype=torch.int64)
        return SimpleNamespace(hidden=torch.nn.functional.one_hot(chosen, 500).float())

    def head(self, hidden):
        return hidden


@settings(max_examples=40, deadline=None)
@given(length=st.integers(120, 900), depth=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_trial_has_its_length_and_states_what_it_asks_for(length, depth, seed):
    made = trial(TOKENIZER, length, depth, str(seed))
    assert len(made.ids) == length
    assert made.ids[0] == TOKENIZER.bos_id
    told = TOKENIZER.decode(made.ids[-made.answer :])
    text = TOKENIZER.decode(made.ids[1 : -made.answer])
    assert text.endswith(QUESTION)
    (line,) = [line for line in text.splitlines(keepends=True) if line.startswith("User: ")]
    assert ANSWERS[line] == told
    assert told.splitlines()[0] not in text
    assert trial(TOKENIZER, length, depth, str(seed)) == made


def test_depth_is_where_the_needle_stands():
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = TOKENIZER.decode(trial(TOKENIZER, 6000, depth, "0").ids)
        places.append(text.index("User: ") / len(text))
    assert places == pytest.approx([0, 0.25, 0.5, 0.75, 1.0], abs=0.05)


def test_a_model_finds_what_is_within_its_sight():
    options = dict(lengths=[160, 512], depths=[0.0, 1.0], samples=3)
    everything = needle(Reader(10_000), TOKENIZER, **options)
    assert everything.passed == ((3, 3), (3, 3))
    near = needle(Reader(200), TOKENIZER, **options)
    assert near.passed == ((3, 3), (0, 3))
    assert needle(Reader(0), TOKENIZER, **options).passed == ((0, 0), (0, 0))


def test_one_wrong_token_fails():
    made = trial(TOKENIZER, 160, 0.5, "0")
    wrong = Trial([*made.ids[:-1], (made.ids[-1] + 1) % 500], made.answer)
    assert known(Reader(1000), [made, wrong], torch.device("cpu")) == [True, False]


def test_passing_is_what_greedy_decoding_writes():
    model = DeepSeekV3(ModelConfig.preset("debug", vocab_size=500)).initialize("fan_in", 1)
    llm = LLM.of(model, TOKENIZER)
    for seed in range(3):
        made = trial(TOKENIZER, 120, 0.5, str(seed))
        prompt = made.ids[: -made.answer]
        greedy = SamplingParams(temperature=0.0, max_tokens=made.answer, ignore_eos=True)
        answer = llm.generate([prompt], greedy)[0].outputs[0].token_ids
        assert not known(model, [made], torch.device("cpu"))[0]
        assert known(model, [Trial([*prompt, *answer], len(answer))], torch.device("cpu"))[0]


def test_the_model_s_mode_comes_back_and_short_texts_are_refused():
    model = Reader(10).train()
    needle(model, TOKENIZER, lengths=[160], depths=[0.5], samples=1)
    assert model.training
    with pytest.raises(UserError, match="a needle in 20 tokens: expected at least"):
        needle(model, TOKENIZER, lengths=[20], depths=[0.5], samples=1)
