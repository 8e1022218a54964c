"""The kernels of blocks, interpreted in float32: indexing, masks, edges. Their rounding is tested on a GPU."""

import pytest
import torch

from dsv3.ops.block_scaled import blocks_reference, dequantize, in_blocks, transposed_reference

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels import blocks as kernels

SHAPES = [(128, 128), (1, 1), (300, 260), (3, 130, 7), (2, 2, 64, 129)]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize(shape, power_of_two):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, scale = kernels.quantize_blocks(weight, power_of_two, torch.float32)
    expected = blocks_reference(weight, power_of_two)[1]
    torch.testing.assert_close(scale, expected, rtol=2.4e-7, atol=0)
    torch.testing.assert_close(dequantize(values, scale, torch.float32), weight, rtol=1e-6, atol=0)


def test_blocks_that_are_not_finite():
    weight = torch.randn(300, 300)
    weight[0, 0], weight[130, 5], weight[299, 299] = torch.nan, torch.inf, -torch.inf
    weight[:128, 256:] = 0
    values, scale = kernels.quantize_blocks(weight, False, torch.float32)
    assert scale.isnan().nonzero().tolist() == [[0, 0], [1, 0], [2, 2]]
    assert scale[0, 2] == 1
    assert not values.isnan().any()
    assert in_blocks(values).abs().amax((1, 3))[scale.isnan()].eq(0).all()
    twin = blocks_reference(weight)
    torch.testing.assert_close(scale, twin[1], rtol=2.4e-7, atol=0, equal_nan=True)
    assert in_blocks(twin[0].float()).abs().amax((1, 3))[scale.isnan()].eq(0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(shape):
    values, scale = blocks_reference(torch.randn(shape))
    for each in (values, values.float()):
        found = kernels.transpose_blocks(each, scale)
        expected = transposed_reference(each, scale)
        assert found[0].dtype == each.dtype
        assert torch.equal(found[0].float(), expected[0].float())
        assert torch.equal(found[1], expected[1])
