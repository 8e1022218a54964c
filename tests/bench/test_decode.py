import pytest
import torch

from dsv3.bench.decode import OURS, THEIRS, agreement, bench_decode, continue_ours, weights_read
from dsv3.bench.peers import Setting, continuation, with_our_weights
from dsv3.errors import RunError
from dsv3.inference.engine import Engine
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.planning.parameters import count_parameters

DEBUG = ModelConfig.preset("debug", num_nextn_predict_layers=0)


def test_every_side_is_measured_at_every_batch():
    result = bench_decode("debug", 1, batches=(1, 2), tokens=6, prompt=4, served=[(3, 9, 2)])
    names, groups = [OURS, *(setting.name for setting in THEIRS)], ["batch 1", "batch 2", "3 requests, 9/2"]
    assert [(row.group, row.name) for row in result.rows] == [(group, name) for group in groups for name in names]
    assert [each.target for each in result.ratios] == [3.0, 3.0, 5.0]
    assert [each.ours for each in result.ratios] == [OURS] * 3
    for row in result.rows:
        megabytes = row.figures["MB of weights a step"]
        assert row.figures["GB/s"] == pytest.approx(megabytes / row.figures["ms a step"])
    wide, narrow = result.rows[1].figures, result.rows[len(THEIRS)].figures
    assert wide["MB of weights a step"] == 2 * narrow["MB of weights a step"]
    assert list(result.checks) == [f"{group}, tokens like transformers'" for group in groups]


def test_both_sides_choose_the_same_tokens():
    model = DeepSeekV3(DEBUG).initialize("fan_in", seed=2).eval()
    (peer,) = with_our_weights(model, [Setting(torch.float32, "sdpa", "grouped_mm")])
    prompts = torch.randint(0, 320, (3, 5), generator=torch.Generator().manual_seed(1))
    ours, theirs = continue_ours(Engine(model, None), prompts, 9), continuation(peer.eval(), prompts, 9)
    assert ours.shape == theirs.shape == (3, 9)
    assert agreement(model, prompts, ours, theirs) > 9
    other = theirs.clone()
    other[1, 0] += 1
    with pytest.raises(RunError, match="row 1, token 0"):
        agreement(model, prompts, ours, other)


def test_weights_read_grow_from_the_active_to_all():
    counted = count_parameters(DEBUG)
    assert weights_read(DEBUG, 1) == pytest.approx(counted.active_with_head)
    assert weights_read(DEBUG, 10_000) == pytest.approx(counted.main - counted.embedding)
    # Two tokens of two experts out of eight: 8 (1 - (3/4)^2) = 3.5 experts in each of two blocks.
    assert weights_read(DEBUG, 2) == pytest.approx(counted.active_with_head + 2 * 1.5 * counted.expert)
