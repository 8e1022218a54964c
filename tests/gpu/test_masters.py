"""Weights in BF16 whose gradients are in FP32 (`parallel.zero`), on the implementations of a GPU."""

import pytest
import torch

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.zero import Shares
from dsv3.precision.deferred import WeightGradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = ModelConfig.preset("tiny", num_nextn_predict_layers=1)


def gradients(narrow, precision, deferred):
    """Of two micro-batches, by the parameter's name; and the losses."""
    model = DeepSeekV3(CONFIG, torch.bfloat16).to("cuda").initialize("fan_in")
    if precision == "fp8":
        model.compute_in_fp8()
    if narrow:
        four = tuple(range(4))
        shares = Shares(model, Mesh(data=Group("data", four, 1), expert_data=Group("expert_data", four, 1)))
        assert "lm_head.weight" in shares.narrow
    if deferred:
        model.defer_weight_gradients(WeightGradients())
    tokens = torch.randint(CONFIG.vocab_size, (2, 1, 513), generator=torch.Generator().manual_seed(0)).cuda()
    losses = []
    for rows in tokens:
        found = model.loss(rows, mtp_weight=0.3, balance_alpha=0.01)
        found.total.backward()
        losses.append(found.main)
    return {name: each.grad for name, each in model.named_parameters()}, torch.stack(losses)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_gradients_are_those_of_fp32_weights(precision, deferred):
    """But for the order of sums in attention's backward pass; in FP8 for copies made of rounded weights, too."""
    (found, loss), (expected, other) = (gradients(narrow, precision, deferred) for narrow in (True, False))
    torch.testing.assert_close(loss, other, rtol=0 if precision == "bf16" else 1e-2, atol=0)
    for name, each in expected.items():
        assert found[name].dtype == torch.float32
        if precision == "bf16":
            assert (found[name] - each).norm() <= 1e-2 * each.norm(), name
        else:
            assert bool(found[name].isfinite().all()), name
