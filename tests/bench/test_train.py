import pytest
import torch

from dsv3.bench.train import OURS, THEIRS, bench_train, check
from dsv3.errors import RunError
from dsv3.model.config import ModelConfig
from dsv3.planning.flops import training_flops_per_token


@pytest.fixture(scope="module")
def result():
    return bench_train("debug", 3, steps=1, batch=2, length=16)


def test_every_side_is_measured_in_every_setting(result):
    assert [row.name for row in result.rows] == [*OURS, *(setting.name for setting in THEIRS)]
    assert "transformers bf16, sdpa, grouped_mm" in {row.name for row in result.rows}
    flops = training_flops_per_token(ModelConfig.preset("debug", num_nextn_predict_layers=0), 16)
    for row in result.rows:
        speed = row.tokens_per_second
        assert 0 < speed.low <= speed.median <= speed.high
        assert row.figures["ms a step"] == pytest.approx(1000 * 2 * 16 / speed.median)
        assert row.figures["GFLOP/s"] == pytest.approx(flops * speed.median / 1e9)


def test_targets_are_those_that_were_promised(result):
    best, bf16, fp32 = result.ratios
    assert (best.ours, best.target) == ("dsv3 bf16", 1.0)
    assert (bf16.ours, bf16.target) == ("dsv3 bf16", 1.3)
    assert fp32.ours == "dsv3 fp32"
    assert "fp32" in bf16.theirs
    assert bf16.theirs == fp32.theirs
    fastest = max(result.rows[len(OURS) :], key=lambda row: row.tokens_per_second.median)
    assert best.theirs == fastest.name


def test_sides_that_compute_another_loss_are_refused():
    check({"dsv3 fp32": 7.0, "dsv3 bf16": 7.05, "transformers fp32, sdpa, eager": 7.0001})
    with pytest.raises(RunError, match=r"the loss of transformers fp32, sdpa, eager is 7\.1, of dsv3 fp32 7\.0"):
        check({"dsv3 fp32": 7.0, "transformers fp32, sdpa, eager": 7.1})


def test_both_sides_train_all_their_weights(monkeypatch):
    optimizers = []

    class Recorded(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    bench_train("debug", 1, steps=1, batch=1, length=8)
    counts = {sum(p.numel() for group in each.param_groups for p in group["params"]) for each in optimizers}
    assert len(optimizers) == len(OURS) + len(THEIRS)
    assert len(counts) == 1
    assert all(each.defaults == optimizers[0].defaults and each.defaults["fused"] for each in optimizers)
