"""A layout's figures, each against a count, a measurement or another way to reckon."""

import pytest
import torch

from dsv3.bench.memory import Live
from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.pipeline.parts import hold
from dsv3.planning.flops import training_flops_per_token
from dsv3.planning.parallel import block_flops, kept_bytes, make_plan
from dsv3.planning.parameters import count_parameters
from dsv3.precision.deferred import WeightGradients

V3 = ModelConfig.preset("deepseek-v3")
REPORT = dict(
    pipeline=16, data=128, expert=64, batch=15360, micro_batch=1, length=4096, rate=400e12, bandwidth=50e9,
    recompute=("norms", "mla_up", "swiglu"), fp8=True,
)  # fmt: skip


def test_parameters_of_a_rank_are_those_of_its_modules():
    config = ModelConfig.preset("tiny", num_hidden_layers=5, num_nextn_predict_layers=1)
    plan = make_plan(
        config, "dual_pipe_v", **{**REPORT, "pipeline": 2, "data": 4, "expert": 1, "batch": 64, "length": 64}
    )
    for rank in range(2):
        parts = set().union(*map(plan.layout.parts, plan.schedule.held(rank)))
        model = hold(DeepSeekV3(config), parts)
        held = sum(each.numel() for each in model.state_dict().values())
        assert plan.memory(rank).parameters == held


def test_the_report_s_layout():
    plan = make_plan(V3, "dual_pipe", **REPORT)
    ranks = [plan.memory(rank) for rank in range(16)]
    counted = count_parameters(V3)
    experts = V3.n_routed_experts * counted.expert * (58 + 1)
    # Everything twice, the experts over 64 ranks; the embedding is once more in the last stage for MTP, but on the same rank.
    assert sum(each.parameters for each in ranks) == 2 * (counted.trained - experts + experts // 64)
    assert all(each.total < 141e9 for each in ranks)
    assert 0 < plan.timeline.bubble < 0.2 * plan.timeline.total


def test_flops_of_the_stages_are_those_of_the_network():
    plan = make_plan(V3, "one_f_one_b", **REPORT)
    total = sum(block_flops(V3, plan.layout, stage, 4096) for stage in range(16))
    # Gains of norms and routing biases, which the one counts and the other does not, are a few in a million.
    assert total == pytest.approx(training_flops_per_token(V3, 4096, mtp=True), rel=1e-5)


@pytest.mark.parametrize("recompute", [(), ("norms", "mla_up", "swiglu")])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_activations_are_those_measured(monkeypatch, recompute, dense, fp8):
    from dsv3.ops.attention import attention

    monkeypatch.setattr(attention, "candidates", [each for each in attention.candidates if each.name == "sdpa"])
    # On a CPU experts' rows may be padded to equal groups.
    monkeypatch.setattr("dsv3.model.feed_forward.equal_groups", lambda routing: 0)
    config = ModelConfig.preset("tiny", num_nextn_predict_layers=0)

    def kept(layers):
        model = DeepSeekV3(
            config.replace(num_hidden_layers=layers, first_k_dense_replace=layers if dense else 0), torch.bfloat16
        )
        model.initialize("fan_in").recompute(recompute)
        model.defer_weight_gradients(WeightGradients())
        if fp8:
            model.compute_in_fp8()
        tokens = torch.randint(config.vocab_size, (2, 513), generator=torch.Generator().manual_seed(0))
        model.loss(tokens).total.backward()  # copies of the weights are there from now on
        with Live() as live:
            loss = model.loss(tokens).total
            assert loss.requires_grad
            return live.now

    measured = (kept(2) - kept(1)) / 1024
    assert kept_bytes(config, dense, recompute, fp8) == pytest.approx(measured, rel=0.1)


def test_tokens_meet_as_many_ranks_as_when_drawn():
    plan = make_plan(V3, "one_f_one_b", **REPORT)
    drawn = torch.rand(4000, 256, generator=torch.Generator().manual_seed(0)).topk(8).indices // 4
    here = torch.randint(64, (4000, 1), generator=torch.Generator().manual_seed(1))
    met = [len(set(row) - {own}) for row, (own,) in zip(drawn.tolist(), here.tolist(), strict=True)]
    assert plan.ranks_per_token == pytest.approx(sum(met) / 4000, rel=0.01)
    assert plan.dispatch_bytes == pytest.approx(4096 * plan.ranks_per_token * 7168 * 33 / 32)


def test_a_pair_hides_the_shorter_of_both():
    slow, fast = (make_plan(V3, "dual_pipe", **{**REPORT, "bandwidth": each}) for each in (1e9, 1e15))
    assert fast.costs(5).pair == pytest.approx(3 * fast.costs(5).weight_gradient)
    assert slow.costs(5).pair == pytest.approx(2 * (slow.costs(5).forward - slow.costs(5).weight_gradient))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert": 48}, "48 expert ranks: expected a divisor of 128 data-parallel ranks and of 256 experts"),
        ({"batch": 15361}, "expected a multiple of 128"),
        ({"batch": 3072}, "expected 32"),
        ({"pipeline": 64, "batch": 128 * 128}, "64 pipeline stages for 61 blocks"),
    ],
)
def test_refusals(change, said):
    with pytest.raises(UserError, match=said):
        make_plan(V3, "dual_pipe", **{**REPORT, **change})
