import pytest
import torch

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.training.balance import balance_figures, routing_biases, shares, update_biases

CONFIG = ModelConfig.preset("debug", num_nextn_predict_layers=2, n_group=1, topk_group=1)
BLOCKS = ["1", "2", "mtp.0", "mtp.1"]


def skewed_model():
    """Every router adds 3 to -3, by expert, to the affinities' logits of a typical token."""
    model = DeepSeekV3(CONFIG).initialize("fan_in", seed=0)
    with torch.no_grad():
        model.embed_tokens.weight.add_(torch.linspace(-2, 2, CONFIG.hidden_size))
        for block in model.blocks():
            if block.moe is not None:
                typical = mean_input(model, block.moe.gate)
                push = torch.linspace(3, -3, CONFIG.n_routed_experts)
                block.moe.gate.weight.add_(torch.outer(push, typical) / typical.square().sum())
    return model


def mean_input(model, gate):
    seen = []
    hook = gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean(0)))
    loads(model, 0)
    hook.remove()
    return seen[0]


def figures_of(model, load):
    return balance_figures(load, routing_biases(model, load))


def loads(model, seed):
    tokens = torch.randint(3, 320, (8, 33), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.loss(tokens, mtp_weight=0.3).load


def test_a_skewed_router_comes_towards_the_mean_in_every_block_mtps_included():
    model = skewed_model()
    least = {name: min(shares(each)) for name, each in loads(model, 0).items()}
    before = figures_of(model, loads(model, 0))
    assert list(before["max_vio"]) == BLOCKS
    for step in range(40):
        update_biases(model, loads(model, step), 0.02)
    after = figures_of(model, loads(model, 99))
    for name in BLOCKS:
        assert before["max_vio"][name] > 1.5
        assert after["max_vio"][name] < 0.5 * before["max_vio"][name], name
        assert after["dead_experts"][name] <= before["dead_experts"][name]
        assert after["overloaded_experts"][name] < before["overloaded_experts"][name]
        assert min(shares(loads(model, 99)[name])) > least[name]


def test_update_equals_the_reports_loop():
    """Section 2.1.2: after each step, less by gamma where an expert is overloaded, more where it is underloaded."""
    model = DeepSeekV3(CONFIG).initialize(seed=0)
    generator = torch.Generator().manual_seed(0)
    load = {name: torch.randint(0, 9, (CONFIG.n_routed_experts,), generator=generator) for name in BLOCKS}
    load["2"] = torch.full((8,), 5)
    expected = {name: [0.0] * 8 for name in BLOCKS}
    for _ in range(3):
        update_biases(model, load, 0.125)
        for name, counts in load.items():
            mean = sum(counts.tolist()) / 8
            for expert, count in enumerate(counts.tolist()):
                if count > mean:
                    expected[name][expert] -= 0.125
                elif count < mean:
                    expected[name][expert] += 0.125
    found = {b.name: b.moe.gate.e_score_correction_bias.tolist() for b in model.blocks() if b.moe is not None}
    assert found == expected


def test_blocks_without_a_load_are_left_alone():
    model = DeepSeekV3(CONFIG).initialize(seed=0)
    update_biases(model, {"1": torch.arange(8)}, 0.1)
    moved = [b.name for b in model.blocks() if b.moe is not None and b.moe.gate.e_score_correction_bias.any()]
    assert moved == ["1"]
    assert list(figures_of(model, {"1": torch.arange(8)})["max_vio"]) == ["1"]
    assert figures_of(model, {})["max_vio"] == {}


def test_a_skipped_step_moves_no_bias():
    model = DeepSeekV3(CONFIG).initialize(seed=0)
    update_biases(model, {"1": torch.arange(8)}, 0.1, torch.tensor(True))
    moved = model.layers[1].moe.gate.e_score_correction_bias.clone()
    assert moved.tolist() == pytest.approx([0.1] * 4 + [-0.1] * 4)
    update_biases(model, {"1": torch.arange(8)}, 0.1, torch.tensor(False))
    assert torch.equal(model.layers[1].moe.gate.e_score_correction_bias, moved)


def test_figures_are_as_defined():
    model = DeepSeekV3(CONFIG).initialize(seed=0)
    model.layers[1].moe.gate.e_score_correction_bias[3] = -0.75
    model.layers[2].moe.gate.e_score_correction_bias.fill_(0.25)
    counts = torch.tensor([6, 0, 2, 0, 4, 4, 0, 0])
    figures = figures_of(model, {"1": counts, "2": torch.full((8,), 7)})
    assert figures["max_vio"] == {"1": pytest.approx((6 - 2) / 2), "2": 0}
    assert figures["bias_magnitude"] == {"1": 0.75, "2": 0.25}
    assert figures["bias_drift"] == {"1": pytest.approx(-0.75 / 8), "2": 0.25}
    assert figures["dead_experts"] == {"1": 4, "2": 0}
    assert figures["overloaded_experts"] == {"1": 1, "2": 0}  # 4 is twice the mean, and not more
    assert shares(counts) == pytest.approx([6 / 16, 0, 2 / 16, 0, 4 / 16, 4 / 16, 0, 0])
