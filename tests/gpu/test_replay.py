"""Recorded passes give what passes give, in every precision, while weights change and after the setting did."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv3.training.replay import WARM_UP, Replay
from tests.training.conftest import *  # noqa: F403  # its fixtures

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = [
    "training.device=cuda", "training.precision=bf16", "model.moe_intermediate_size=16", "training.micro_batch_size=2",
]  # fmt: skip
FP8 = ["training.precision=fp8", "model.preset=tiny"]
RECOMPUTE = 'training.recompute=["norms", "mla_up", "swiglu"]'


@pytest.mark.parametrize(
    "more", [[], FP8, ["data.document_mask=true"], [RECOMPUTE], [*FP8, RECOMPUTE, "data.document_mask=true"]]
)
def test_a_run_is_the_same(tmp_path: Path, make_trainer: Callable, more: list[str]) -> None:
    losses, weights = {}, {}
    for graphs in ("true", "false"):
        trainer = make_trainer(tmp_path / graphs, *GPU, *more, f"training.cuda_graphs={graphs}")
        for _ in range(6):
            trainer.step()
        losses[graphs] = [each.transfer.read()["losses"] for each in trainer.pending]
        weights[graphs] = {name: each.clone() for name, each in trainer.model.state_dict().items()}
        recorded = isinstance(trainer.passes, Replay) and trainer.passes.recording is not None
        assert recorded == (graphs == "true")
    for found, expected in zip(losses["true"], losses["false"], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)
    for name, each in weights["true"].items():
        torch.testing.assert_close(each, weights["false"][name], atol=2e-3, rtol=2e-2, msg=name)


def test_another_setting_is_another_recording(tmp_path: Path, make_trainer: Callable) -> None:
    trainer = make_trainer(
        tmp_path, *GPU, 'schedule.mtp_weight=[{kind="constant",value=0.3,steps=4},{kind="constant",value=0.0}]'
    )
    for _ in range(4):
        trainer.step()
    first = trainer.passes.recording
    assert first is not None
    for _ in range(WARM_UP + 1):
        trainer.step()
    assert trainer.passes.recording is not first
    assert all(each.grad is None for each in trainer.model.mtp.parameters())
