"""The wiring of the share of one GPU, at the widths of a small network; its times are taken on a GPU."""

import pytest
import torch

from dsv3.bench import share
from dsv3.bench.limits import Rates
from dsv3.bench.slices import DEPTHS, Layers, of_depth
from dsv3.cli import bench_share, main
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import LocalDispatcher
from dsv3.model.transformer import DeepSeekV3


@pytest.fixture
def small(monkeypatch):
    config = ModelConfig.preset("tiny", n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4)
    monkeypatch.setattr(ModelConfig, "preset", lambda name: config)
    monkeypatch.setattr(DeepSeekV3, "to_empty", lambda self, device: torch.nn.Module.to_empty(self, device="cpu"))
    return config


@pytest.mark.parametrize("mtp", [False, True])
def test_the_network_trains_all_it_holds(small, mtp):
    model = share.network(of_depth(small, 1, 2, mtp))
    assert [block.moe is None for block in model.layers] == [True, False, False]
    assert all(len(block.moe.experts.down_proj) == 4 for block in model.blocks() if block.moe)
    tokens = torch.randint(small.vocab_size, (1, 65))
    model.loss(tokens, mtp_weight=0.3 * mtp, balance_alpha=1e-4).total.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())


def test_rows_are_spread_evenly_and_come_back_to_their_tokens(small):
    model = share.network(of_depth(small, 0, 1))
    gate, exchange = model.layers[0].moe.gate, share.BalancedExchange(4)
    x = torch.randn(24, small.hidden_size)
    routing = gate(x, 1, 0.0)
    # Experts that do no more than weight: every token is multiplied by the sum of its weights.
    for dispatcher, counts in ((exchange, [48] * 4), (LocalDispatcher(), routing.load.tolist())):
        found = dispatcher.dispatch(x, routing)
        assert found.counts.tolist() == counts
        out = dispatcher.combine(found.rows * found.weight.unsqueeze(1), found.handle)
        torch.testing.assert_close(out, x * routing.weight.sum(1, keepdim=True))


@pytest.mark.parametrize("depths", [DEPTHS, ((1, 3), (1, 1), (2, 1))])
def test_layers_follow_from_depths(depths):
    times = [10 + 2 * dense + 3 * moe for dense, moe in depths]
    layers = Layers.of(times, depths)
    assert layers == Layers(2, 3, 10)
    assert layers.whole(ModelConfig.preset("deepseek-v3")) == 10 + 3 * 2 + 58 * 3


def test_kernels_are_told_apart_by_name():
    kinds = {
        "nvjet_sm90_tst_256x128": "other products", "contiguous_kernel": "grouped products",
        "add_wgrad_kernel": "grouped products", "add_kernel": "elementwise", "clear_kernel": "copies and concatenations",
        "void deep_gemm::sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0": "grouped products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention", "rows_kernel": "quantise, transpose, 12 bits",
        "backward_kernel": "norms and SwiGLU", "copy_kernel": "router, sort, permute",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda": "copies and concatenations",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add": "elementwise",
    }  # fmt: skip
    assert {name: share.kind_of(name) for name in kinds} == kinds


def test_a_machine_without_a_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.run(["bench", "train", "--share"]) == 2
    assert "measures a GPU, and found none" in capsys.readouterr().err


def test_the_budget_stands_beside_its_limits(monkeypatch, capsys):
    def measured(precision, mtp, rates, progress):
        budget = {"attention": 25.0, "elementwise": 9.0, "copies and concatenations": 6.0}
        least = {"attention": rates.attention, "elementwise": 1.5}
        return share.Share(precision, mtp, 30.0, 35.0, 40.0, 34.0, 1800.0, 450.0, 10**10, budget, least)

    monkeypatch.setattr(bench_share, "gpu", lambda what: torch.device("cpu"))
    monkeypatch.setattr(bench_share, "measured_rates", lambda: Rates(7e14, 1.1e15, 4.2e12, 20.0))
    monkeypatch.setattr(bench_share, "bench_share", measured)
    assert main.run(["bench", "train", "--share"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["attention", *["25.0", "20.0", "0.80"] * 2] in lines
    assert ["elementwise", *["9.0", "1.5", "0.17"] * 2] in lines
    assert ["copies", "and", "concatenations", "6.0", "6.0"] in lines
    assert ["all", *["40.0", "21.5", "0.54"] * 2] in lines
