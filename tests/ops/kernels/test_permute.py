"""Kernels of the sort, of permute and of unpermute, interpreted in float32, against their twins."""

import pytest
import torch

from dsv3.ops.permute import (
    Copied,
    Summed,
    aligned_rows,
    counting_sort,
    permute_reference,
    sort_reference,
    unpermute_reference,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")

SIZES = [(1, 1, 1, 6), (1, 4, 8, 256), (9, 2, 3, 300), (20, 6, 24, 130), (5, 3, 40, 1)]
"""(tokens, experts a token, experts, columns)."""


def routed(tokens, k, experts):
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).view(tokens, k)


@pytest.mark.parametrize("aligned", [0, 1, 8, 128])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (1, 2, 40), (150, 3, 7), (300, 2, 5), (0, 2, 4)])
def test_the_counting_sort_is_the_stable_sort(tokens, k, experts, aligned):
    expert = routed(tokens, k, experts) if tokens else torch.empty(0, k, dtype=torch.int64)
    found, expected = (sort(expert, experts, aligned=aligned) for sort in (counting_sort, sort_reference))
    for name in ("assignment_R", "row_TK", "counts_E", "real_R"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None and theirs is None) or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), name


def test_more_parts_than_a_block_takes(monkeypatch):
    from dsv3.ops.kernels import sort

    monkeypatch.setattr(sort, "PARTS", 2)
    expert = routed(300, 2, 5)
    assert torch.equal(counting_sort(expert, 5).assignment_R, sort_reference(expert, 5).assignment_R)


def test_groups_are_aligned_and_their_rows_are_in_order():
    expert = routed(50, 3, 9)
    expert[expert == 4] = 5  # an expert without rows
    to = counting_sort(expert, 9, aligned=16)
    assert len(to.assignment_R) == len(to.real_R) == aligned_rows(150, 9, 16) == 160 + 9 * 16
    assert to.counts_E[4] == 0
    assert (to.counts_E % 16 == 0).all()
    start = 0
    for e, count in enumerate(to.counts_E.tolist()):
        rows = slice(start, start + count)
        assert to.assignment_R[rows][to.real_R[rows]].tolist() == [a for a in range(150) if expert.flatten()[a] == e]
        start += count
    assert not to.real_R[start:].any()


def gradients(out, grad, *leaves):
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("aligned", [0, 8])
@pytest.mark.parametrize(("tokens", "k", "experts", "columns"), SIZES)
def test_permute(tokens, k, experts, columns, aligned):
    to = sort_reference(routed(tokens, k, experts), experts, aligned=aligned)
    real = torch.ones(len(to.assignment_R), dtype=torch.bool) if to.real_R is None else to.real_R
    x = torch.randn(tokens, columns, requires_grad=True)
    grad = torch.randn(len(real), columns)
    expected = permute_reference(x, to)
    _, expected_grad = gradients(expected, grad.masked_fill(~real[:, None], 0), x)
    found, found_grad = gradients(Copied.apply(x, to), grad.masked_fill(~real[:, None], torch.nan), x)
    assert torch.equal(found, expected.masked_fill(~real[:, None], 0))
    torch.testing.assert_close(found_grad, expected_grad)


@pytest.mark.parametrize("aligned", [0, 8])
@pytest.mark.parametrize(("tokens", "k", "experts", "columns"), SIZES)
def test_unpermute(tokens, k, experts, columns, aligned):
    to = sort_reference(routed(tokens, k, experts), experts, aligned=aligned)
    rows = torch.randn(len(to.assignment_R), columns)
    if to.real_R is not None:
        rows[~to.real_R] = torch.nan
    rows.requires_grad_()
    weight, grad = torch.rand(tokens, k, requires_grad=True), torch.randn(tokens, columns)
    expected = gradients(unpermute_reference(rows, weight, to), grad, rows, weight)
    for found, wanted in zip(gradients(Summed.apply(rows, weight, to), grad, rows, weight), expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted)


def test_tensors_with_strides():
    to = sort_reference(routed(6, 2, 4), 4)
    rows, weight = torch.randn(5, 12).t(), torch.rand(2, 6).t()
    torch.testing.assert_close(Summed.apply(rows, weight, to), unpermute_reference(rows, weight, to))
    assert torch.equal(Copied.apply(rows[:6], to), permute_reference(rows[:6], to))
