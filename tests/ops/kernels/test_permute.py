"""Kernels of the sort, of permute and of unpermute, interpreted in float32, against their twins."""

import pytest
import torch

from dsv3.ops.permute import (
    Copied,
    Sum,
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


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("aligned", [0, 8])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 2, 40), (150, 3, 7), (0, 2, 4)])
def test_the_counting_sort_of_some_is_the_stable_sort(tokens, k, experts, aligned, bounded):
    expert = routed(tokens, k, experts) if tokens else torch.empty(0, k, dtype=torch.int64)
    expert[torch.rand(expert.shape) < 0.4] = -1
    rows = expert.numel() if bounded else int((expert >= 0).sum())
    options = {"aligned": aligned, "some": rows, "bounded": bounded}
    found, expected = (sort(expert, experts, **options) for sort in (counting_sort, sort_reference))
    for name in ("assignment_R", "row_TK", "counts_E", "real_R"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None and theirs is None) or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), name
    assert found.partial


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


def sorted_rows(tokens, k, experts, aligned, partial):
    """Of all assignments, or of those that are left when every third has no row."""
    expert = routed(tokens, k, experts)
    if not partial:
        return sort_reference(expert, experts, aligned=aligned)
    expert.view(-1)[::3] = -1
    return sort_reference(expert, experts, aligned=aligned, some=int((expert >= 0).sum()))


def test_assignments_without_an_expert_have_no_row():
    to = sort_reference(torch.tensor([[2, -1], [0, 2], [-1, -1]]), 3, some=3)
    assert to.assignment_R.tolist() == [2, 0, 3]
    assert to.row_TK.tolist() == [[1, -1], [0, 2], [-1, -1]]
    assert to.counts_E.tolist() == [1, 0, 2]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("aligned", [0, 8])
@pytest.mark.parametrize(("tokens", "k", "experts", "columns"), SIZES[1:])
def test_permute(tokens, k, experts, columns, aligned, partial):
    to = sorted_rows(tokens, k, experts, aligned, partial)
    real = torch.ones(len(to.assignment_R), dtype=torch.bool) if to.real_R is None else to.real_R
    x = torch.randn(tokens, columns, requires_grad=True)
    grad = torch.randn(len(real), columns)
    expected = permute_reference(x, to)
    _, expected_grad = gradients(expected, grad.masked_fill(~real[:, None], 0), x)
    found, found_grad = gradients(Copied.apply(x, to), grad.masked_fill(~real[:, None], torch.nan), x)
    assert torch.equal(found, expected.masked_fill(~real[:, None], 0))
    torch.testing.assert_close(found_grad, expected_grad)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("aligned", [0, 8])
@pytest.mark.parametrize(("tokens", "k", "experts", "columns"), SIZES[1:])
def test_unpermute(tokens, k, experts, columns, aligned, partial):
    to = sorted_rows(tokens, k, experts, aligned, partial)
    rows = torch.randn(len(to.assignment_R), columns)
    if to.real_R is not None:
        rows[~to.real_R] = torch.nan
    rows.requires_grad_()
    grad = torch.randn(tokens, columns)
    expected = gradients(unpermute_reference(rows, to), grad, rows)
    for form in (Summed, Sum):
        for found, wanted in zip(gradients(form.apply(rows, to), grad, rows), expected, strict=True):
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted)


def test_tensors_with_strides():
    to = sort_reference(routed(6, 2, 4), 4)
    rows = torch.randn(5, 12).t()
    torch.testing.assert_close(Summed.apply(rows, to), unpermute_reference(rows, to))
    assert torch.equal(Copied.apply(rows[:6], to), permute_reference(rows[:6], to))
