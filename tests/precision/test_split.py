"""Products whose weights' gradients can wait, against plain autograd; for a whole network in tests/model/test_transformer.py."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.ops.grouped_linear import reference
from dsv3.precision.deferred import WeightGradients
from dsv3.precision.split import Split


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_s_gradient_now_weight_s_later(experts, dtype):
    x = random(12, 6).to(dtype).requires_grad_()
    if experts:
        weights, counts = [random(3, 5, 6, seed=1).requires_grad_()], torch.tensor([4, 0, 8])
        expected = reference(x, weights[0], counts)
    else:
        weights, counts = [random(5, 6, seed=1).requires_grad_(), random(2, 6, seed=2).requires_grad_()], None
        expected = F.linear(x, torch.cat(weights).to(dtype))
    upstream = random(*expected.shape, seed=3).to(dtype)
    wanted = torch.autograd.grad(expected, [x, *weights], upstream)
    gradients = WeightGradients()
    with gradients.deferred() as later:
        found = Split(gradients)(x, weights, counts)
        found.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, wanted[0])
    assert all(each.grad is None for each in weights)
    for add in later:
        add()
    for each, grad in zip(weights, wanted[1:], strict=True):
        torch.testing.assert_close(each.grad, grad)


def test_passes_share_a_copy_until_a_weight_changes():
    split, weight, x = Split(WeightGradients()), random(5, 6).requires_grad_(), random(3, 6).bfloat16()
    first, second = split(x, [weight]), split(x, [weight])
    kept = [each.grad_fn.saved_tensors[1].data_ptr() for each in (first, second)]
    assert kept[0] == kept[1]
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(split(x, [weight]), 2 * first)
