import pytest

from dsv3.errors import UserError
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams
from dsv3.weights.checkpoint import save_checkpoint


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
        assert "".join(pieces) == output.text
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
