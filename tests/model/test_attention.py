import pytest
import torch

from dsv3.model.attention import MultiHeadLatentAttention
from dsv3.model.config import ModelConfig, RopeScaling
from dsv3.model.rope import rotations
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.rotary import rotated

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, beta_fast=2.0)
CONFIGS = {
    "q-LoRA": ModelConfig.preset("debug"),
    "no q-LoRA, YaRN": ModelConfig.preset("debug", q_lora_rank=None, rope_scaling=YARN, v_head_dim=12),
}


@pytest.fixture(params=CONFIGS)
def attention(request):
    torch.manual_seed(0)
    module = MultiHeadLatentAttention(CONFIGS[request.param], "0")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def run(module, x, chunks, cache):
    """The module on consecutive chunks of x through a cache."""
    parts, start = [], 0
    for size in chunks:
        positions = cache.begin(torch.arange(start, start + size).unsqueeze(0))
        parts.append(module(x[:, start : start + size], rotations(module.config, positions), cache=cache))
        start += size
    return torch.cat(parts, dim=1)


def by_the_equations(module, x):
    """Equations (1) to (11), token by token and head by head."""
    c, w = module.config, {name: weight.detach() for name, weight in module.named_parameters()}

    def norm(v, gain):
        return v / (v.square().mean() + c.rms_norm_eps).sqrt() * gain

    def rope(v, position):
        return rotated(v.view(1, 1, 1, -1), rotations(c, torch.tensor([[position]]))).flatten()

    out = torch.zeros(len(x), c.hidden_size)
    content, turned = [], []
    for t, h in enumerate(x):
        both = w["kv_a_proj_with_mqa.weight"] @ h
        content.append(norm(both[: c.kv_lora_rank], w["kv_a_layernorm.weight"]))
        turned.append(rope(both[c.kv_lora_rank :], t))
        if c.q_lora_rank is None:
            q = w["q_proj.weight"] @ h
        else:
            q = w["q_b_proj.weight"] @ norm(w["q_a_proj.weight"] @ h, w["q_a_layernorm.weight"])
        heads = []
        for head in range(c.num_attention_heads):
            q_head = q[head * c.qk_head_dim : (head + 1) * c.qk_head_dim]
            q_head = torch.cat((q_head[: c.qk_nope_head_dim], rope(q_head[c.qk_nope_head_dim :], t)))
            size = c.qk_nope_head_dim + c.v_head_dim
            w_head = w["kv_b_proj.weight"][head * size : (head + 1) * size]
            keys = [
                torch.cat((w_head[: c.qk_nope_head_dim] @ latent, r)) for latent, r in zip(content, turned, strict=True)
            ]
            scores = torch.stack([q_head @ key for key in keys]) * c.softmax_scale
            values = torch.stack([w_head[c.qk_nope_head_dim :] @ latent for latent in content])
            heads.append(scores.softmax(0) @ values)
        out[t] = w["o_proj.weight"] @ torch.cat(heads)
    return out


def test_expanded_form_follows_the_equations(attention):
    x = torch.randn(1, 12, attention.config.hidden_size)
    found = attention(x, rotations(attention.config, torch.arange(12).unsqueeze(0)))
    torch.testing.assert_close(found[0].detach(), by_the_equations(attention, x[0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[30], [1] * 30, [13, *[1] * 17], [7, 9, 11, 1, 1, 1], [29, 1]])
@torch.no_grad()
def test_absorbed_form_equals_expanded(attention, chunks, growing_cache):
    x = torch.randn(2, 30, attention.config.hidden_size)
    expected = attention(x, rotations(attention.config, torch.arange(30).unsqueeze(0)))
    torch.testing.assert_close(run(attention, x, chunks, growing_cache()), expected, atol=1e-5, rtol=1e-4)


def test_absorbed_form_carries_the_same_gradients(attention, growing_cache):
    x = torch.randn(1, 6, attention.config.hidden_size)
    expected = torch.autograd.grad(
        attention(x, rotations(attention.config, torch.arange(6).unsqueeze(0))).square().sum(),
        list(attention.parameters()),
    )
    found = torch.autograd.grad(
        run(attention, x, [1] * 6, growing_cache()).square().sum(), list(attention.parameters())
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_only_the_latent_and_the_shared_key_are_cached(attention, growing_cache):
    cache = growing_cache()
    run(attention, torch.randn(1, 5, attention.config.hidden_size), [5], cache)
    config = attention.config
    assert cache.held["0"].shape == (1, 5, config.kv_lora_rank + config.qk_rope_head_dim)


@torch.no_grad()
def test_documents_of_a_row_do_not_see_one_another():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize(0.3)
    tokens = torch.randint(0, 320, (2, 30))
    segments = torch.zeros(2, 30, dtype=torch.long)
    segments[0, 11:], segments[0, 25:], segments[1, 4:] = 1, 2, 1
    positions = torch.stack(
        (torch.cat([torch.arange(n) for n in (11, 14, 5)]), torch.cat([torch.arange(n) for n in (4, 26)]))
    )
    packed = model(tokens, positions=positions, segment_ids=segments).logits
    for row, start, end in [(0, 0, 11), (0, 11, 25), (0, 25, 30), (1, 0, 4), (1, 4, 30)]:
        alone = model(tokens[row : row + 1, start:end]).logits
        torch.testing.assert_close(packed[row : row + 1, start:end], alone, atol=1e-4, rtol=1e-4)
    mixed = model(tokens, positions=positions).logits
    assert (mixed - packed)[0, 11:].abs().max() > 0.01


@torch.no_grad()
def test_later_tokens_change_nothing_before_them():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize(0.3)
    tokens = torch.randint(0, 320, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = torch.randint(0, 320, (8,))
    a, b = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(a[:, :12], b[:, :12], atol=1e-5, rtol=1e-5)
    assert (a[:, 12:] - b[:, 12:]).abs().max() > 0.01
