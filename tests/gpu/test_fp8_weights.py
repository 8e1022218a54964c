"""Published FP8 weights on a GPU: kept as they are, they compute what dequantised ones do."""

import pytest
import torch

from dsv3.data.tokenizer import train_tokenizer
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.block_scaled import dequantize, quantize
from dsv3.weights.convert import export_weights, import_weights, plan_import
from dsv3.weights.huggingface import from_pretrained, save_pretrained
from dsv3.weights.opening import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
E4M3 = torch.float8_e4m3fn


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
    with torch.inference_mode():
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
