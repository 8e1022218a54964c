"""Gradients of weights that are read in another dtype, or row by row, and added to those of micro-batches before."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsv3.ops.cast import Rows, add_rows, cast
from dsv3.ops.cross_entropy import add_scaled

TOKENS = torch.tensor([[1, 3, 3], [0, 3, 1]])


def gradients(rows: int):
    return torch.randn(2, 3, rows, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_gradient_of_an_embedding_and_add_to_the_one_before(dtype):
    weight = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype))
    weight.grad_dtype = torch.float32
    expected = nn.Parameter(weight.detach().float())
    for number in range(1, 4):
        upstream = gradients(4).to(dtype)
        out = Rows.apply(weight, TOKENS)
        assert out.dtype == dtype
        out.backward(upstream)
        F.embedding(TOKENS, expected).backward(upstream.float())
        assert weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad, expected.grad, msg=f"after {number} micro-batches")


def test_rows_are_added_where_they_were_read_alone():
    total = torch.zeros(5, 4)
    add_rows(total, TOKENS, torch.ones(2, 3, 4))
    assert torch.equal(total[:, 0], torch.tensor([1.0, 2, 0, 3, 0]))


def test_the_heads_gradient_is_added_with_its_factor():
    weight, gradient = nn.Parameter(torch.zeros(3, 2)), torch.arange(6.0).view(3, 2)
    factor = torch.tensor(0.5)
    assert torch.equal(add_scaled(weight, gradient, factor), gradient / 2)
    weight.grad = torch.ones(3, 2)
    assert add_scaled(weight, gradient, factor) is None
    assert torch.equal(weight.grad, 1 + gradient / 2)
    other = cast(weight, torch.bfloat16)
    assert torch.equal(add_scaled(other, gradient, factor), gradient / 2)
