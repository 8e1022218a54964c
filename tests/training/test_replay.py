"""What is recorded makes no constants on the host, and is replayed with new inputs, while weights change, until the setting does.

A CPU has no graphs: passes that are made again in place stand for them. Those of a GPU: tests/gpu/test_replay.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsv3.training.replay
from dsv3.training.gradients import Inputs, Setting, passes
from dsv3.training.replay import Recording, Replay

PRECISIONS = [["training.precision=bf16"], ["training.precision=fp8", "model.preset=tiny", "model.num_hidden_layers=3"]]


def stand_in(model: Any, inputs: Inputs, setting: Setting) -> Recording:
    """A recording whose graph makes the passes of the inputs that it holds."""
    held = Inputs(*(None if each is None else each.clone() for each in inputs))

    class Graph:
        def replay(self) -> None:
            recording.figures, recording.load = passes(model, held, setting)

    recording = Recording(Graph(), held, torch.empty(0), {})  # type: ignore[arg-type]
    return recording


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replayed_passes_train_the_same(
    tmp_path: Path, make_trainer: Callable, monkeypatch: pytest.MonkeyPatch, precision: list[str]
) -> None:
    monkeypatch.setattr(dsv3.training.replay, "record", stand_in)
    mtp = 'schedule.mtp_weight=[{kind="constant",value=0.3,steps=3},{kind="constant",value=0.0}]'
    trainers = [make_trainer(tmp_path, *precision, mtp, "training.micro_batch_size=2") for _ in range(2)]
    replayed = trainers[0]
    replayed.passes, replayed.optimizer.keep_gradients = Replay(), True
    recordings = []
    for _ in range(5):
        for trainer in trainers:
            trainer.step()
        recordings.append(replayed.passes.recording)
        found, expected = (trainer.pending[-1].transfer.read() for trainer in trainers)
        for name, each in expected.items():
            assert np.array_equal(found[name], each), name
    for name, each in trainers[1].model.state_dict().items():
        assert torch.equal(replayed.model.state_dict()[name], each), name
    assert recordings[0] is None
    assert recordings[3] is None
    assert recordings[1] is recordings[2] is not recordings[4] is not None
    assert all(each.grad is None for each in replayed.model.mtp.parameters())


def test_a_search_for_what_is_not_finite_leaves_no_recording(
    tmp_path: Path, make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsv3.training.replay, "record", stand_in)
    trainers = [make_trainer(tmp_path, *PRECISIONS[0]) for _ in range(2)]
    replayed = trainers[0]
    replayed.passes, replayed.optimizer.keep_gradients = Replay(), True
    for number in range(8):
        for trainer in trainers:
            trainer.step()
        if number == 3:
            recording = replayed.passes.recording
            assert "all of it is finite" in replayed.named(replayed.pending[-1])
    assert recording is not replayed.passes.recording is not None
    for name, each in trainers[1].model.state_dict().items():
        assert torch.equal(replayed.model.state_dict()[name], each), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_passes_make_no_constants_on_the_host(tmp_path: Path, make_trainer: Callable, precision: list[str]) -> None:
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.lift_fresh.default:  # torch.tensor(...)
                found.append(args)
            return function(*args, **(kwargs or {}))

    trainer = make_trainer(tmp_path, *precision, "data.document_mask=true", 'training.recompute=["norms"]')
    trainer.step()

    def watched(*args: Any) -> Any:
        with Watch():
            return passes(*args)

    trainer.passes = watched
    trainer.step()
    assert not found
