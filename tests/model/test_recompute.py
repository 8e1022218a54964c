import pytest
import torch

from dsv3.bench.memory import Live
from dsv3.model.config import ModelConfig
from dsv3.model.recompute import Recomputation
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.attention import attention

CONFIG = ModelConfig.preset("debug", num_nextn_predict_layers=2)
ALL = ("norms", "mla_up", "swiglu")


def run(kinds, dtype=None, config=CONFIG, **options):
    model = DeepSeekV3(config, compute_dtype=dtype).initialize("fan_in")
    for block in model.blocks():
        if block.moe is not None:
            block.moe.gate.e_score_correction_bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    model.recompute(kinds)
    tokens = torch.randint(config.vocab_size, (4, 49), generator=torch.Generator().manual_seed(0))
    results = []
    for part in tokens.split(2):
        losses = model.loss(part, mtp_weight=0.3, balance_alpha=0.1, scale=0.5, **options)
        losses.total.backward()
        results.append(losses)
    return results, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kinds", [*((each,) for each in ALL), ALL])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("latent_queries", [True, False])
def test_losses_loads_and_gradients_are_the_same_to_the_bit(kinds, dtype, latent_queries):
    config = CONFIG if latent_queries else CONFIG.replace(q_lora_rank=None)
    expected, found = run((), dtype, config), run(kinds, dtype, config)
    for a, b in zip(expected[0], found[0], strict=True):
        for word in ("total", "main", "balance"):
            assert torch.equal(getattr(a, word), getattr(b, word)), word
        assert all(torch.equal(x, y) for x, y in zip(a.mtp, b.mtp, strict=True))
        assert all(torch.equal(load, b.load[name]) for name, load in a.load.items())
        assert float(a.balance) > 0
    for name, gradient in expected[1].items():
        assert torch.equal(gradient, found[1][name]), name


def test_within_documents_and_with_torchs_attention(monkeypatch):
    monkeypatch.setattr(attention, "candidates", [each for each in attention.candidates if each.name == "sdpa"])
    segments = torch.arange(49).div(20, rounding_mode="floor").expand(2, -1)
    expected, found = run((), segment_ids=segments), run(ALL, segment_ids=segments)
    for name, gradient in expected[1].items():
        assert torch.equal(gradient, found[1][name]), name


def kept(kinds):
    """Bytes that wait for backward; heads are, as in DeepSeek-V3, several times as wide as the stream."""
    model = DeepSeekV3(CONFIG.replace(num_attention_heads=12)).initialize("fan_in")
    model.recompute(kinds)
    tokens = torch.randint(CONFIG.vocab_size, (8, 257), generator=torch.Generator().manual_seed(0))
    with Live() as live:
        losses = model.loss(tokens, mtp_weight=0.3, balance_alpha=0.1)
    assert losses.total.requires_grad
    return live.now


def test_less_waits_for_backward(monkeypatch):
    monkeypatch.setattr(attention, "candidates", [each for each in attention.candidates if each.name == "sdpa"])
    usual = kept(())
    saved = {kind: usual - kept((kind,)) for kind in ALL}
    assert usual - kept(ALL) > 0.95 * sum(saved.values())
    assert saved["norms"] > 0.07 * usual
    assert saved["mla_up"] > 0.2 * usual
    assert saved["swiglu"] > 0.03 * usual


def test_a_function_is_called_once_more_and_only_when_it_is_needed():
    calls = []

    def double(x):
        calls.append(x.requires_grad)
        return 2 * x, x.exp()

    again, x = Recomputation(), torch.randn(3, 4, requires_grad=True)
    with again.watching():
        a, b = again(double, x)
        y = (a * b).sum() + (b.view(12) * a.view(12)).sum()
    assert len(calls) == 1
    y.backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, 4 * (x.exp() + x * x.exp()).detach())
    assert not again.outputs


def test_outside_of_a_loss_functions_are_just_called():
    again, x = Recomputation(), torch.randn(3, requires_grad=True)
    assert again(torch.exp, x).grad_fn.name() == "ExpBackward0"
    with torch.no_grad(), again.watching():
        assert again(torch.exp, x).grad_fn is None


def test_a_new_tensor_where_an_old_one_lay_is_not_taken_for_it():
    again = Recomputation()
    x = torch.randn(1000, requires_grad=True)
    with again.watching():
        total = torch.zeros(())
        for n in range(50):
            made = again(torch.sin, x)
            total = total + made.sum()
            del made
            total = total + (torch.full((1000,), float(n)) * x).sum()
    total.backward()
    torch.testing.assert_close(x.grad, (50 * x.cos() + sum(range(50))).detach())


def test_inputs_that_need_no_gradient_and_outputs_that_get_none():
    again, x, y = Recomputation(), torch.randn(4, requires_grad=True), torch.randn(4)
    with again.watching():
        a, _ = again(lambda p, q: (p * q, p + q), x, y)
        loss = (a * a).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, (2 * x * y * y).detach())
