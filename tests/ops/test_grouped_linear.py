"""The gradients of experts' weights, and where they are added. Products themselves are tested in tests/model."""

import pytest
import torch

from dsv3.ops.grouped_linear import grouped_linear, grouped_weight_gradient


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0], [10, 0, 0]])
def test_weight_gradients_are_those_of_the_product(counts):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(10, 6, generator=generator), torch.randn(10, 5, generator=generator)
    weight, counts = torch.randn(3, 5, 6, generator=generator).requires_grad_(), torch.tensor(counts)
    used = int(counts.sum())
    grouped_linear(x, weight, counts)[:used].backward(grad[:used])
    grad[used:], x[used:] = torch.nan, torch.nan
    alone = grouped_weight_gradient(grad, x, counts)
    torch.testing.assert_close(alone, weight.grad)
    total = torch.ones(3, 5, 6)
    assert grouped_weight_gradient(grad, x, counts, total) is total
    torch.testing.assert_close(total, 1 + alone)
