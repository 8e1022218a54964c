"""The kernels of blocks on a GPU: their reference twins, bit for bit."""

import pytest
import torch

from dsv3.ops.block_scaled import (
    blocks_reference,
    quantize_blocks,
    transpose_blocks,
    transposed_reference,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 300, 260), (512, 1024)])
def test_blocks(shape, dtype):
    weight = torch.randn(shape, device="cuda") * torch.logspace(-30, 10, shape[-1], device="cuda")
    weight[..., :2, 0], weight[..., -1, -1], weight[..., 128:256, :128] = -0.0, torch.nan, 0
    weight[..., 3, 130] = torch.inf
    weight = weight.to(dtype)
    assert quantize_blocks.explain(weight)[0] == transpose_blocks.explain(weight, None)[0] == ("triton", None)
    for power_of_two in (False, True):
        values, scale = quantize_blocks(weight, power_of_two)
        expected, expected_scale = blocks_reference(weight, power_of_two)
        assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    turned, turned_scale = transpose_blocks(values, scale)
    expected, expected_scale = transposed_reference(values, scale)
    assert torch.equal(turned.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(turned_scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
