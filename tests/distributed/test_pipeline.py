"""The pipeline's executor on ranks joined by gloo, against the serial run of the same micro-batches."""

import pytest
import torch
import torch.distributed as dist

from dsv3.model.config import ModelConfig
from dsv3.model.micro_batch import MicroBatch
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.pipeline.executor import Executor
from dsv3.parallel.pipeline.layout import balanced_layout
from dsv3.parallel.pipeline.parts import hold
from dsv3.parallel.pipeline.schedules import SCHEDULES, make_schedule
from dsv3.precision.deferred import WeightGradients
from tests.distributed.ranks import Ranks

CONFIG = ModelConfig.preset("debug", num_hidden_layers=5, num_nextn_predict_layers=2)
PLAIN = {"mtp_weight": 0.3, "balance_alpha": 0.1}


def network(config, recompute=(), fp8=None):
    model = DeepSeekV3(config).initialize("fan_in")
    if fp8 is not None:
        model.compute_in_fp8(fp8)
    for block in model.blocks():
        if block.moe is not None:
            block.moe.gate.e_score_correction_bias.uniform_(-0.3, 0.1, generator=torch.Generator().manual_seed(1))
    model.recompute(recompute)
    return model


def micro_batches(config, count, options):
    """Rows with padding and three documents each."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        tokens = torch.randint(config.vocab_size, (2, 25), generator=generator)
        segments = torch.randint(25, (2, 2), generator=generator).sort().values
        segment_ids = torch.searchsorted(segments, torch.arange(25).expand(2, -1).contiguous(), right=True)
        valid = torch.rand(2, 25, generator=generator) > 0.1
        more = {"segment_ids": segment_ids, "valid": valid, "scale": 1 / count, "divisor": 40.0}
        made.append(MicroBatch.of(config, tokens, **more, **options))
    return made


def serial(config, count, options, fp8=False):
    """(figures, loads, gradients) as training has them on one device."""
    model = network(config, (), WeightGradients() if fp8 else None)
    figures, load = [], {}
    for rows in micro_batches(config, count, options):
        losses = model.losses(rows)
        losses.total.backward()
        figures.append(torch.stack([losses.main, losses.balance, *losses.mtp]))
        load = {name: each + load.get(name, 0) for name, each in losses.load.items()}
    return torch.stack(figures).mean(0), load, {n: p.grad for n, p in model.named_parameters()}


def pipelined(config, name, ranks, count, options, recompute, fp8=False):
    """The same from one rank, with its part of the gradients it holds; twice, because nothing may be left from the first batch."""
    schedule = make_schedule(name, ranks, count, "one_f_one_b")
    blocks = [1.0] * config.num_hidden_layers
    layout = balanced_layout(blocks, schedule.stages, 0.2, 1.0, config.num_nextn_predict_layers)
    parts = set().union(*map(layout.parts, schedule.placement[dist.get_rank()]))
    gradients, group = WeightGradients(), pipeline(ranks)
    model = hold(network(config, recompute, gradients if fp8 else None), parts)
    executor = Executor(model, layout, group, gradients)
    executor.run(schedule, micro_batches(config, count, options))
    model.zero_grad()
    figures, load = executor.run(schedule, micro_batches(config, count, options))
    return figures, load, {n: p.grad for n, p in model.named_parameters()}


def pipeline(ranks):
    return Group("pipeline", tuple(range(ranks)), dist.get_rank(), dist.group.WORLD)


def check(found, expected):
    """Every rank has the losses and loads; every parameter is somewhere, its gradients' sum over the ranks the serial one."""
    figures, load, gradients = expected
    parts = [theirs for _, _, theirs in found]
    for their_figures, their_load, _ in found:
        torch.testing.assert_close(their_figures, figures, rtol=1e-5, atol=1e-6)
        assert their_load.keys() == load.keys()
        assert all(torch.equal(each, load[name]) for name, each in their_load.items())
    for name, wanted in gradients.items():
        held = [theirs[name] for theirs in parts if name in theirs]
        assert held, name
        if wanted is None:
            assert not any(each is not None for each in held), name
        else:
            assert (sum(held) - wanted).abs().max() <= 2e-5 * wanted.abs().max() + 1e-7, name


@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_gradients_are_those_of_the_serial_run(two_ranks, name):
    found = two_ranks.run(pipelined, CONFIG, name, 2, 4, PLAIN, ())
    check(found, serial(CONFIG, 4, PLAIN))
    first, second = (set(theirs) for _, _, theirs in found)
    # DualPipe holds everything twice; where the last stage is not on the first rank, MTP needs an embedding of its own.
    assert first & second == {"dual_pipe": first, "dual_pipe_v": set()}.get(name, {"embed_tokens.weight"})


@pytest.mark.parametrize("name", ["dual_pipe", "dual_pipe_v"])
def test_too_few_micro_batches_on_the_same_layout(two_ranks, name):
    found = two_ranks.run(pipelined, CONFIG, name, 2, 3, PLAIN, ())
    check(found, serial(CONFIG, 3, PLAIN))
    first, second = (set(theirs) for _, _, theirs in found)
    assert first & second == (first if name == "dual_pipe" else set())


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_with_recomputation_and_without_mtp(two_ranks, options):
    recompute = ("norms", "mla_up", "swiglu")
    check(two_ranks.run(pipelined, CONFIG, "dual_pipe_v", 2, 5, options, recompute), serial(CONFIG, 5, options))


@pytest.mark.prove
@pytest.mark.parametrize("name", SCHEDULES)
def test_on_four_ranks(name):
    config = CONFIG.replace(num_hidden_layers=9)
    with Ranks(4) as ranks:
        check(ranks.run(pipelined, config, name, 4, 10, PLAIN, ()), serial(config, 10, PLAIN))


def test_in_fp8_with_deferred_gradients(two_ranks):
    """What is rounded is the same; what sums in another order may round otherwise further down."""
    figures, _, expected = serial(FP8, 4, PLAIN, True)
    for found, _, gradients in two_ranks.run(pipelined, FP8, "dual_pipe_v", 2, 4, PLAIN, ("swiglu",), True):
        torch.testing.assert_close(found, figures, rtol=1e-3, atol=1e-3)
        for name, each in gradients.items():
            assert (each - expected[name]).norm() <= 0.02 * expected[name].norm(), name


FP8 = ModelConfig.preset(
    "debug", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, q_lora_rank=32, v_head_dim=16, num_hidden_layers=4,
    qk_nope_head_dim=16, qk_rope_head_dim=16, n_routed_experts=4, n_group=2, num_nextn_predict_layers=1,
)  # fmt: skip
