"""Twelve bits on the GPU equal the twin's to the bit, for BF16 and FP32."""

import pytest
import torch

from dsv3.ops.e5m6 import pack_e5m6, pack_reference, pack_triton_serves, unpack_e5m6, unpack_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("shape", [(1, 8), (300, 304), (4096, 2048)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda") * torch.logspace(-12, 3, shape[0], device="cuda").unsqueeze(1)
    x = x.to(dtype)
    if shape[0] > 1:
        x[0, 0], x[1, 1] = torch.inf, torch.nan
    assert pack_triton_serves(x) is None
    found, expected = pack_e5m6(x), pack_reference(x)
    assert torch.equal(found.packed, expected.packed)
    torch.testing.assert_close(found.scale, expected.scale, rtol=0, atol=0, equal_nan=True)
    back = unpack_e5m6(found, dtype)
    torch.testing.assert_close(back, unpack_reference(expected, dtype), rtol=0, atol=0, equal_nan=True)
