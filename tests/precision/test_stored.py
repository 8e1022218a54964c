"""Stored weights multiplied in FP8, on the twins of the operations, against loops written from the definition."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from dsv3.inference.engine import Engine, EngineConfig, continuations
from dsv3.inference.params import SamplingParams
from dsv3.model import feed_forward as layers
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Experts, LocalDispatcher, Routing, SwiGLU
from dsv3.model.linear import Linear
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.block_scaled import dequantize, quantize
from dsv3.ops.rooms import Rooms
from dsv3.ops.tiles import dequantize_rows, quantize_rows
from dsv3.precision import stored
from dsv3.weights.convert import export_weights
from dsv3.weights.huggingface import from_pretrained, save_pretrained
from tests.ops.products import difference

BF16, E4M3, E8M0 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu
CONFIG = ModelConfig.preset(
    "tiny", hidden_size=256, intermediate_size=384, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=128,
    n_routed_experts=16, num_experts_per_tok=2, n_group=4, topk_group=2, vocab_size=320, num_hidden_layers=3,
    num_nextn_predict_layers=1, max_position_embeddings=512,
)  # fmt: skip
"""So many experts that no pass is recorded on a CPU: what stands for the kernels there looks into tensors."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def forced(monkeypatch):
    """Products in FP8 as on a GPU that has them."""
    for module in (stored, layers):
        monkeypatch.setattr(module, "in_fp8", lambda x, *weights: stored.not_in_fp8(x, *weights) is None)
    monkeypatch.setattr(stored, "no_triton", lambda *tensors: None)


def linear_in_fp8(across, inner, seed=0, scale_dtype=torch.float32):
    layer = Linear(inner, across)
    layer.keep_in_fp8()
    values, scale = quantize(random(across, inner, seed=seed), scale_dtype == E8M0)
    layer.weight.copy_(values)
    layer.weight_scale_inv = scale.to(scale_dtype)
    return layer


def rounded(x):
    """What is left of an input."""
    return dequantize_rows(quantize_rows(x), torch.float32)


def wide(layer):
    return dequantize(layer.weight, layer.weight_scale_inv, torch.float32)


@pytest.mark.parametrize("scale_dtype", [torch.float32, E8M0])
@pytest.mark.parametrize("sizes", [(300,), (128, 300), (130, 40)], ids=str)
@torch.no_grad()
def test_layers_of_one_input_are_one_product_with_it_quantised(sizes, scale_dtype, forced):
    linears = [linear_in_fp8(size, 272, seed, scale_dtype) for seed, size in enumerate(sizes)]
    product, x = stored.Stored(*linears), random(3, 5, 272, seed=9).to(BF16)
    assert product.serves(x)
    expected = torch.cat([rounded(x.flatten(0, 1)) @ wide(each).t() for each in linears], dim=1)
    for _ in range(2):  # the second finds the weights side by side
        found = product(x)
        assert (found.shape, found.dtype) == ((3, 5, sum(sizes)), BF16)
        assert difference(found.flatten(0, 1), expected) < 1e-5
    if len(linears) == 1:
        assert torch.equal(linears[0](x), product(x))


@torch.no_grad()
def test_weights_that_lie_side_by_side_stay_parameters_with_their_values(forced):
    first, second = linear_in_fp8(128, 64), linear_in_fp8(40, 64, 1)
    before, whole = [wide(each) for each in (first, second)], stored.side_by_side([first.weight, second.weight])
    assert torch.equal(wide(first), before[0])
    assert torch.equal(wide(second), before[1])
    assert whole.data_ptr() == first.weight.data_ptr() == stored.side_by_side([first.weight, second.weight]).data_ptr()
    second.weight.copy_(quantize(random(40, 64, seed=7))[0])
    assert torch.equal(whole[128:].float(), second.weight.float())
    assert isinstance(second.weight, torch.nn.Parameter)
    again = copy.deepcopy(second)
    assert torch.equal(wide(again), wide(second))


@torch.no_grad()
def test_weights_changed_in_place_are_seen(forced):
    layer, x = linear_in_fp8(256, 128), random(4, 128).to(BF16)
    before, kept = layer(x), layer.kept_in(BF16)
    assert layer.kept_in(BF16) is kept
    assert torch.equal(kept, layer.weight_in(BF16))
    assert layer.kept_in(torch.float32).dtype == torch.float32
    values, scale = quantize(random(256, 128, seed=5) * 3)
    layer.weight.copy_(values)
    layer.weight_scale_inv.copy_(scale)
    assert torch.equal(layer.kept_in(BF16), dequantize(values, scale, BF16))
    assert not torch.equal(layer(x), before)
    assert difference(layer(x), rounded(x) @ dequantize(values, scale, torch.float32).t()) < 1e-5
    other = linear_in_fp8(256, 128, 6)
    layer.weight, layer.weight_scale_inv = other.weight, other.weight_scale_inv
    assert torch.equal(layer.kept_in(BF16), other.weight_in(BF16))


def experts_in_fp8(inner=128):
    experts = Experts(CONFIG.replace(moe_intermediate_size=inner), range(16))
    experts.keep_in_fp8()
    for seed, weight in enumerate(("gate_up_proj", "down_proj"), 1):
        stack = getattr(experts, weight)
        values, scales = quantize(random(*stack.shape, seed=seed) * stack.shape[-1] ** -0.5)
        stack.copy_(values)
        if scales.shape == getattr(experts, f"{weight}_scale_inv").shape:
            setattr(experts, f"{weight}_scale_inv", scales)
    return experts


def by_definition(x_TD, routing, experts):
    """Token by token, expert by expert: quantise, dequantise, multiply in FP32."""
    ups = dequantize(experts.gate_up_proj, experts.gate_up_proj_scale_inv, torch.float32)
    downs = dequantize(experts.down_proj, experts.down_proj_scale_inv, torch.float32)
    out = torch.zeros(x_TD.shape)
    for t, x in enumerate(rounded(x_TD)):
        for expert, weight in zip(routing.expert[t].tolist(), routing.weight[t], strict=True):
            gate, up = (ups[expert] @ x).to(BF16).float().chunk(2)
            act = rounded((F.silu(gate) * up * weight).unsqueeze(0))[0]
            out[t] += (downs[expert] @ act).to(BF16).float()
    return out


CHOICES = {
    "any": lambda: torch.stack([torch.randperm(16)[:2] for _ in range(21)]).sort(1).values,
    "one token": lambda: torch.tensor([[3, 11]]),
    "all on the same": lambda: torch.tensor([[0, 15]] * 24),
    "few experts": lambda: torch.stack([torch.randperm(3)[:2] + 4 for _ in range(130)]).sort(1).values,
}


@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_experts_in_rooms_and_in_groups_are_the_definition(choice, forced):
    expert, experts, dispatcher = CHOICES[choice](), experts_in_fp8(), LocalDispatcher()
    x = random(len(expert), 256, seed=3).to(BF16)
    routing = Routing(expert, torch.rand(expert.shape), 16, None, None)
    expected, outs = by_definition(x, routing, experts), []
    assert experts.takes_rooms(x) == (len(x) <= stored.IN_ROOMS)
    for dispatched in (dispatcher.to_rooms(x, routing), dispatcher.dispatch(x, routing)):
        rows = experts(dispatched.rows, dispatched.counts, dispatched.weight)
        outs.append(dispatcher.combine(rows, dispatched.handle))
        assert outs[-1].dtype == BF16
        assert difference(outs[-1], expected) < 2e-5
    # Both round the same numbers.
    assert difference(*outs) < 1e-6


@torch.no_grad()
def test_swiglu_is_the_definition(forced):
    layer, x = SwiGLU(256, 384), random(2, 7, 256).to(BF16)
    for seed, each in enumerate((layer.gate_proj, layer.up_proj, layer.down_proj)):
        each.keep_in_fp8()
        values, scale = quantize(random(*each.weight.shape, seed=seed) / 16)
        each.weight.copy_(values)
        each.weight_scale_inv = scale
    gate, up = (
        (rounded(x.flatten(0, 1)) @ wide(each).t()).to(BF16).float() for each in (layer.gate_proj, layer.up_proj)
    )
    expected = rounded(F.silu(gate) * up) @ wide(layer.down_proj).t()
    assert difference(layer(x).flatten(0, 1), expected) < 2e-5


def test_what_is_not_multiplied_in_fp8(forced, monkeypatch, caplog):
    """And the reasons, told once each where a GPU could."""
    layer, experts = linear_in_fp8(128, 64), experts_in_fp8(136)
    blocks = (layer.weight, layer.weight_scale_inv)
    assert stored.not_in_fp8(random(2, 64).to(BF16), blocks) is None
    assert "activations are in torch.float32" in stored.not_in_fp8(random(2, 64), blocks)
    odd = linear_in_fp8(128, 40)
    reason = stored.not_in_fp8(random(2, 40).to(BF16), (odd.weight, odd.weight_scale_inv))
    assert "multiple of 16 elements, not 40" in reason
    x = random(2, 256).to(BF16)
    gate_up = (experts.gate_up_proj, experts.gate_up_proj_scale_inv)
    assert "gate and up have 136 outputs" in stored.not_in_fp8(x, gate_up)
    assert not experts.serves_in_fp8(x)
    monkeypatch.undo()
    assert stored.not_in_fp8(x, (layer.weight, layer.weight_scale_inv)) == "needs tensors on a GPU"
    assert not layer.stored.serves(x)
    assert not caplog.records
    stored.tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stored.tell(reason)
    assert [record.message for record in caplog.records] == [
        f"weights in FP8 are multiplied out at every use, which is slower: {reason}"
    ]


def test_of_tensors_made_in_inference_mode_nothing_is_kept(forced):
    """They do not count what is written to them."""
    with torch.inference_mode():
        layer, x = linear_in_fp8(256, 128), random(4, 128).to(BF16)
        layer(x)
        layer.weight_scale_inv.mul_(2)
        assert torch.equal(layer.kept_in(BF16), layer.weight_in(BF16))
        assert difference(layer(x), rounded(x) @ wide(layer).t()) < 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model in FP8."""
    path = tmp_path_factory.mktemp("stored")
    save_pretrained(DeepSeekV3(CONFIG).initialize("fan_in", seed=2), path / "fp32")
    export_weights(path / "fp32", path / "fp8", E4M3)
    return path / "fp8"


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens).logits.float()


@pytest.mark.parametrize("tokens", [40, 100], ids=["in rooms", "in groups"])
def test_logits_are_near_those_of_weights_multiplied_out(tokens, directory, forced):
    kept, multiplied_out = from_pretrained(directory).eval(), from_pretrained(directory, BF16).eval()
    prompt = torch.randint(320, (2, tokens), generator=torch.Generator().manual_seed(1))
    found, expected = logits(kept, prompt), logits(multiplied_out, prompt)
    assert not torch.equal(found, expected)
    assert F.cosine_similarity(found, expected, dim=-1).mean() > 0.998


def test_the_engine_generates_what_a_full_pass_says(directory, forced, monkeypatch):
    """Cached latents, absorbed products, rooms for decoding and groups for prompts."""
    model, seen = from_pretrained(directory).eval(), set()
    inner = Experts.forward

    def forward(experts, rows, *rest):
        seen.add(type(rows))
        return inner(experts, rows, *rest)

    monkeypatch.setattr(Experts, "forward", forward)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(320, (length,), generator=generator).tolist() for length in (150, 9, 70)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine = Engine(model, None, EngineConfig(num_blocks=32))
    found = continuations(engine, prompts, params)
    assert seen == {Rooms, torch.Tensor}
    for prompt, tokens in zip(prompts, found, strict=True):
        every = logits(model, torch.tensor([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :]
        below = every.amax(1) - every.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        # Chunks and absorbed products round elsewhere: what was chosen is the highest, or nearly so.
        assert below.median() == 0
        assert below.max() < 0.3


def test_the_state_is_saved_as_it_was_stored(directory, forced, tmp_path):
    model = from_pretrained(directory).eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    logits(model, torch.zeros(1, 4, dtype=torch.int64))
    for name, each in model.state_dict().items():
        assert (each.dtype, each.shape) == (before[name].dtype, before[name].shape)
        assert torch.equal(each.float(), before[name].float()), name
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert all(torch.equal(each.float(), before[name].float()) for name, each in again.state_dict().items())
