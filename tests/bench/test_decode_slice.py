"""The wiring of the slice, at the widths of a small network; its times are taken on a GPU."""

import json

import pytest
import torch

from dsv3.bench import decode_slice
from dsv3.bench.decode_slice import PUBLISHED, Settings, bench_slice
from dsv3.bench.limits import Rates, experts_read, least
from dsv3.bench.slices import DEPTHS, layers_of, stored_network
from dsv3.cli import bench_slice as cli
from dsv3.cli import main
from dsv3.model.config import ModelConfig
from dsv3.ops.block_scaled import dequantize
from tests.precision.test_stored import CONFIG, forced

__all__ = ["forced"]
CPU = torch.device("cpu")
RATES = Rates(bf16=7e14, fp8=1.1e15, copy=4.2e12, attention=20.0)
SETTINGS = Settings(batches=(1, 3), contexts=(64,), prompt=64, calls=2, peer_batches=(1,), peer_tokens=(1, 2))


def test_weights_are_stored_as_released_and_have_the_deviation_of_their_inputs():
    model = stored_network(CONFIG, CPU)
    linear, experts = model.layers[0].self_attn.o_proj, model.layers[1].mlp.experts
    wide = dequantize(linear.weight, linear.weight_scale_inv, torch.float32)
    assert float(wide.std()) == pytest.approx(linear.weight.shape[1] ** -0.5, rel=0.1)
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float8_e4m3fn
    assert model.lm_head.weight.dtype == model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
    assert model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert all(each.float().isfinite().all() for each in model.state_dict().values())


def test_a_slice_is_a_network_over_the_same_weights():
    model = stored_network(CONFIG.replace(num_hidden_layers=6, first_k_dense_replace=2), CPU)
    tokens = torch.randint(320, (1, 9))
    for dense, moe in DEPTHS:
        part = layers_of(model, dense, moe)
        assert [block.moe is None for block in part.layers] == [True] * dense + [False] * moe
        assert {id(each) for each in part.parameters()} <= {id(each) for each in model.parameters()}
        with torch.inference_mode():
            assert part(tokens).logits.isfinite().all()


def test_limits_of_the_whole_network():
    config = ModelConfig.preset("deepseek-v3", num_nextn_predict_layers=0)
    assert experts_read(config, 1) == pytest.approx(8)
    assert experts_read(config, 10_000) == pytest.approx(256)
    one = least(config, 1, 4096, RATES)
    # 36.7B parameters of which head and routers are in BF16, and 288 MB of cache.
    assert one.bound == "bytes"
    assert one.bytes == pytest.approx(36.7e9 + 0.93e9 + 0.1e9 + 288e6, rel=0.005)
    assert one.milliseconds == pytest.approx(1000 * one.bytes / 4.2e12)
    prompt = least(config, 16_384, 0, RATES)
    assert prompt.bound == "products"
    # Two for each parameter in the layers, and 41K a pair, layer and half: a published figure is 250 GFLOP for three passes at 4K.
    assert least(config, 4096, 0, RATES).flops / 4096 == pytest.approx(250e9 / 3, rel=0.05)
    # Absorbed attention: 278,528 a token of the cache and layer.
    more = least(config, 1, 5096, RATES).flops - one.flops
    assert more == pytest.approx(1000 * 61 * 278_528)


def test_every_part_runs_on_the_cpu(capsys):
    """With weights multiplied out; `transformers` as well."""
    seen = []
    found = bench_slice(RATES, CPU, lambda **news: seen.append(news), CONFIG, SETTINGS)
    names = ["batch 1, context 64", "batch 3, context 64", "prefill of 64"]
    assert [point.name for point in found.points] == [each.name for each in found.whole] == names
    for point in found.points:
        assert point.milliseconds > point.limit > 0
        assert point.times_the_limit == point.milliseconds / point.limit
        assert (point.step is None) == (point.context == 0)
        assert 2 <= point.experts <= 16
    assert [point.theirs is not None for point in found.points] == [True, False, False]
    for each in found.whole:
        layers = CONFIG.num_dense_layers * each.dense_layer + 2 * each.moe_layer
        assert each.total == pytest.approx(layers + each.rest)
    assert {news["stage"] for news in seen if news["done"] == news["total"]} == {
        "weights in FP8", "passes of 1 + 4 layers", "passes of 1 + 2 layers", "passes of 2 + 2 layers",
        "steps of the engine", "transformers",
    }  # fmt: skip
    cli.print_slice(found)
    said = capsys.readouterr().out
    assert "extrapolated, one GPU, no communication" in said
    assert all(name in said for name in [*names, *PUBLISHED])
    assert "times the limit, at most 1.5 wanted: missed" in said


def test_the_command_writes_what_was_measured(forced, monkeypatch, tmp_path, capsys):
    """With products in FP8, as on a GPU."""
    inner = bench_slice

    def small(rates, device, progress):
        return inner(rates, device, progress, CONFIG, Settings(batches=(1,), contexts=(64,), prompt=64, calls=1))

    monkeypatch.setattr(cli, "gpu", lambda what: CPU)
    monkeypatch.setattr(cli, "measured_rates", lambda: RATES)
    monkeypatch.setattr(cli, "bench_slice", small)
    monkeypatch.setattr(decode_slice, "transformers_times", lambda *_: {"batch 1, context 64": 5.0})
    out = tmp_path / "slice.json"
    assert main.run(["bench", "decode", "--slice", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [point["name"] for point in written["points"]] == ["batch 1, context 64", "prefill of 64"]
    assert written["points"][0]["theirs"] == 5.0
    assert written["rates"]["copy"] == 4.2e12
    assert {"machine", "versions", "command", "published", "whole"} <= written.keys()
    assert "1 dense and 4 MoE layers" in capsys.readouterr().out


def test_a_machine_without_a_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.run(["bench", "decode", "--slice"]) == 2
    assert "measures a GPU, and found none" in capsys.readouterr().err
