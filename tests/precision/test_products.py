import pytest
import torch

from dsv3.ops.gemm_fp8 import gemm_fp8_columns
from dsv3.ops.tiles import quantize_columns
from dsv3.precision.products import weight_gradients


def matrix(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[24], [8, 16]])
def test_gradients_of_layers_that_read_the_same_are_added_to_their_sums(sizes):
    grad, x = quantize_columns(matrix(256, sum(sizes), 0)), quantize_columns(matrix(256, 40, 1))
    whole = gemm_fp8_columns(grad, x)
    first = weight_gradients(grad, x, sizes, [None] * len(sizes))
    assert torch.equal(torch.cat(list(first)), whole)
    sums = [matrix(size, 40, 2) for size in sizes]
    before = torch.cat(sums)
    found = weight_gradients(grad, x, sizes, sums)
    assert all(a is b for a, b in zip(found, sums, strict=True))
    torch.testing.assert_close(torch.cat(sums), before + whole)
