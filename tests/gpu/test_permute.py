"""The sort, permute and unpermute on a GPU against their twins there."""

import pytest
import torch

from dsv3.ops.grouped_linear import grouped_linear
from dsv3.ops.permute import (
    Copied,
    Summed,
    counting_sort,
    permute,
    permute_reference,
    sort_by_expert,
    sort_reference,
    unpermute,
    unpermute_reference,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def routed(tokens, k, experts):
    return torch.rand(tokens, experts, device="cuda").topk(k).indices.sort(dim=-1).values


@pytest.mark.parametrize("aligned", [0, 128])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(4096, 8, 256), (40_000, 8, 256), (5001, 6, 72), (1, 8, 8)])
def test_the_counting_sort_is_the_stable_sort_and_waits_for_nothing(tokens, k, experts, aligned):
    expert = routed(tokens, k, experts)
    counting_sort(expert, experts, aligned=aligned)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sort_by_expert(expert, experts, aligned=aligned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for expected in (sort_reference(each, experts, aligned=aligned) for each in (expert, expert.cpu())):
        for name in ("assignment_R", "row_TK", "counts_E", "real_R"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours.to(theirs.device), theirs), name


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "columns", "aligned"),
    [(4096, 8, 8, 7168, 0), (1000, 6, 64, 2048, 128), (333, 8, 8, 1001, 0), (1, 8, 8, 7168, 128)],
)
def test_both_ways(tokens, k, experts, columns, aligned):
    expert = routed(tokens, k, experts)
    expert[expert == 1] = 0  # an expert without rows
    to = sort_by_expert(expert, experts, aligned=aligned)
    real = torch.ones(len(to.assignment_R), dtype=torch.bool, device="cuda") if to.real_R is None else to.real_R
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert permute.explain(x, to)[0] == ("triton", None)
    rows = Copied.apply(x, to)
    assert torch.equal(rows, permute_reference(x, to).masked_fill(~real[:, None], 0))
    grad = torch.randn_like(rows)
    (found,) = torch.autograd.grad(rows, x, grad.masked_fill(~real[:, None], torch.nan))
    expected = grad.double()[to.row_TK].sum(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=2**-8)

    rows = torch.randn_like(rows).masked_fill(~real[:, None], torch.nan).requires_grad_()
    assert unpermute.explain(rows, to)[0] == ("triton", None)
    grad = torch.randn_like(x)
    results = []
    for function in (Summed.apply, unpermute_reference):
        out = function(rows, to)
        results.append((out.detach(), *torch.autograd.grad(out, rows, grad)))
    (out, grad_rows), (wanted, wanted_rows) = results
    torch.testing.assert_close(out, wanted, atol=1e-3, rtol=2**-7)
    torch.testing.assert_close(grad_rows[real], wanted_rows[real], atol=1e-3, rtol=2**-7)
    assert (grad_rows[~real] == 0).all()
    weight, grad = torch.rand(tokens, k, device="cuda", requires_grad=True), torch.randn(len(real), device="cuda")
    weight_R = to.by_row(weight)
    assert torch.equal(weight_R[real], weight.flatten()[to.assignment_R[real]])
    assert (weight_R[~real] == 0).all()
    (found,) = torch.autograd.grad(weight_R, weight, grad.masked_fill(~real, torch.nan))
    assert torch.equal(found, grad[to.row_TK])


def test_experts_do_the_same_with_aligned_groups():
    """Rows behind the last group stay uninitialised in between, and reach nobody."""
    expert, weight = routed(200, 4, 8), torch.rand(200, 4, device="cuda")
    expert[expert == 1] = 0
    x, stack = torch.randn(200, 64, device="cuda"), torch.randn(8, 64, 64, device="cuda") / 8
    grad, results = torch.randn(200, 64, device="cuda"), []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [each.to(torch.bfloat16).to(dtype).requires_grad_() for each in (x, stack)]
        if dtype == torch.bfloat16:
            to = sort_by_expert(expert, 8, aligned=128)
            rows = permute(leaves[0], to) * to.by_row(weight).unsqueeze(1).to(dtype)
            out = unpermute(grouped_linear(rows, leaves[1], to.counts_E), to)
        else:
            out = torch.einsum("tk,tkoi,ti->to", weight, leaves[1][expert], leaves[0])
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))))
    for found, expected in zip(*results, strict=True):
        assert float((found.float() - expected).norm() / expected.norm()) < 2e-2


def test_more_elements_than_32_bits_count():
    """300,000 tokens of 7,168 elements pass 2^31."""
    tokens = 300_000
    expert = routed(tokens, 1, 4)
    to = sort_by_expert(expert, 4)
    x = torch.empty(tokens, 7168, device="cuda", dtype=torch.bfloat16)
    x.copy_(torch.arange(tokens, device="cuda").remainder(251)[:, None])
    rows = permute(x, to)
    assert torch.equal(rows[:, -1].float(), to.token_R.remainder(251).float())
    back = unpermute(rows, to)
    assert torch.equal(back[-5:], x[-5:])
    assert torch.equal(back[:, 0], x[:, 0])
