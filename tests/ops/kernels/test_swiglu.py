"""The kernels of SwiGLU, interpreted in float32."""

import pytest
import torch

from dsv3.ops.swiglu import activation, backward_reference, tiles_reference
from dsv3.ops.tiles import dequantize_reference, empty_tiles, rows_reference
from tests.ops.poisoned import inside

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels import swiglu as kernels

SHAPES = [(1, 128), (1, 1), (40, 130), (5, 300), (0, 128)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_tiles(shape, weighted):
    gate_up, weight = torch.randn(shape[0], 2 * shape[1]) * 4, torch.rand(shape[0]) if weighted else None
    expected = activation(gate_up, weight)
    tiles = empty_tiles(*shape, gate_up.device, torch.float32)
    kernels.quantise(inside(gate_up), weight, tiles, weighted)
    torch.testing.assert_close(tiles.scale, rows_reference(expected, weighted).scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(dequantize_reference(tiles, torch.float32), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(kernels.forward(inside(gate_up), weight, (128, 4)), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, weighted):
    grad, gate_up = torch.randn(shape), (torch.randn(shape[0], 2 * shape[1]) * 4).requires_grad_()
    weight = torch.rand(shape[0]).requires_grad_() if weighted else None
    act = activation(gate_up, weight)
    expected = torch.autograd.grad(act, (gate_up, weight) if weighted else (gate_up,), grad)
    gate_up, weight = gate_up.detach(), None if weight is None else weight.detach()
    for found in (
        kernels.backward(inside(grad), inside(gate_up), weight, config=(128, 4)),
        backward_reference(grad, gate_up, weight),
    ):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[2], act.detach(), rtol=1e-5, atol=1e-30)
        if weighted:
            torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
        else:
            assert found[1] is None
    assert kernels.backward(grad, gate_up, None, with_act=False)[2] is None


def test_extremes():
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    found = kernels.backward(torch.ones(1, 5), gate_up, None)
    expected = backward_reference(torch.ones(1, 5), gate_up)
    torch.testing.assert_close((found[0], found[2]), (expected[0], expected[2]), rtol=1e-6, atol=1e-30)


def test_infinities_mark_their_tile():
    gate_up = torch.ones(2, 512)
    gate_up[1, 3] = torch.inf
    tiles = empty_tiles(2, 256, gate_up.device, torch.float32)
    kernels.quantise(gate_up, None, tiles, False)
    assert tiles.scale.isnan().tolist() == tiles_reference(gate_up).scale.isnan().tolist()
    assert tiles.scale.isnan().tolist() == [[False, False], [True, False]]
    assert tiles.values[1, :128].eq(0).all()
