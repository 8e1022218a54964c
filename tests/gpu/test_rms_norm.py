"""The kernels of RMSNorm on a GPU."""

import pytest
import torch

from dsv3.ops.rms_norm import reference, rms_norm, rms_norm_backward, rms_norm_tiles
from dsv3.ops.tiles import rows_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def error(found, expected):
    """Of the whole, relative."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("rows", "columns"), [(37, 7168), (1, 1536), (300, 576)])
def test_tiles_are_those_of_the_norm(rows, columns):
    wide = torch.full((rows, columns + 16), torch.nan, dtype=torch.bfloat16, device="cuda")
    x, weight = wide[:, :columns], torch.rand(columns, device="cuda") + 0.5
    x.copy_(torch.randn(rows, columns, device="cuda") * torch.logspace(-3, 3, rows, device="cuda").unsqueeze(1))
    assert rms_norm_tiles.explain(x, weight, 1e-6)[0] == ("triton", None)
    normed, tiles = rms_norm_tiles(x, weight, 1e-6, columns == 576)
    expected = reference(x, weight, 1e-6)
    torch.testing.assert_close(normed, expected, rtol=2**-7, atol=0)
    assert (normed != expected).float().mean() < 1e-2
    twin = rows_reference(normed, columns == 576)
    assert torch.equal(tiles.scale, twin.scale)
    assert torch.equal(tiles.values.view(torch.uint8), twin.values.view(torch.uint8))


@pytest.mark.parametrize(("rows", "columns"), [(1000, 7168), (1, 1536), (300, 512)])
def test_training(rows, columns):
    x = torch.randn(1, rows, columns, device="cuda").bfloat16().requires_grad_()
    weight = (torch.rand(columns, device="cuda") + 0.5).requires_grad_()
    grad = torch.randn(rows, columns, device="cuda").bfloat16().unsqueeze(0)
    assert next(name for name, reason in rms_norm.explain(x, weight, 1e-6) if reason is None) == "triton"
    out = rms_norm(x, weight, 1e-6)
    found = torch.autograd.grad(out, (x, weight), grad)
    again = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), grad)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * wide_weight
    expected = torch.autograd.grad(norm, (wide, wide_weight), grad.double())
    assert error(out.detach(), norm.detach()) < 3e-3
    assert error(found[0], expected[0]) < 3e-3
    assert error(found[1], expected[1]) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    direct = rms_norm_backward(grad[0], x.detach()[0], weight.detach(), 1e-6)
    assert torch.equal(direct[0], found[0][0])
    assert torch.equal(direct[1], found[1])
