import pytest
import torch

from dsv3.errors import UserError
from dsv3.inference.generate import generate
from dsv3.inference.sampling import SamplingParams

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [100, 101, 102]]


def collect(model, prompts, params, stop=lambda step: None):
    """The tokens of each prompt, and whether its last one said so."""
    tokens = [[] for _ in prompts]
    ended = [False] * len(prompts)
    steps = generate(model, prompts, params)
    answer, count = None, 0
    while True:
        try:
            new = steps.send(answer)
        except StopIteration:
            return tokens, ended
        for each in new:
            assert not ended[each.sequence], "a token after the last one"
            tokens[each.sequence].append(each.token)
            ended[each.sequence] = each.last
        answer = stop(count)
        count += 1


def greedy_by_full_forwards(model, prompt, count):
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("preset", "changes"), [("debug", {}), ("debug", {"q_lora_rank": None}), ("tiny", {})])
def test_greedy_decoding_equals_full_forwards(make_model, preset, changes):
    model = make_model(preset, **changes)
    found, ended = collect(model, PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert found == [greedy_by_full_forwards(model, prompt, 12) for prompt in PROMPTS]
    assert ended == [True] * 3


def test_sequences_that_end_early_change_nothing_for_the_others(make_model):
    model = make_model("debug")
    alone = [greedy_by_full_forwards(model, prompt, 12) for prompt in PROMPTS]
    # A stop token of the second prompt's that comes late, or never, in the others.
    end = next(token for token in alone[1][1:] if token not in alone[0] + alone[2] + alone[1][:1])
    length = alone[1].index(end) + 1
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(end,), ignore_eos=True)
    found, ended = collect(model, PROMPTS, params)
    assert found == [alone[0], alone[1][:length], alone[2]]
    assert ended == [True] * 3
    # The caller may end one, too; then nobody says that it was the last.
    sent, ended = collect(model, PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), lambda step: {0} if step == 3 else None)  # fmt: skip
    assert sent == [alone[0][:4], alone[1], alone[2]]
    assert ended == [False, True, True]


def test_the_models_end_of_sentence_ends_unless_it_is_ignored(make_model):
    prompt = PROMPTS[0]
    plain = greedy_by_full_forwards(make_model("debug"), prompt, 6)
    model = make_model("debug", eos_token_id=plain[2])
    first = plain.index(plain[2])
    params = SamplingParams(temperature=0, max_tokens=6)
    assert collect(model, [prompt], params)[0] == [plain[: first + 1]]
    assert collect(model, [prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0] == [plain]


def test_a_seed_repeats_whatever_else_is_in_the_batch(make_model):
    model = make_model("debug")
    params = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    (first, second), _ = collect(model, PROMPTS[:2], params)
    assert collect(model, PROMPTS[:1], params)[0] == [first]
    assert collect(model, [PROMPTS[0], PROMPTS[2], PROMPTS[1]], params)[0][0] == first
    assert collect(model, [PROMPTS[2], PROMPTS[1]], params)[0][1] == second
    (a, b), _ = collect(model, [PROMPTS[0]] * 2, params)
    assert a == first
    assert a != b  # copies of one prompt differ
    other, _ = collect(model, PROMPTS[:1], SamplingParams(max_tokens=8, seed=4, ignore_eos=True))
    assert other != [first]


def test_without_a_seed_every_call_differs_and_torchs_own_state_stays(make_model):
    model = make_model("debug")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = [collect(model, PROMPTS[:1], params)[0] for _ in range(3)]
    assert runs[0] != runs[1] or runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 5


def test_refusals(make_model):
    model = make_model("debug")
    params = SamplingParams(max_tokens=8)
    assert collect(model, [], params) == ([], [])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        collect(model, [[1], []], params)
    for token in (-1, 320):
        with pytest.raises(UserError, match="prompt 0 holds tokens outside the vocabulary: expected 0 to 319"):
            collect(model, [[1, token]], params)
    with pytest.raises(UserError, match=r"129 tokens are more than .* = 128; shorten the prompt or max_tokens"):
        collect(model, [[1] * 121], params)
    assert len(collect(model, [[1] * 120], SamplingParams(max_tokens=8, ignore_eos=True))[0][0]) == 8
