"""Every implementation of every operation against its reference twin: values and gradients, in float32."""

import pytest
import torch

from dsv3.ops import cross_entropy
from dsv3.ops.attention import attention
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy, token_losses
from dsv3.ops.grouped_linear import grouped_linear
from dsv3.ops.operation import Operation
from dsv3.ops.permute import permute, sort_by_expert, unpermute
from dsv3.ops.rms_norm import rms_norm
from dsv3.ops.swiglu import swiglu


def fast(operation: Operation):
    """The names of all implementations but the twin, which is the last."""
    assert operation.implementations[-1].name == "reference"
    return [each.name for each in operation.implementations[:-1]]


def compare(operation, name, *args, tolerance=2e-5):
    """Holds one implementation to the reference, and the gradients of all floating-point arguments too."""
    implementation = next(each for each in operation.implementations if each.name == name)
    results = []
    for each in (implementation, operation.implementations[-1]):
        leaves = [
            a.detach().clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args
        ]
        if (reason := each.supports(*leaves)) is not None:
            pytest.skip(reason)
        out = each.run(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        wanted = [leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad]
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), wanted)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", fast(rms_norm))
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 16), (7, 1)])
def test_rms_norm(name, shape):
    compare(rms_norm, name, torch.randn(shape), torch.rand(shape[-1]) + 0.5, 1e-6)


@pytest.mark.parametrize("name", fast(rms_norm))
def test_rms_norm_uses_its_epsilon_and_stands_zeros(name):
    compare(rms_norm, name, torch.randn(4, 8) * 1e-3, torch.rand(8) + 0.5, 1e-2)
    compare(rms_norm, name, torch.zeros(2, 8), torch.ones(8), 1e-6, tolerance=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rms_norm_of_inference(dtype):
    few = next(each for each in rms_norm.implementations if each.name == "few_operations")
    for shape, size, eps in (((3, 5, 16), 1.0, 1e-6), ((7, 1), 1e-3, 1e-2), ((1, 64), 1e4, 1e-6), ((2, 8), 0.0, 1e-6)):
        args = (torch.randn(shape) * size).to(dtype), torch.rand(shape[-1]) + 0.5, eps
        assert few.supports(*args) is None
        found, expected = few.run(*args), rms_norm.implementations[-1].run(*args)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", fast(swiglu))
def test_swiglu_with_weights(name):
    compare(swiglu, name, torch.randn(9, 14) * 3, torch.rand(9))


@pytest.mark.parametrize("name", fast(swiglu))
@pytest.mark.parametrize("shape", [(1, 2), (6, 10), (2, 3, 8), (0, 4)])
def test_swiglu(name, shape):
    compare(swiglu, name, torch.randn(shape) * 3)


@pytest.mark.parametrize("name", fast(grouped_linear))
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [1], [0, 0], [4, 0, 0]], ids=str)
def test_grouped_linear_with_empty_groups_and_single_rows(name, counts):
    x, weight = torch.randn(sum(counts), 8), torch.randn(len(counts), 6, 8)
    compare(grouped_linear, name, x, weight, torch.tensor(counts))


@pytest.mark.parametrize("name", ["batched_inference", "loop_inference"])
@pytest.mark.parametrize("counts", [[3, 3, 3], [1], [4, 0, 2], [0, 0, 9], [0, 0]], ids=str)
@torch.no_grad()
def test_grouped_linear_of_inference(name, counts):
    x, weight = torch.randn(sum(counts), 8), torch.randn(len(counts), 6, 8)
    implementation = next(each for each in grouped_linear.implementations if each.name == name)
    args = x, weight, torch.tensor(counts)
    if implementation.supports(*args) is None:
        torch.testing.assert_close(implementation.run(*args), grouped_linear.implementations[-1].run(*args))
    else:
        assert name == "batched_inference"
        assert len(set(counts)) > 1 or sum(counts) == 0


@pytest.mark.parametrize("implementation", grouped_linear.implementations, ids=lambda each: each.name)
@pytest.mark.parametrize("counts", [[4, 0, 8], [4, 4, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_grouped_linear_leaves_rows_behind_the_last_group_alone(implementation, counts, training):
    used, x, weight = sum(counts), torch.randn(24, 8), torch.randn(len(counts), 6, 8)
    x[used:] = torch.nan
    leaves = x.requires_grad_(training), weight.requires_grad_(training)
    with torch.set_grad_enabled(training):
        if (reason := implementation.supports(*leaves, torch.tensor(counts))) is not None:
            pytest.skip(reason)
        out = implementation.run(*leaves, torch.tensor(counts))
    assert out.shape == (24, 6)
    rows, weights = x[:used].detach().requires_grad_(), weight.detach().requires_grad_()
    expected = grouped_linear(rows, weights, torch.tensor(counts))
    torch.testing.assert_close(out[:used], expected)
    if training:
        grad = torch.randn(24, 6)
        wanted = torch.autograd.grad(expected, (rows, weights), grad[:used])
        grad[used:] = torch.nan
        found = torch.autograd.grad(out, leaves, grad)
        torch.testing.assert_close((found[0][:used], found[1]), wanted)


@pytest.mark.parametrize("aligned", [0, 8])
def test_experts_do_the_same_with_aligned_groups(aligned):
    x, weight, expert = torch.randn(11, 8, requires_grad=True), torch.randn(5, 8, 8), routed(11, 3, 5)
    to = sort_by_expert(expert, 5, aligned=aligned)
    out = unpermute(grouped_linear(permute(x, to), weight, to.counts_E), to)
    expected = torch.einsum("tkoi,ti->to", weight[expert], x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn(11, 8)
    torch.testing.assert_close(*(torch.autograd.grad(each, x, grad)[0] for each in (out, expected)))


def test_grouped_linear_is_one_product_a_row():
    counts = [2, 0, 3]
    x, weight = torch.randn(5, 4), torch.randn(3, 6, 4)
    expert = [0, 0, 2, 2, 2]
    expected = torch.stack([weight[expert[r]] @ x[r] for r in range(5)])
    torch.testing.assert_close(grouped_linear(x, weight, torch.tensor(counts)), expected)


def routed(tokens, k, experts):
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).view(tokens, k)


def test_sort_by_expert_groups_rows_and_keeps_the_order_of_tokens():
    expert = routed(40, 3, 7)
    to = sort_by_expert(expert, 7)
    rows = [(int(expert.flatten()[a]), int(a) // 3) for a in to.assignment_R]
    assert rows == sorted(rows)
    assert to.counts_E.tolist() == [int((expert == e).sum()) for e in range(7)]
    assert torch.equal(to.assignment_R[to.row_TK.flatten()], torch.arange(120))


@pytest.mark.parametrize("name", fast(permute))
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (1, 4, 8), (9, 2, 3), (20, 8, 64)])
def test_permute(name, tokens, k, experts):
    compare(permute, name, torch.randn(tokens, 6), sort_by_expert(routed(tokens, k, experts), experts))


@pytest.mark.parametrize("name", fast(unpermute))
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (1, 4, 8), (9, 2, 3), (20, 8, 64)])
def test_unpermute(name, tokens, k, experts):
    to = sort_by_expert(routed(tokens, k, experts), experts)
    compare(unpermute, name, torch.randn(tokens * k, 6), to)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("aligned", [0, 8])
def test_rows_have_the_weights_of_their_assignments(aligned, partial):
    """And gradients go back to them; those of rows that are not real are nobody's."""
    expert, x, weight = routed(11, 3, 5), torch.randn(11, 6), torch.rand(11, 3, requires_grad=True)
    if partial:
        expert[:, 1] = -1
    to = sort_by_expert(expert, 5, aligned=aligned, some=22 if partial else None)
    weight_R = to.by_row(weight)
    real = torch.ones_like(weight_R, dtype=torch.bool) if to.real_R is None else to.real_R
    assert real.sum() == (expert >= 0).sum()
    assert (weight_R[~real] == 0).all()
    chosen = weight * (expert >= 0)
    out = unpermute(permute(x, to) * weight_R.unsqueeze(1), to)
    torch.testing.assert_close(out, x * chosen.sum(1, keepdim=True))
    grad = torch.randn(len(weight_R))
    (found,) = torch.autograd.grad(weight_R, weight, grad.masked_fill(~real, torch.nan))
    expected = torch.zeros(33).index_add(0, to.assignment_R[real], grad[real]).view(11, 3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", fast(attention))
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("length", "query", "value"), [(1, 8, 8), (7, 12, 8), (128, 8, 8), (129, 8, 12), (300, 4, 4)])
def test_attention(name, documents, length, query, value):
    q, k, v = torch.randn(2, length, 3, query), torch.randn(2, length, 3, query), torch.randn(2, length, 3, value)
    segments = torch.randint(0, 3, (2, length)).sort(dim=1).values if documents else None
    compare(attention, name, q, k, v, 0.3, segments, tolerance=1e-4)


def test_attention_is_a_weighted_sum_of_what_may_be_seen():
    q, k, v = torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 3)
    segments = torch.tensor([[0, 0, 1, 1, 1, 0]])
    found = attention(q, k, v, 0.5, segments)
    for t in range(6):
        # A number that returns is another document.
        seen = [s for s in range(t + 1) if bool((segments[0, s : t + 1] == segments[0, t]).all())]
        for head in range(2):
            scores = torch.stack([0.5 * q[0, t, head] @ k[0, s, head] for s in seen])
            torch.testing.assert_close(found[0, t, head], scores.softmax(0) @ v[0, seen, head])


@pytest.mark.parametrize("name", fast(linear_cross_entropy))
@pytest.mark.parametrize("rows_a_chunk", [1, 3, 1000])
@pytest.mark.parametrize("ignored", [0, 4, 10])
def test_linear_cross_entropy(name, rows_a_chunk, ignored, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": rows_a_chunk * 17})
    target = torch.randint(0, 17, (10,))
    target[torch.randperm(10)[:ignored]] = IGNORE
    compare(linear_cross_entropy, name, torch.randn(10, 6), torch.randn(17, 6), target, 7.0)


@pytest.mark.parametrize("name", fast(linear_cross_entropy))
def test_linear_cross_entropy_stands_large_logits(name):
    compare(linear_cross_entropy, name, torch.randn(4, 6) * 100, torch.randn(17, 6) * 10, torch.randint(0, 17, (4,)), 4.0, tolerance=1e-2)  # fmt: skip


def test_token_losses_sum_to_the_cross_entropy(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": 3 * 17})
    hidden, weight, target = torch.randn(10, 6), torch.randn(17, 6), torch.randint(0, 17, (10,))
    target[3] = IGNORE
    losses = token_losses(hidden, weight, target)
    assert losses[3] == 0
    torch.testing.assert_close(losses.sum() / 9, linear_cross_entropy(hidden, weight, target, 9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_have_the_dtype_of_their_tensors(dtype):
    """Weights stay in FP32 under BF16 activations, and so do their gradients."""
    x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    gain, stack = torch.rand(8, requires_grad=True), torch.randn(2, 6, 8, requires_grad=True)
    head = torch.randn(9, 3, requires_grad=True)
    y = swiglu(grouped_linear(rms_norm(x, gain, 1e-6), stack, torch.tensor([2, 3])))
    assert y.dtype == dtype
    loss = linear_cross_entropy(y, head, torch.randint(0, 9, (5,)), 5.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == dtype
    assert {gain.grad.dtype, stack.grad.dtype, head.grad.dtype} == {torch.float32}
