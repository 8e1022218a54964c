"""The kernels of SwiGLU on a GPU."""

import pytest
import torch

from dsv3.ops.swiglu import activation, swiglu, swiglu_backward, swiglu_tiles
from dsv3.ops.tiles import dequantize_reference, quantize_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def error(found, expected):
    """Of the whole, relative."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def poisoned(x):
    """x as a part of a matrix that holds NaN elsewhere."""
    wide = torch.full((x.shape[0] + 2, x.shape[1] + 16), torch.nan, dtype=x.dtype, device="cuda")
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(300, 2048), (1, 136)])
def test_tiles(rows, columns, weighted):
    gate_up = poisoned((torch.randn(rows, 2 * columns, device="cuda") * 3).bfloat16())
    weight = torch.rand(rows, device="cuda") if weighted else None
    assert swiglu_tiles.explain(gate_up, weight)[0] == ("triton", None)
    found = swiglu_tiles(gate_up, weight, weighted)
    act = activation(gate_up, weight)
    expected = quantize_rows(act, weighted)
    # The exponential function differs in its last bits: a scale by as much, a value by one step where it was about to round.
    if weighted:
        assert (found.scale != expected.scale).float().mean() < 1e-3
    else:
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0)
    wide = dequantize_reference(found, torch.float32)
    assert error(wide, act) < 0.04
    assert (found.values.view(torch.uint8) != expected.values.view(torch.uint8)).float().mean() < 1e-2
    assert swiglu_tiles(gate_up[:0]).scale.shape == (0, -(-columns // 128))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(300, 2048), (3, 2568)])
def test_backward(rows, columns, weighted):
    gate_up = poisoned((torch.randn(rows, 2 * columns, device="cuda") * 3).bfloat16())
    grad = torch.randn(rows, columns, device="cuda").bfloat16()
    weight = torch.rand(rows, device="cuda") if weighted else None
    found, grad_weight, act = swiglu_backward(grad, gate_up, weight)
    leaves = [each.double().requires_grad_() for each in (gate_up, weight) if each is not None]
    gate, up = leaves[0].chunk(2, dim=-1)
    exact = gate * gate.sigmoid() * up * (leaves[1].unsqueeze(1) if weighted else 1)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    assert found.dtype == act.dtype == torch.bfloat16
    assert error(found, expected[0]) < 3e-3
    assert error(act, exact.detach()) < 3e-3
    if weighted:
        assert error(grad_weight, expected[1]) < 1e-5
    else:
        assert grad_weight is None


@pytest.mark.parametrize("weighted", [False, True])
def test_training(weighted):
    shape = (100, 2048) if weighted else (2, 50, 2048)
    leaves = [(torch.randn(shape, device="cuda") * 3).bfloat16().requires_grad_()]
    leaves += [torch.rand(100, device="cuda", requires_grad=True)] if weighted else []
    assert swiglu.explain(*leaves)[0] == ("triton", None)
    out = swiglu(*leaves)
    found = torch.autograd.grad(out.float().sum(), leaves)
    wide = [each.detach().double().requires_grad_() for each in leaves]
    gate, up = wide[0].chunk(2, dim=-1)
    exact = gate * gate.sigmoid() * up * (wide[1].unsqueeze(1) if weighted else 1)
    expected = torch.autograd.grad(exact.sum(), wide)
    assert out.shape == (*shape[:-1], 1024)
    assert error(out.detach(), exact.detach()) < 3e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 3e-3
