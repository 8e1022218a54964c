"""The router's product: the definition, and what the one on tensor cores is made of."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.ops.linear_fp32 import in_three, linear_fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_a_linear_layer_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(12, 40, generator=generator).to(dtype), torch.randn(6, 40, generator=generator)
    grad = torch.randn(12, 6, generator=generator)
    ours, theirs = [[each.clone().requires_grad_() for each in (x, weight)] for _ in range(2)]
    out = linear_fp32(*ours)
    out.backward(grad)
    expected = F.linear(theirs[0].float(), theirs[1])
    expected.backward(grad)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == a.dtype
        torch.testing.assert_close(a.grad, b.grad)


def test_three_in_bf16_are_one_in_fp32():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 10_000)
    high, middle, low = in_three(x)
    assert torch.equal(high, x.bfloat16())
    found = high.double() + middle.double() + low.double()
    assert ((found - x.double()).abs() <= x.double().abs() * 2**-24).all()
    assert not any(each.isnan().any() for each in in_three(torch.zeros(3)))
