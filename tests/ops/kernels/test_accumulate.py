import pytest
import torch

from dsv3.ops.accumulate import accumulate, triton_serves
from dsv3.ops.kernels.accumulate import add


@pytest.mark.parametrize("size", [0, 1, 1000, 5000])
def test_kernel(size):
    total, gradient = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    expected = total + gradient
    add(total, gradient, (256, 4))
    assert torch.equal(total, expected)


def test_any_dtype_and_layout_is_added():
    total, gradient = torch.ones(3, 4), torch.full((4, 3), 0.5, dtype=torch.bfloat16).t()
    accumulate(total, gradient)
    assert torch.equal(total, torch.full((3, 4), 1.5))


def test_who_serves():
    total = torch.ones(3, 4)
    assert "adds BF16 to FP32" in triton_serves(total, total)
    assert "contiguous" in triton_serves(total, torch.ones(4, 3, dtype=torch.bfloat16).t())
    assert "contiguous" in triton_serves(total.t(), torch.ones(4, 3, dtype=torch.bfloat16))
