"""A layout's figures, each against a count, a measurement or another way to reckon."""

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch

from dsv3.bench.memory import Live
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline.parts import hold
from dsv3.parallel.zero import Shares
from dsv3.planning.flops import block_flops, training_flops_per_token
from dsv3.planning.layout import holdings, schedule_of
from dsv3.planning.parallel import Machine, Plan, kept_bytes
from dsv3.planning.parameters import count_parameters
from dsv3.precision.deferred import WeightGradients
from dsv3.recipe.schema import Recipe

V3 = ModelConfig.preset("deepseek-v3")
REPORT = Path(__file__).parents[2] / "recipes" / "deepseek-v3" / "pretrain.toml"
HOPPER = Machine(flops=400e12)


def report(*overrides, batch=15360, machine=HOPPER):
    return Plan(Recipe.load(REPORT, overrides), batch, machine)


def test_parameters_of_a_rank_are_those_of_its_modules():
    config = ModelConfig.preset("tiny", num_hidden_layers=5, num_nextn_predict_layers=1)
    plan = report(
        "model.preset=tiny", "model.num_hidden_layers=5", "parallel.pipeline=2", "parallel.schedule=dual_pipe_v",
        "parallel.data=4", "parallel.expert=1", "data.sequence_length=64", batch=64,
    )  # fmt: skip
    for rank in range(2):
        parts = set().union(*map(plan.layout.parts, plan.schedule.placement[rank]))
        held = sum(each.numel() for each in hold(DeepSeekV3(config), parts).parameters())
        assert plan.memory(rank).parameters == held


def test_the_report_s_layout():
    plan = report()
    ranks = [plan.memory(rank) for rank in range(16)]
    counted = count_parameters(V3)
    experts, biases = V3.n_routed_experts * counted.expert * (58 + 1), 256 * (58 + 1)
    # Everything twice, the experts over 64 ranks; the embedding is once more in the last stage for MTP, but on the same rank.
    assert sum(each.parameters for each in ranks) == 2 * (counted.trained - biases - experts + experts // 64)
    assert all(each.total < 141e9 for each in ranks)
    assert ranks[0].layers == "0-3 60 mtp.0"


def test_who_holds_what_is_the_same_at_every_batch_size():
    for name in ("dual_pipe", "dual_pipe_v"):
        first, last = (report(f"parallel.schedule={name}", batch=size) for size in (3072, 15360))
        assert (first.schedule.name, last.schedule.name) == ("one_f_one_b", name)
        assert first.layout == last.layout
        assert first.schedule.placement == last.schedule.placement == schedule_of(first.recipe.parallel).placement
    ranks = [rank for each in holdings(first.recipe) for rank in each.ranks]
    assert sorted(ranks) == list(range(2048))


def test_the_parts_of_a_step_add_up():
    for batch in (3072, 15360):
        step = report(batch=batch).step
        parts = (step.forward, step.backward, step.weight_gradient, step.pair, step.bubble, step.update)
        assert step.total == pytest.approx(sum(parts))
        assert 0 < step.exposed < step.total
    # What is computed does not depend on the schedule, but for what a pass waits for alone.
    compute = sum(report().compute(stage) for stage in range(16)) * 120 / 16
    free = report(machine=Machine(400e12, between=inf, within=inf)).step
    assert (free.exposed, free.update) == (0, 0)
    assert free.forward + free.backward + free.weight_gradient + free.pair == pytest.approx(compute, rel=1e-3)


def test_flops_of_the_stages_are_those_of_the_network():
    layout = report().layout
    total = sum(block_flops(V3, blocks, stage == 15, 4096) for stage, blocks in enumerate(layout.stages))
    # Gains of norms and routing biases, which the one counts and the other does not, are a few in a million.
    assert total == pytest.approx(training_flops_per_token(V3, 4096, mtp=True), rel=1e-5)


def test_measured_layers_take_the_place_of_flops():
    plan = report(machine=Machine(layers={"dense_layer": 1.0, "moe_layer": 10.0, "head": 100.0}))
    assert sum(plan.compute(stage) for stage in range(16)) / 4096 == pytest.approx(3 + 10 * (58 + 1) + 100 * 2)


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


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("data", [1, 4])
def test_what_rests_is_what_is_measured(precision, data):
    """Weights, their master copies and the copies that products read, gradients."""
    overrides = [f"training.precision={precision}", "model.preset=tiny", "model.num_nextn_predict_layers=1"]
    alone = ["parallel.pipeline=1", "parallel.expert=1", f"parallel.data={data}"]
    plan = report(*overrides, *alone, "data.sequence_length=64", batch=64)
    mesh = Mesh(*(Group(name, tuple(range(size))) for name, size in (("world", data), ("pipeline", 1), ("data", data))))
    mesh = replace(mesh, expert_data=Group("expert_data", tuple(range(data))))
    with Live() as live:
        model = DeepSeekV3(plan.config, torch.bfloat16).initialize("fan_in")
        if precision == "fp8":
            model.compute_in_fp8()
        shares = Shares(model, mesh)
        tokens = torch.randint(plan.config.vocab_size, (1, 65), generator=torch.Generator().manual_seed(0))
        model.loss(tokens, mtp_weight=0.3).total.backward()
        measured = live.now
    assert len(shares.narrow) > 0 or data == 1
    expected = plan.memory(0)
    # Products of FP32 weights in BF16 have their copies while they run alone.
    passing = 2 * expected.parameters if precision == "bf16" and data == 1 else 0
    assert measured == pytest.approx(expected.weights + expected.gradients - passing, rel=0.02)


@pytest.mark.parametrize(
    ("expert", "node", "overrides"), [(64, 8, []), (16, 8, []), (8, 4, ["model.n_group=1", "model.topk_group=1"])]
)
def test_rows_are_those_that_are_drawn(expert, node, overrides):
    """By chance: some of the groups, then experts in these; a row to each other node, and from there to each other rank."""
    plan = report(f"parallel.expert={expert}", *overrides, machine=Machine(node=node))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4000, plan.config.n_group, generator=generator)
    groups = scores >= scores.topk(plan.config.topk_group).values[:, -1:]
    open_ = groups.repeat_interleave(256 // plan.config.n_group, dim=1)
    chosen = torch.where(open_, torch.rand(4000, 256, generator=generator), -1.0).topk(8).indices
    ranks = chosen // (256 // expert)
    here = torch.randint(expert, (4000,), generator=generator)
    between = within = 0
    for row, own in zip(ranks.tolist(), here.tolist(), strict=True):
        between += len({each // node for each in row} - {own // node})
        within += sum(each % node != own % node for each in set(row))
    assert plan.rows == pytest.approx((between / 4000, within / 4000), rel=0.02)
    assert plan.wire["combine of a block, to other nodes"] == pytest.approx(4096 * plan.rows[0] * 2 * 7168)


def test_bounded_exchanges_have_a_row_for_every_rank():
    """Of two legs over 8 nodes of 8: 7 slabs to other nodes, then 8 to each of 7 neighbours; experts have room for all of these."""
    exact, bounded = (report(f"parallel.bounded_exchange={each}") for each in ("false", "true"))
    assert (exact.room, bounded.room) == (None, 64 * 4)
    assert bounded.rows == (7, 56)
    assert all(some < most for some, most in zip(exact.rows, bounded.rows, strict=True))
    more = bounded.wire["combine of a block, within the node"]
    assert more == 4096 * 56 * 2 * 7168
    kept = (kept_bytes(V3, False, (), False, room) for room in (8, 16))
    least, most = kept
    assert least == kept_bytes(V3, False, ())
    assert most - least == 8 * (40 + 2 * 7168 + 4 * 2048 + 2 * 2048)
    alone = ["parallel.pipeline=1", "parallel.data=1", "parallel.expert=1", "parallel.bounded_exchange=true"]
    assert (report(*alone, batch=8).room, report(*alone, batch=8).rows) == (None, (0, 0))


def test_a_pair_hides_the_shorter_of_both():
    slow, fast = (report(machine=Machine(between=each, within=each)) for each in (1e9, 1e15))
    assert fast.costs(5).pair == pytest.approx(3 * fast.costs(5).weight_gradient)
    assert slow.costs(5).pair == pytest.approx(2 * (slow.costs(5).forward - slow.costs(5).weight_gradient))


def test_one_rank_sends_nothing():
    alone = ["parallel.pipeline=1", "parallel.data=1", "parallel.expert=1"]
    plan = report(*alone, batch=8)
    step = plan.step
    assert (step.bubble, step.update, step.exposed) == (pytest.approx(0), 0, pytest.approx(0))
    assert plan.rows == (0, 0)
