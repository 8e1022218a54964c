"""Matrices that are whole in BF16 alone, with FP32 master copies in shares, against matrices in FP32 on every rank."""

import json

import pytest
import torch

from dsv3.weights.checkpoint import latest_checkpoint
from dsv3.weights.tensor_directory import ChunkReader
from tests.distributed.test_training import FP8
from tests.distributed.training import train

BF16 = ["training.precision=bf16", "training.micro_batch_size=2"]
PIPELINE = ["parallel.pipeline=2", "parallel.data=2", "training.micro_batch_size=1", "model.num_hidden_layers=5"]
RECOMPUTE = 'training.recompute=["norms","mla_up","swiglu"]'


def content(directory):
    """Every tensor of a run's last checkpoint."""
    reader = ChunkReader(latest_checkpoint(directory / "checkpoints"))
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in reader.layout.items()}
    reader.fill(tensors)
    return tensors


def figures(directory):
    """What a run wrote of its steps and evaluations, but for time and memory."""
    lines = [
        json.loads(line)
        for name in ("metrics", "evaluations")
        for line in (directory / f"{name}.jsonl").read_text().splitlines()
    ]
    return [{key: each[key] for key in each if "second" not in key and key != "peak_memory"} for each in lines]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(found[name], tensor), name


LAYOUTS = {
    "data": (2, ["parallel.data=2", "optimizer.moments=bf16", RECOMPUTE]),
    "experts": (4, ["parallel.data=4", "parallel.expert=2", "training.micro_batch_size=1"]),
    "muon": (2, ["parallel.data=2", "optimizer.kind=muon"]),
    "one_f_one_b": (4, [*PIPELINE, "parallel.schedule=one_f_one_b"]),
    "dual_pipe": (4, [*PIPELINE, "parallel.schedule=dual_pipe", "parallel.expert=2"]),
    "dual_pipe_v": (4, [*PIPELINE, "parallel.schedule=dual_pipe_v", RECOMPUTE]),
}
SHORT = {"data", "dual_pipe"}
"""Those of `make test`."""


@pytest.fixture
def ranks(request):
    """So many ranks of the session's."""
    return lambda size: request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])


@pytest.mark.parametrize(
    "layout", [each if each in SHORT else pytest.param(each, marks=pytest.mark.prove) for each in LAYOUTS]
)
def test_training_is_to_the_bit_what_it_is_with_weights_in_fp32(ranks, shard_directory, tmp_path, layout):
    size, overrides = LAYOUTS[layout]
    for name, wide in (("narrow", False), ("wide", True)):
        results = ranks(size).run(
            train, str(shard_directory), str(tmp_path / name), [*BF16, *overrides], 2, False, None, wide
        )
        heads = {tensors["lm_head.weight"].dtype for tensors, _, _ in results if "lm_head.weight" in tensors}
        assert heads == {torch.float32 if wide else torch.bfloat16}
    assert figures(tmp_path / "narrow") == figures(tmp_path / "wide")
    assert_equal(content(tmp_path / "narrow"), content(tmp_path / "wide"))


@pytest.mark.parametrize("layout", ["data", pytest.param("dual_pipe", marks=pytest.mark.prove)])
def test_fp8_copies_of_bf16_weights_train_as_near_to_bf16(ranks, shard_directory, tmp_path, layout):
    """Made of other values than FP8 copies of FP32 weights, with which one in forty differs by its last bit."""
    size, overrides = LAYOUTS[layout]
    losses = {}
    for name, precision, wide in (("bf16", "bf16", False), ("narrow", "fp8", False), ("wide", "fp8", True)):
        run = [*BF16, *FP8, *overrides, f"training.precision={precision}"]
        ranks(size).run(train, str(shard_directory), str(tmp_path / name), run, 2, False, None, wide)
        losses[name] = torch.tensor([[each["loss"], *each["mtp_losses"]] for each in figures(tmp_path / name)[:5]])
    away, before = ((losses[name] / losses["bf16"] - 1).abs() for name in ("narrow", "wide"))
    assert away.max() < 0.015
    assert away.mean() < 1.5 * before.mean() + 1e-3


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=pytest.mark.prove)])
@pytest.mark.parametrize(
    "layout", ["data", *(pytest.param(each, marks=pytest.mark.prove) for each in ("experts", "dual_pipe"))]
)
def test_going_on_with_the_same_layout_is_bit_for_bit(ranks, shard_directory, tmp_path, layout, precision):
    size, overrides = LAYOUTS[layout]
    run = [*BF16, *FP8, *overrides, f"training.precision={precision}"]
    ranks(size).run(train, str(shard_directory), str(tmp_path / "whole"), run, 2)
    halted = str(tmp_path / "halted")
    ranks(size).run(train, str(shard_directory), halted, [*run, "training.tokens=768"], 2)
    ranks(size).run(train, str(shard_directory), halted, run, 2, True)
    assert_equal(content(tmp_path / "halted"), content(tmp_path / "whole"))


def test_a_checkpoint_goes_from_shares_to_one_process_and_back_without_a_change(two_ranks, shard_directory, tmp_path):
    """No step is made on the way: every FP32 value is written by whoever has it, and read by whoever needs it."""
    before = [*BF16, "training.tokens=512"]
    two_ranks.run(train, str(shard_directory), str(tmp_path), [*before, "parallel.data=2"], 2)
    expected = content(tmp_path)
    assert {each.dtype for name, each in expected.items() if name.startswith("model.")} == {torch.float32}
    train(str(shard_directory), str(tmp_path), before, None, True, save=True)
    assert_equal(content(tmp_path), expected)
    two_ranks.run(train, str(shard_directory), str(tmp_path), [*before, "parallel.data=2"], 2, True, None, False, True)
    assert_equal(content(tmp_path), expected)


def test_an_extension_begins_with_the_start_s_fp32_weights(two_ranks, shard_directory, tmp_path):
    """A start of one process, with its optimizer's state: the first step's loss is that of one process."""
    shards = str(shard_directory)
    train(shards, str(tmp_path / "start"), BF16)
    start = str(tmp_path / "start" / "checkpoints" / "step-00000005")
    phase = ["extension.initial_from=start", "extension.from_length=32", "extension.optimizer_state=kept"]
    phase += [*BF16, "data.sequence_length=48", "training.tokens=384", "schedule.learning_rate=0"]
    two_ranks.run(train, shards, str(tmp_path / "ranks"), [*phase, "parallel.data=2"], 2, False, start)
    train(shards, str(tmp_path / "alone"), phase, None, False, start)
    found, expected = content(tmp_path / "ranks"), content(tmp_path / "alone")
    for name in expected:
        if name.startswith(("model.", "ema.")) and "bias" not in name:
            assert torch.equal(found[name], expected[name]), name
    assert figures(tmp_path / "ranks")[0]["loss"] == pytest.approx(figures(tmp_path / "alone")[0]["loss"], rel=1e-3)
