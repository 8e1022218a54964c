import json

import pytest

from dsv3.data.tokenizer import ASSISTANT, BOS, USER
from dsv3.errors import UserError
from dsv3.inference.llm import LLM, CompletionOutput
from dsv3.inference.params import SamplingParams
from dsv3.weights.checkpoint import save_checkpoint
from dsv3.weights.huggingface import save_pretrained


@pytest.fixture(scope="module")
def llm(make_model, tokenizer):
    return LLM.of(make_model("debug"), tokenizer)


PROMPTS = ["def add(", "", "日本"]


def test_generate_and_stream_agree(llm):
    params = SamplingParams(temperature=1.5, max_tokens=20, seed=1)
    for prompt in PROMPTS:
        [whole] = llm.generate([prompt], params)
        [output] = whole.outputs
        assert whole.finished
        pieces = list(llm.stream(prompt, params))
        assert "".join(piece.text for piece in pieces) == output.text
        assert len(pieces) == len(output.token_ids)
        shown = [token for token in output.token_ids if token not in llm.tokenizer.special_ids]
        assert llm.tokenizer.decode(shown) == output.text


def test_prompts_of_a_batch_are_continued_as_alone(llm):
    params = SamplingParams(temperature=0, max_tokens=10)
    together = llm.generate(PROMPTS, params)
    assert [each.outputs for each in together] == [llm.generate(prompt, params)[0].outputs for prompt in PROMPTS]
    assert [each.prompt for each in together] == PROMPTS
    assert llm.generate([], params) == []


def test_every_prompt_may_have_params_of_its_own(llm):
    each = [SamplingParams(temperature=0, max_tokens=n, logprobs=1) for n in (3, 5)]
    found = [one.outputs[0] for one in llm.generate(PROMPTS[:2], each)]
    assert [len(one.token_ids) for one in found] == [3, 5]
    assert found[0].cumulative_logprob == sum(one.logprob for one in found[0].logprobs)
    with pytest.raises(UserError, match="3 prompts and 2 SamplingParams"):
        llm.generate(PROMPTS, each)


def test_token_ids_are_continued_as_they_are(llm):
    params = SamplingParams(temperature=0, max_tokens=10)
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("def add(")]
    [of_ids], [of_text] = llm.generate([ids], params), llm.generate(["def add("], params)
    assert of_ids.outputs == of_text.outputs
    assert (of_ids.prompt, of_text.prompt) == (None, "def add(")
    assert of_ids.prompt_token_ids == of_text.prompt_token_ids == ids


def test_refusals_leave_nothing_behind(llm):
    with pytest.raises(UserError, match="the prompt is empty"):
        llm.generate(["x", []], SamplingParams(max_tokens=8))
    with pytest.raises(UserError, match="are more than the 128 tokens that this engine continues"):
        llm.generate(["日本" * 100])
    with pytest.raises(UserError, match="are more than the 128 tokens that this engine continues"):
        next(llm.stream("x", SamplingParams(max_tokens=127)))
    next(llm.stream("x", SamplingParams(max_tokens=12)))  # not read to its end
    assert not llm.engine.has_work
    assert llm.engine.stats().kv_cache_usage == 0


def test_a_checkpoint_on_disk_continues_as_the_model_in_memory(llm, tmp_path):
    llm.tokenizer.save(tmp_path / "tokenizer")
    save_checkpoint(
        tmp_path / "checkpoints" / "step-00000001",
        {"model": llm.model.state_dict()},
        {"model": llm.model.config.to_hf()},
        {"tokenizer": tmp_path / "tokenizer"},
    )
    params = SamplingParams(temperature=0, max_tokens=8)
    found, expected = (each.generate(PROMPTS, params) for each in (LLM(tmp_path, device="cpu"), llm))
    assert [each.outputs for each in found] == [each.outputs for each in expected]


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def"}]


def test_chat_continues_what_the_template_makes_of_messages(llm):
    params = SamplingParams(temperature=0, max_tokens=6)
    [one] = llm.chat(TALK, params)
    assert llm.tokenizer.decode(one.prompt_token_ids) == f"{BOS}Be brief.{USER}def{ASSISTANT}"
    assert [one.outputs] == [each.outputs for each in llm.generate([one.prompt_token_ids], params)]
    other = [{"role": "user", "content": "x"}]
    both = llm.chat([TALK, other], [params, SamplingParams(temperature=0, max_tokens=3)])
    assert both[0].outputs == one.outputs
    assert len(both[1].outputs[0].token_ids) == 3
    tool = {"type": "function", "function": {"name": "weather"}}
    [called] = llm.chat(other, SamplingParams(max_tokens=1), tools=[tool], chat_template="{{ tools | tojson }}")
    assert llm.tokenizer.decode(called.prompt_token_ids) == json.dumps([tool])
    [open_end] = llm.chat(other, SamplingParams(max_tokens=1), add_generation_prompt=False)
    assert open_end.prompt_token_ids == both[1].prompt_token_ids[:-1]
    assert llm.chat([]) == []
    with pytest.raises(UserError, match="the role 'robot'"):
        llm.chat([{"role": "robot", "content": "x"}])


def test_chat_uses_the_checkpoints_own_template(llm, tmp_path):
    save_pretrained(llm.model, tmp_path)
    llm.tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}!")
    [found] = LLM(tmp_path, device="cpu").chat(TALK, SamplingParams(max_tokens=1))
    assert found.prompt_token_ids == llm.tokenizer.encode("def!")


def test_a_stream_has_all_continuations_and_bars_others_until_it_ends(llm):
    params = SamplingParams(temperature=1.5, max_tokens=6, seed=1, n=2)
    [whole] = llm.generate(["def"], params)
    found = [CompletionOutput(0), CompletionOutput(1)]
    for delta in llm.stream("def", params):
        found[delta.index].take(delta)
        for barred in (llm.generate, lambda prompt: next(llm.stream(prompt))):
            if llm.engine.has_work:
                with pytest.raises(UserError, match="another stream"):
                    barred("x")
    assert found == whole.outputs


def test_what_is_cached_of_a_prompt_is_what_was_there_before_it(llm):
    prompt, params = [7] * 70, SamplingParams(max_tokens=2, n=2)
    assert [llm.generate([prompt], params)[0].num_cached_tokens for _ in range(2)] == [0, 64]
