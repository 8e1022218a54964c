"""The network in FP8: which layers, what it costs in accuracy, and that nothing else changes."""

import copy

import pytest
import torch

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.precision import feed_forward, products
from dsv3.precision.deferred import WeightGradients
from dsv3.precision.weights import BlockCache
from dsv3.weights.names import is_block_scaled


def model(preset="tiny", **changes):
    return DeepSeekV3(ModelConfig.preset(preset, **changes), compute_dtype=torch.bfloat16).initialize("fan_in")


def rows(length=65):
    return torch.randint(2048, (2, length), generator=torch.Generator().manual_seed(0))


def gradients(network, tokens):
    network.zero_grad()
    losses = network.loss(tokens, mtp_weight=0.3, balance_alpha=1e-4)
    losses.total.backward()
    return losses, {name: each.grad for name, each in network.named_parameters()}


@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_loss_and_gradients_are_near_those_in_bf16(q_lora_rank):
    plain = model(q_lora_rank=q_lora_rank)
    fp8 = copy.deepcopy(plain).compute_in_fp8()
    tokens = rows()
    losses, expected = gradients(plain, tokens)
    found_losses, found = gradients(fp8, tokens)
    assert found_losses.main == pytest.approx(float(losses.main), rel=5e-3)
    assert found_losses.main != losses.main
    for name, each in found.items():
        # Routers and experts see another token where two affinities are nearly equal.
        budget = 0.6 if ".mlp.gate" in name or ".experts" in name else 0.25
        assert (each - expected[name]).norm() < budget * expected[name].norm(), name


@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_recomputing_changes_no_bit(q_lora_rank):
    network = model(q_lora_rank=q_lora_rank).compute_in_fp8()
    losses, expected = gradients(network, rows())
    network.recompute(["norms", "mla_up", "swiglu"])
    again, found = gradients(network, rows())
    assert torch.equal(losses.main, again.main)
    assert all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("recompute", [[], ["norms", "mla_up", "swiglu"]])
def test_weight_gradients_can_wait(recompute):
    waiting = WeightGradients()
    network = model().compute_in_fp8(waiting)
    network.recompute(recompute)
    _, expected = gradients(network, rows())
    network.zero_grad()
    with waiting.deferred() as later:
        network.loss(rows(), mtp_weight=0.3, balance_alpha=1e-4).total.backward()
    missing = {name for name, each in network.named_parameters() if each.grad is None}
    assert missing == {name for name, _ in network.named_parameters() if in_fp8(name)}
    for add in later:
        add()
    assert all(torch.equal(each.grad, expected[name]) for name, each in network.named_parameters())


def in_fp8(name):
    """As the released files have it, where experts are stored one by one."""
    return is_block_scaled(name + ".weight" if name.endswith("_proj") else name)


def test_the_layers_in_fp8_are_those_of_the_released_files(monkeypatch):
    computed, inner = set(), BlockCache.of
    network = model().compute_in_fp8()
    names = {each.data_ptr(): name for name, each in network.named_parameters()}

    def of(cache, weights):
        computed.update(names[each.data_ptr()] for each in weights)
        return inner(cache, weights)

    monkeypatch.setattr(BlockCache, "of", of)
    network.loss(rows(), mtp_weight=0.3)
    assert computed == {name for name in names.values() if in_fp8(name)}
    assert any(name.startswith("mtp.0.block") for name in computed)
    assert not any("eh_proj" in name or "gate.weight" in name for name in computed)


def test_sizes_that_tensor_cores_do_not_take_are_refused_by_name():
    with pytest.raises(UserError, match=r"experts\.gate_up_proj of block 1 .* multiples of 16, and 72 is none"):
        model(moe_intermediate_size=36).compute_in_fp8()


def test_weights_already_in_fp8_are_refused():
    network = model()
    network.layers[0].self_attn.o_proj.keep_in_fp8()
    with pytest.raises(UserError, match=r"o_proj\.weight of block 0 is in FP8 already"):
        network.compute_in_fp8()


def test_groups_that_were_not_padded_are_not_taken_for_padded_ones(monkeypatch):
    """However many rows arrive, and whatever lies behind the last group: who pads says so, the rows' number does not."""
    fp8 = copy.deepcopy(model()).compute_in_fp8()
    experts = next(block.moe for block in fp8.blocks() if block.moe is not None).experts
    counts = torch.arange(len(experts.down_proj)) * 7 + 3
    x, found = torch.randn(int(counts.sum()) + 9, experts.down_proj.shape[1]), []
    for rows in (1, 10**6):
        monkeypatch.setattr(products, "FP8_WEIGHT_GRADIENT_ROWS", rows)
        experts.zero_grad()
        experts(x, counts, torch.ones(len(x)))[: int(counts.sum())].square().sum().backward()
        found.append([each.grad for each in experts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fp8_weight_gradients", [False, True])
def test_experts_with_many_rows_get_their_weight_gradients_in_fp8(fp8_weight_gradients, monkeypatch):
    """From a mean of 32 here, which the main blocks have and the MTP module, one token shorter, has not. Their groups are
    padded; what the padding adds is nothing, so that gradients stay near those in BF16."""
    called, inner = [], feed_forward.grouped_wgrad_fp8
    monkeypatch.setattr(feed_forward, "grouped_wgrad_fp8", lambda *args: called.append(args[2]) or inner(*args))
    monkeypatch.setattr(products, "FP8_WEIGHT_GRADIENT_ROWS", 32 if fp8_weight_gradients else 33)
    plain = model()
    fp8 = copy.deepcopy(plain).compute_in_fp8()
    _, expected = gradients(plain, rows())
    _, found = gradients(fp8, rows())
    for name in expected:
        if ".experts" in name:
            assert (found[name] - expected[name]).norm() < 0.6 * expected[name].norm(), name
    assert len(called) == (6 if fp8_weight_gradients else 0)
    assert all((counts % 128 == 0).all() for counts in called)
