"""The kernels of RMSNorm, interpreted in float32."""

import pytest
import torch

from dsv3.ops.rms_norm import backward_reference, reference
from dsv3.ops.tiles import dequantize_reference, empty_tiles, rows_reference
from tests.ops.poisoned import inside

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels import rms_norm as kernels

SHAPES = [(1, 128), (1, 1), (7, 300), (13, 40), (3, 1536)]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_tiles(shape, power_of_two):
    x, weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).unsqueeze(1), torch.rand(shape[1]) + 0.5
    expected = reference(x, weight, 1e-6)
    tiles = empty_tiles(*shape, x.device, torch.float32)
    found = kernels.forward(inside(x), weight, 1e-6, tiles, power_of_two, (1024, 4))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tiles.scale, rows_reference(found, power_of_two).scale, rtol=2.4e-7, atol=0)
    assert tiles.scale.stride() == rows_reference(found).scale.stride()
    torch.testing.assert_close(dequantize_reference(tiles, torch.float32), found, rtol=1e-6, atol=0)
    assert torch.equal(kernels.forward(inside(x), weight, 1e-6), found)


@pytest.mark.parametrize("programs", [1, 3, 264])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, programs):
    x, weight = torch.randn(shape, requires_grad=True), (torch.rand(shape[1]) + 0.5).requires_grad_()
    grad = torch.randn(shape)
    expected = torch.autograd.grad(reference(x, weight, 1e-2), (x, weight), grad)
    x, weight = x.detach(), weight.detach()
    for found in (
        kernels.backward(inside(grad), inside(x), weight, 1e-2, (512, 4, 2), programs),
        backward_reference(grad, x, weight, 1e-2),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
