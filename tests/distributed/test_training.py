"""The trainer on ranks against the trainer alone: records, every parameter, checkpoints."""

import json

import pytest
import torch

from dsv3.parallel.pipeline.schedules import SCHEDULES
from tests.distributed.training import train

EXACT = ("step", "tokens", "batch_size", "max_vio", "dead_experts", "load")
CLOSE = ("loss", "mtp_losses", "balance_loss", "grad_norm", "grad_norms", "bias_magnitude")


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def compare(found, expected):
    """Figures, however nested."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-7)


def assert_same(results, directory, serial, serial_directory, atol=2e-5):
    theirs = records(serial_directory)
    ours = records(directory)
    assert len(ours) == len(theirs) == 5
    for mine, other in zip(ours, theirs, strict=True):
        assert {key: mine.get(key) for key in EXACT} == {key: other.get(key) for key in EXACT}
        for key in CLOSE:
            compare(mine[key], other[key])
    assert set().union(*(tensors for tensors, _, _ in results)) == serial.keys()
    for tensors, held, _ in results:
        for name, tensor in tensors.items():
            expected = serial[name][held[name].start : held[name].stop] if name in held else serial[name]
            torch.testing.assert_close(tensor, expected, atol=atol, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def serial(shard_directory, tmp_path_factory):
    """(tensors, directory) of a run in one process, by its overrides."""
    known = {}

    def run(*overrides):
        if overrides not in known:
            directory = tmp_path_factory.mktemp("serial")
            known[overrides] = train(str(shard_directory), str(directory), list(overrides)), directory
        (tensors, _, state), directory = known[overrides]
        return tensors, directory, state

    return run


LAYOUTS = [
    (["parallel.data=2", "parallel.expert=2"], 2, ["training.micro_batch_size=2"], 2e-5),
    (["parallel.data=2"], 2, ["optimizer.kind=muon"], 2e-5),
    # Moments are rounded to eight bits: now and then one goes the other way.
    (["parallel.data=2", "parallel.expert=2"], 1, ["training.balance=batch", "optimizer.moments=bf16"], 2e-4),
]


@pytest.mark.parametrize(("layout", "per_node", "overrides", "atol"), LAYOUTS)
def test_two_ranks_train_as_one_process(
    two_ranks, shard_directory, tmp_path, serial, layout, per_node, overrides, atol
):
    expected, directory, _ = serial(*overrides)
    results = two_ranks.run(train, str(shard_directory), str(tmp_path), [*layout, *overrides], per_node)
    assert_same(results, tmp_path, expected, directory, atol)


DEEPER = ("model.num_hidden_layers=5", "training.micro_batch_size=2")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_trains_as_one_process(two_ranks, shard_directory, tmp_path, serial, schedule):
    expected, directory, _ = serial(*DEEPER)
    layout = ["parallel.pipeline=2", f"parallel.schedule={schedule}"]
    results = two_ranks.run(train, str(shard_directory), str(tmp_path), [*layout, *DEEPER], 2)
    assert_same(results, tmp_path, expected, directory)


@pytest.mark.prove
def test_eight_ranks_with_experts_on_nodes_and_optimizer_state_in_shares(
    eight_ranks, shard_directory, tmp_path, serial
):
    expected, directory, state = serial()
    results = eight_ranks.run(train, str(shard_directory), str(tmp_path), ["parallel.data=8", "parallel.expert=4"], 2)
    assert_same(results, tmp_path, expected, directory)
    for _, _, own in results:  # a share is whole rows, and every parameter has a counter
        assert own == pytest.approx(state / 8, rel=0.1)


def test_a_checkpoint_goes_on_with_any_layout(two_ranks, shard_directory, tmp_path, serial):
    """Two steps on two ranks with experts apart, two with experts together, the last in one process: the serial run's curve."""
    expected, directory, _ = serial()
    shards = str(shard_directory)
    for layout, steps in ((["parallel.data=2", "parallel.expert=2"], 2), (["parallel.data=2"], 4)):
        results = two_ranks.run(
            train, shards, str(tmp_path), [*layout, f"training.tokens={256 * steps}"], 2, steps == 4
        )
        assert len(records(tmp_path)) == steps
    assert len(results) == 2
    alone = train(shards, str(tmp_path), [], None, True)
    assert_same([alone], tmp_path, expected, directory)


def test_going_on_with_the_same_layout_is_bit_for_bit(two_ranks, shard_directory, tmp_path):
    layout = ["parallel.data=2", "parallel.expert=2"]
    whole = two_ranks.run(train, str(shard_directory), str(tmp_path / "whole"), layout, 2)
    halted = str(tmp_path / "halted")
    two_ranks.run(train, str(shard_directory), halted, [*layout, "training.tokens=768"], 2)
    resumed = two_ranks.run(train, str(shard_directory), halted, layout, 2, True)
    for (ours, _, _), (theirs, _, _) in zip(resumed, whole, strict=True):
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
