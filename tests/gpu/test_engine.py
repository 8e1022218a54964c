"""Decoding on a GPU: recorded passes say what those made one by one say."""

import pytest
import torch

from dsv3.inference.batch import lay_out
from dsv3.inference.engine import Engine, EngineConfig, continuations
from dsv3.inference.params import SamplingParams
from dsv3.inference.passes import Graph
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = ModelConfig.preset("small", num_hidden_layers=3, vocab_size=2048, max_position_embeddings=1024)
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return DeepSeekV3(CONFIG).initialize("fan_in", seed=3).to("cuda", torch.bfloat16).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2048, (n,), generator=generator).tolist() for n in (5, 64, 65, 130, 7, 300, 1, 12, 90)]


def engine(model, **changes):
    return Engine(model, None, EngineConfig(64, **changes))


@pytest.mark.parametrize(
    "changes", [{}, {"num_speculative_tokens": 1}, {"num_speculative_tokens": 3}, {"fp8_cache": True}]
)
def test_recorded_passes_say_the_same(model, prompts, changes):
    plain, recorded = engine(model, cuda_graphs=False, **changes), engine(model, **changes)
    for some in (prompts[:1], prompts):
        assert continuations(recorded, some, PARAMS) == continuations(plain, some, PARAMS)
    graphs = recorded.runner.passes.recorded.values()
    assert any(isinstance(each, Graph) for each in graphs)
    assert not plain.runner.passes.recorded


def test_sampled_tokens_do_not_depend_on_recording(model, prompts):
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=40, ignore_eos=True, presence_penalty=0.5)
    plain, recorded = engine(model, cuda_graphs=False), engine(model)
    assert continuations(recorded, prompts, params) == continuations(plain, prompts, params)


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_recorded_passes_are_near_those_of_the_cpu(model, prompts, fp8_cache):
    """BF16 there and FP32 here: nearly all tokens of short continuations are the same."""
    here = DeepSeekV3(CONFIG)
    here.load_state_dict({name: each.float().cpu() for name, each in model.state_dict().items()})
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = continuations(Engine(here, None, EngineConfig(64)), prompts, params)
    found = continuations(engine(model, fp8_cache=fp8_cache), prompts, params)
    same = sum(a[0] == b[0] for a, b in zip(expected, found, strict=True))
    assert same >= len(prompts) - (3 if fp8_cache else 2)


def test_a_pass_does_not_wait_for_the_device(model, prompts):
    """But for the numbers that tell what was chosen."""
    each = engine(model)
    each.add("a", prompts[3], PARAMS)
    for _ in range(10):
        each.step()
    plan = each.scheduler.plan()
    passes = each.runner.passes
    batch, row_N = lay_out(plan.works, CONFIG, torch.device("cuda")), torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            passes.read(batch, row_N)
            passes.main(batch, row_N)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_changed_weights_are_read(model, prompts):
    each = engine(model, prefix_caching=False)
    before = continuations(each, prompts[:2], PARAMS)
    weight = model.lm_head.weight
    held = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(held.roll(1, 0))
        each.weights_changed()
        after = continuations(each, prompts[:2], PARAMS)
        assert after[0][0] == (before[0][0] + 1) % 2048
    finally:
        with torch.no_grad():
            weight.copy_(held)
