"""A gradient in BF16 added to its sum in FP32, to the bit as torch adds them."""

import pytest
import torch

from dsv3.ops.accumulate import accumulate, triton_serves

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("shape", [(1,), (1000,), (3, 129, 257), (2**31 + 4097,)])
def test_kernel(shape):
    total = torch.randn(shape, device="cuda")
    gradient = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    expected = total.clone().add_(gradient)
    assert triton_serves(total, gradient) is None
    accumulate(total, gradient)
    assert torch.equal(total, expected)
