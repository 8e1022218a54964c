"""Training on a GPU: the host never waits for a step under way, and what is kept beside it is what it should be."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3.errors import RunError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.precision import products
from dsv3.training.ema import Average
from dsv3.training.not_finite import first_not_finite
from dsv3.training.rng import random_state, restore_random_state
from dsv3.training.saver import Saver
from dsv3.weights.checkpoint import load_checkpoint
from tests.training.conftest import *  # noqa: F403  # its fixtures

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = ["training.device=cuda", "training.precision=bf16", "model.moe_intermediate_size=16"]
FP8 = ["training.precision=fp8", "model.preset=tiny"]


@pytest.mark.parametrize("more", [[], FP8, ["optimizer.kind=muon"], ["training.ema_decay=0.9"], ['training.recompute=["norms", "mla_up", "swiglu"]']])  # fmt: skip
def test_a_step_waits_for_nothing(tmp_path: Path, make_trainer: Callable, more: list[str]) -> None:
    trainer = make_trainer(tmp_path, *GPU, *more)
    for _ in range(3):
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(trainer.pending) == 6
    assert np.isfinite(trainer.pending[-1].transfer.read()["losses"]).all()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path: Path, make_trainer: Callable, kind: str) -> None:
    options = [*GPU, f"optimizer.kind={kind}", "training.ema_decay=0.9", "training.checkpoint_every_steps=3"]
    whole = make_trainer(tmp_path / "whole", *options)
    whole.run()
    half = make_trainer(tmp_path / "half", *options, "training.tokens=384")
    half.run()
    resumed = make_trainer(tmp_path / "half", *options)
    assert resumed.resume()
    for group, tensors in half.tensors().items():
        for name, each in tensors.items():
            assert torch.equal(each, resumed.tensors()[group][name]), f"{group}.{name}"
    resumed.run()
    # Sums over atomics differ in their last bits from run to run on a GPU.
    for name, each in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], each, atol=2e-3, rtol=2e-2, msg=name)


def test_a_bad_step_is_skipped_without_a_look_at_it(tmp_path: Path, make_trainer: Callable) -> None:
    trainer = make_trainer(tmp_path, *GPU)
    trainer.step()
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    hook = trainer.model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    trainer.step()
    hook.remove()
    assert all(torch.equal(each, before[name]) for name, each in trainer.model.state_dict().items())
    trainer.step()
    assert all(each.isfinite().all() for each in trainer.model.state_dict().values())
    assert [bool(step.transfer.read()["skipped"]) for step in trainer.pending] == [False, True, False]


@pytest.mark.parametrize("more", [[], FP8])
def test_the_first_tensor_that_is_not_finite_is_named(
    tmp_path: Path, make_trainer: Callable, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FP8_WEIGHT_GRADIENT_ROWS", 1)  # experts' rows are padded, and have some behind them
    trainer = make_trainer(tmp_path, *GPU, *more, "training.max_skipped_steps=1")
    batch = trainer.loader.batch(0, 4)
    assert first_not_finite(trainer.model, lambda: trainer.gradients(batch, 0.3)[0]) is None

    def overflow(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * 1e38 * 1e38

    trainer.model.mtp[0].block.self_attn.o_proj.register_forward_hook(overflow)
    with pytest.raises(
        RunError, match=r"The first that is not is the output of mtp\.0\.block\.self_attn\.o_proj, from pos"
    ):
        trainer.run()


def test_a_snapshot_is_that_of_its_moment(tmp_path: Path) -> None:
    weights = {"a": torch.full((4_000_000,), 1.0, device="cuda")}
    saver = Saver()
    saver.save(tmp_path / "step-1", weights, {}, {})
    weights["a"].fill_(2.0)
    saver.finish()
    into = {"a": torch.zeros(4_000_000)}
    load_checkpoint(tmp_path / "step-1", into)
    assert (into["a"] == 1).all()


def test_the_average_is_that_of_the_moments_of_its_updates() -> None:
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in").cuda()
    average, expected = Average(model.state_dict(), 0.5), model.lm_head.weight.detach().cpu().clone()
    for n in range(1, 30):
        average.before_change()
        with torch.no_grad():
            model.lm_head.weight.add_(0.1 * n)
        average.update()
        expected.lerp_(model.lm_head.weight.detach().cpu(), 1 - min(0.5, (1 + n) / (10 + n)))
    torch.testing.assert_close(average.tensors()["lm_head.weight"], expected)
    own = model.lm_head.weight.detach().clone()
    with average.in_place():
        assert torch.equal(model.lm_head.weight.cpu(), average.tensors()["lm_head.weight"])
    assert torch.equal(model.lm_head.weight, own)


def test_recomputing_changes_no_bit() -> None:
    gradients, losses = [], []
    tokens = torch.randint(2048, (4, 257), generator=torch.Generator().manual_seed(0)).cuda()
    for kinds in ((), ("norms", "mla_up", "swiglu")):
        model = DeepSeekV3(ModelConfig.preset("tiny"), compute_dtype=torch.bfloat16).initialize("fan_in").cuda()
        model.recompute(kinds)
        loss = model.loss(tokens, mtp_weight=0.3, balance_alpha=0.1)
        loss.total.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(losses[0].total, losses[1].total)
    for name, each in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], each, atol=1e-6, rtol=1e-3, msg=name)


def test_the_gpus_generator_goes_on_where_it_was() -> None:
    device = torch.device("cuda", 0)
    state = random_state(device)
    expected = torch.rand(5, device=device)
    torch.manual_seed(1)
    restore_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device), expected)
