"""Bounded exchanges on a GPU: nothing waits for it; on two, what the benchmark of several GPUs checks of all kinds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.bench.gpus import ranks
from dsv3.bench.gpus.sizes import Size, Sizes
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import DeepSeekMoE, Dispatcher, LocalDispatcher, Routing
from dsv3.parallel.dispatch import ExpertParallel
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.precision.deferred import WeightGradients
from dsv3.precision.feed_forward import FeedForward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = ModelConfig.preset(
    "tiny", hidden_size=256, moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=0
)


class Mirror(Group):
    """Two ranks, of which the other is not there."""

    def exchange(self, rows: Tensor, sent: object, received: object, room: int = 0) -> Tensor:
        """What is for the other rank comes back as if from it."""
        return rows.clone()


def layer(dispatcher: Dispatcher, fp8: bool) -> DeepSeekMoE:
    moe = DeepSeekMoE(CONFIG, dispatcher).to("cuda")
    generator, held = torch.Generator("cuda").manual_seed(0), moe.experts.held
    for weight in moe.experts.parameters():
        whole = torch.empty(16, *weight.shape[1:], device="cuda").normal_(0, 0.1, generator=generator)
        weight.data.copy_(whole[held.start : held.stop])
    if fp8:
        moe.experts.fp8 = FeedForward(WeightGradients(), True)
    return moe


def through(moe: DeepSeekMoE, x: Tensor, routing: Routing, alignment: int = 0) -> Tensor:
    found = moe.dispatcher.dispatch(x, routing, alignment)
    rows = moe.experts(found.rows, found.counts, found.weight, alignment > 0)
    return moe.dispatcher.combine(rows, found.handle)


@pytest.mark.parametrize(("fp8", "alignment"), [(False, 0), (True, 0), (True, 128)])
def test_a_bounded_exchange_waits_for_nothing(fp8: bool, alignment: int) -> None:
    pair = Mirror("expert", (0, 1), 0)
    moe, local = (
        layer(ExpertParallel(Mesh(expert=pair, node=pair), fp8, bounded=True), fp8),
        layer(LocalDispatcher(), fp8),
    )
    x, grad = (torch.randn(512, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # A token's experts are all on one of the ranks: what comes back as if from the other has none here.
    expert = torch.rand(512, 8, device="cuda").topk(4).indices + 8 * torch.randint(2, (512, 1), device="cuda")
    weight = torch.rand(512, 4, device="cuda")
    routing = Routing(expert, weight.requires_grad_(), 16, None, None)
    x.requires_grad_()
    for _ in range(2):  # kernels are compiled the first time
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            x.grad = None
            y = through(moe, x, routing, alignment)
            y.backward(grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    # The other rank's experts computed nothing.
    found, x.grad = x.grad, None
    expected = through(local, x, replace(routing, weight=weight.masked_fill(expert >= 8, 0.0)), alignment)
    expected.backward(grad)
    tolerance = 0.1 if fp8 else 0.02
    for ours, theirs in ((y, expected), (found, x.grad)):
        assert ours is not None
        assert theirs is not None
        assert (ours - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("part", ranks.PARTS)
def test_the_benchmark_of_two_gpus_in_small(part: str) -> None:
    """Its own checks: the sides compute the same, memory is the formula's."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 16, "num_experts_per_tok": 4}
    sizes = Sizes(
        overlap=Size("tiny", {**wide, "num_hidden_layers": 2, "first_k_dense_replace": 0}, 512, 2),
        pipeline=Size("tiny", {"num_hidden_layers": 5, "first_k_dense_replace": 5}, 512, 6),
        zero=Size("small", {"num_hidden_layers": 2}, 512, 1),
        scaling=Size("tiny", {"num_hidden_layers": 2}, 512, 2, 2),
        rounds=1,
    )
    assert ranks.bench_gpus(2, [part], sizes).parts
