"""Published FP8 weights on a GPU: kept as they are, they compute what dequantised ones do."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.data.tokenizer import train_tokenizer
from dsv3.inference.batch import lay_out
from dsv3.inference.engine import Engine, EngineConfig, continuations
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams
from dsv3.inference.passes import Graph
from dsv3.inference.plan import Work
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import LocalDispatcher, Routing
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.block_scaled import dequantize, quantize
from dsv3.weights.convert import export_weights, import_weights, plan_import
from dsv3.weights.huggingface import from_pretrained, save_pretrained
from dsv3.weights.opening import load_model
from tests.ops.products import difference
from tests.precision.test_stored import CHOICES, CONFIG, by_definition, experts_in_fp8, random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(576, 7168), (3, 300, 260)])
def test_blocks_are_the_cpus_bit_for_bit(shape, power_of_two):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, scale = quantize(weight, power_of_two)
    on_gpu, scale_there = quantize(weight.cuda(), power_of_two)
    assert torch.equal(scale_there.cpu(), scale)
    assert torch.equal(on_gpu.cpu().view(torch.uint8), values.view(torch.uint8))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(on_gpu, scale_there, dtype).cpu(), dequantize(values, scale, dtype))


@pytest.fixture
def directory(tmp_path):
    """A model in FP8, with its tokenizer."""
    config = ModelConfig.preset("debug", hidden_size=256, moe_intermediate_size=136, intermediate_size=384)
    save_pretrained(DeepSeekV3(config).initialize("fan_in"), tmp_path / "fp32")
    train_tokenizer(["def add(first, second):\n    return first + second\n"] * 20, 320).save(tmp_path / "fp32")
    export_weights(tmp_path / "fp32", tmp_path / "fp8", E4M3)
    return tmp_path / "fp8"


def test_kept_on_the_gpu_and_equal_to_dequantised(directory):
    model, _ = load_model(directory, device="auto")
    assert model.layers[1].mlp.experts.down_proj.dtype == E4M3
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    wide = from_pretrained(directory, torch.bfloat16, "cuda")
    tokens = torch.randint(320, (2, 40), device="cuda")
    # While gradients are recorded, weights are multiplied out; and so they are for activations in FP32.
    torch.testing.assert_close(model(tokens).logits, wide(tokens).logits, atol=0.02, rtol=0.02)
    model.compute_dtype = torch.float32
    on_cpu = from_pretrained(directory, torch.float32)
    with torch.inference_mode():
        found = model(tokens).logits.cpu()
        torch.testing.assert_close(found, on_cpu(tokens.cpu()).logits, atol=1e-4, rtol=1e-4)


def test_text_from_every_form_is_the_same(directory, tmp_path):
    import_weights(plan_import(directory), tmp_path / "checkpoint")
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    texts = [LLM(path).generate(["def add(", "x"], params) for path in (directory, tmp_path / "checkpoint")]
    assert [each.outputs[0].token_ids for each in texts[0]] == [each.outputs[0].token_ids for each in texts[1]]
    assert len(texts[0][0].outputs[0].token_ids) == 16


@pytest.fixture(scope="module")
def multiplied(tmp_path_factory):
    """(a model whose weights are multiplied in FP8, the same with weights multiplied out)."""
    path = tmp_path_factory.mktemp("stored")
    save_pretrained(DeepSeekV3(CONFIG).initialize("fan_in", seed=2), path / "fp32")
    export_weights(path / "fp32", path / "fp8", E4M3)
    return from_pretrained(path / "fp8", device="cuda").eval(), from_pretrained(path / "fp8", BF16, "cuda").eval()


@hopper
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_experts_in_rooms_and_in_groups_are_the_definition(choice):
    expert, experts, dispatcher = CHOICES[choice](), experts_in_fp8(), LocalDispatcher()
    x = random(len(expert), 256, seed=3).to(BF16)
    routing = Routing(expert, torch.rand(expert.shape), 16, None, None)
    expected = by_definition(x, routing, experts)
    experts, x = experts.cuda(), x.cuda()
    routing = Routing(expert.cuda(), routing.weight.cuda(), 16, None, None)
    assert experts.serves_in_fp8(x)
    for dispatched in (dispatcher.to_rooms(x, routing), dispatcher.dispatch(x, routing)):
        rows = experts(dispatched.rows, dispatched.counts, dispatched.weight)
        found = dispatcher.combine(rows, dispatched.handle)
        assert difference(found.cpu(), expected) < 1e-4


@hopper
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_logits_in_fp8_are_near_those_of_weights_multiplied_out(tokens, multiplied):
    prompt = torch.randint(320, (1, tokens), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        found, expected = (each(prompt).logits.float() for each in multiplied)
    assert not torch.equal(found, expected)
    assert F.cosine_similarity(found, expected, dim=-1).mean() > 0.998


def random_prompts(count):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 100, (count,), generator=generator).tolist()
    return [torch.randint(320, (length,), generator=generator).tolist() for length in lengths]


@hopper
@pytest.mark.parametrize("count", [1, 5, 40, 140])
def test_recorded_passes_generate_the_same_tokens(count, multiplied):
    """In rooms, and of 140 sequences in groups."""
    params, found = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), []
    for graphs in (False, True):
        engine = Engine(multiplied[0], None, EngineConfig(num_blocks=600, cuda_graphs=graphs))
        found.append(continuations(engine, random_prompts(count), params))
        kinds = {type(each) for each in engine.runner.passes.recorded.values()}
        assert kinds == ({Graph} if graphs else set())
    assert found[0] == found[1]


@hopper
@pytest.mark.parametrize("count", [1, 5, 140])
@pytest.mark.parametrize("kept", [True, False], ids=["fp8", "bf16"])
def test_no_pass_of_decoding_waits_for_the_device(kept, count, multiplied):
    model = multiplied[0 if kept else 1]
    engine = Engine(model, None, EngineConfig(num_blocks=600))
    passes = engine.runner.passes
    for held in engine.runner.cache.held.values():
        held.normal_()  # no prompt was read
    batch = lay_out([Work(k, [7 + k], 70, [2 * k, 2 * k + 1]) for k in range(count)], CONFIG, torch.device("cuda"))
    row_N = torch.arange(count, device="cuda")
    with torch.inference_mode():
        passes.read(batch, row_N)  # kernels are compiled, scales laid out
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            passes.read(batch, row_N)
        finally:
            torch.cuda.set_sync_debug_mode("default")
