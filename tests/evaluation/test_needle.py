"""Needles against greedy decoding, and with models that know all, nothing, or only what is near."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.needle import NAMES, question
from dsv3.data.tokenizer import train_tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.needle import Trial, known, needle, trial
from dsv3.inference.llm import LLM
from dsv3.inference.sampling import SamplingParams
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3

TOKENIZER = train_tokenizer(["def f(xs): return xs\n# the code of alpha is 0123456789\n" * 4], 320, digits=1)


class Copier(torch.nn.Module):
    """Looks for the last `width` tokens earlier in the text, at most `reach` tokens back, and says what followed them."""

    def __init__(self, reach, width=6):
        super().__init__()
        self.reach, self.width = reach, width

    def forward(self, ids):
        chosen = torch.zeros_like(ids)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(len(tokens)):
                wanted = tokens[max(at - self.width + 1, 0) : at + 1]
                for end in range(at - 1, max(at - self.reach, 0), -1):
                    if tokens[max(end - self.width + 1, 0) : end + 1] == wanted:
                        chosen[row, at] = tokens[end + 1]
                        break
        return SimpleNamespace(hidden=torch.nn.functional.one_hot(chosen, 320).float())

    def head(self, hidden):
        return hidden


@settings(max_examples=40, deadline=None)
@given(length=st.integers(60, 600), depth=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_trial_has_its_length_and_states_what_it_asks_for(length, depth, seed):
    made = trial(TOKENIZER, length, depth, str(seed))
    assert len(made.ids) == length
    assert made.ids[0] == TOKENIZER.bos_id
    code = TOKENIZER.decode(made.ids[-made.answer :])
    text = TOKENIZER.decode(made.ids[1 : -made.answer])
    name = next(name for name in NAMES if text.endswith(question(name)))
    assert text.count(f"{question(name)}{code}\n") == 1
    assert trial(TOKENIZER, length, depth, str(seed)) == made


def test_depth_is_where_the_needle_stands():
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = TOKENIZER.decode(trial(TOKENIZER, 6000, depth, "0").ids)
        places.append(text.index("# the code of") / len(text))
    assert places == pytest.approx([0, 0.25, 0.5, 0.75, 1.0], abs=0.05)


def test_shares_are_those_of_a_model_that_sees_so_far():
    options = dict(lengths=[128, 512], depths=[0.0, 1.0], samples=3)
    everything = needle(Copier(10_000), TOKENIZER, **options)
    assert everything.passed == ((3, 3), (3, 3))
    assert everything.shares == {128: 1.0, 512: 1.0}
    near = needle(Copier(200), TOKENIZER, **options)
    assert near.passed == ((3, 3), (0, 3))
    assert near.shares == {128: 1.0, 512: 0.5}
    assert needle(Copier(0), TOKENIZER, **options).passed == ((0, 0), (0, 0))


def test_one_wrong_digit_fails():
    made = trial(TOKENIZER, 100, 0.5, "0")
    wrong = Trial([*made.ids[:-1], (made.ids[-1] + 1) % 320], made.answer)
    assert known(Copier(1000), [made, wrong], "cpu") == [True, False]


def test_passing_is_what_greedy_decoding_writes():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", 1)
    llm = LLM.of(model, TOKENIZER)
    for seed in range(3):
        made = trial(TOKENIZER, 80, 0.5, str(seed))
        prompt = made.ids[: -made.answer]
        greedy = SamplingParams(temperature=0.0, max_tokens=made.answer, ignore_eos=True)
        answer = llm.generate([prompt], greedy)[0].token_ids
        assert not known(model, [made], "cpu")[0]
        assert known(model, [Trial([*prompt, *answer], len(answer))], "cpu")[0]


def test_the_model_s_mode_comes_back_and_short_texts_are_refused():
    model = Copier(10).train()
    needle(model, TOKENIZER, lengths=[64], depths=[0.5], samples=1)
    assert model.training
    with pytest.raises(UserError, match="a needle in 20 tokens: expected at least"):
        needle(model, TOKENIZER, lengths=[20], depths=[0.5], samples=1)
