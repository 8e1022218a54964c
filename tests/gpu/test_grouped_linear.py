"""One product an expert in BF16 on a GPU: the gradients of their weights, and where they are added."""

import pytest
import torch
from torch import nn

from dsv3.ops.grouped_linear import fits_gluon, grouped_linear, grouped_weight_gradient, weight_gradient_reference
from tests.ops.products import difference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)


def matrix(*shape, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


# Groups that end within 16 tokens, with 16, with a step of 64; more steps than stages; an expert size of DeepSeek-V3.
@pytest.mark.parametrize("counts", [(70, 0, 1, 300), (0, 0), (1024,), (80, 64, 0, 0, 0, 2000)])
@pytest.mark.parametrize(("down", "across"), [(152, 304), (64, 96), (400, 1384), (4096, 7168)])
def test_weight_gradients_are_added_to_their_sums(counts, down, across):
    counts, used = torch.tensor(counts, device="cuda"), sum(counts)
    grad, x = matrix(used + 300, down), matrix(used + 300, across, seed=1)
    grad[used:], x[used:] = torch.nan, torch.nan
    total = matrix(len(counts), down, across, seed=2).float()
    if (reason := fits_gluon(grad, x, counts, total)) is not None:
        pytest.skip(reason)
    before = total.clone()
    expected = weight_gradient_reference(grad.float(), x.float(), counts, before.double()).float()
    assert grouped_weight_gradient(grad, x, counts, total) is total
    assert bool(total.isfinite().all())
    assert difference(total, expected) < 1e-6
    assert torch.equal(total[counts == 0], before[counts == 0])
    again = before.clone()
    grouped_weight_gradient(grad, x, counts, again)
    assert torch.equal(again, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_add_up(dtype):
    counts = torch.tensor([130, 0, 63, 7], device="cuda")
    weight, expected = nn.Parameter(matrix(4, 96, 64).to(dtype)), nn.Parameter(matrix(4, 96, 64).float())
    for seed in (1, 2, 3):
        x, grad = matrix(200, 64, seed=seed), matrix(200, 96, seed=seed + 5)
        ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
        grouped_linear(ours, weight, counts).backward(grad)
        groups = zip(theirs.split(counts.tolist()), expected, strict=True)
        torch.cat([rows @ each.t() for rows, each in groups]).backward(grad.float())
        assert difference(ours.grad, theirs.grad) < 1e-4
        assert weight.grad.dtype == dtype
        assert difference(weight.grad, expected.grad) < 1e-4
