"""The router's product on tensor cores: their sums keep a few bits less than FP32's units, and many more than BF16."""

import pytest
import torch

from dsv3.ops.linear_fp32 import Reference, linear_fp32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("tokens", "inner", "experts"), [(4096, 7168, 256), (100, 264, 8), (1, 2048, 64)])
def test_nearly_as_near_as_fp32(tokens, inner, experts):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, inner, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(experts, inner, device="cuda", generator=generator) * 0.02
    grad = torch.randn(tokens, experts, device="cuda", generator=generator)
    results = []
    for run in (linear_fp32, Reference.apply):
        leaves = [each.clone().requires_grad_() for each in (x, weight)]
        out = run(*leaves)
        out.backward(grad)
        results.append((out.detach(), leaves[1].grad, leaves[0].grad))
    exact = (x.double() @ weight.double().t(), grad.double().t() @ x.double(), grad.double() @ weight.double())
    assert dict(linear_fp32.explain(x.requires_grad_(), weight))["bf16_in_three"] is None
    for found, plain, best in zip(*results, exact, strict=True):
        assert found.dtype == plain.dtype
        error, rounding = ((each.double() - best).norm() / best.norm() for each in (found, plain))
        assert error < 2e-5 + rounding
