"""The router's kernels, interpreted, against their twin."""

import pytest
import torch

from dsv3.ops.router import Selected, select

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "n_group", "topk_group"),
    [(5, 256, 8, 8, 4), (3, 64, 6, 1, 1), (1, 8, 2, 1, 1), (7, 72, 4, 8, 3), (4, 72, 3, 3, 1), (2, 9, 9, 1, 1), (3, 16, 4, 4, 4), (2, 8, 4, 4, 2)],
)  # fmt: skip
def test_selection_weights_and_gradient(tokens, experts, k, n_group, topk_group, normalise):
    affinity = torch.rand(tokens, experts, requires_grad=True)
    bias, grad = torch.randn(experts) - 2, torch.randn(tokens, k)
    results = []
    for function in (Selected.apply, select):
        weight, expert = function(affinity, bias, k, n_group, topk_group, normalise, 2.5)
        results.append((weight.detach(), expert, *torch.autograd.grad(weight, affinity, grad)))
    (weight, expert, gradient), (wanted_weight, wanted_expert, wanted_gradient) = results
    assert torch.equal(expert, wanted_expert)
    torch.testing.assert_close(weight, wanted_weight, atol=0, rtol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient)


def test_ties_go_to_the_lower_number():
    affinity, bias = torch.full((3, 16), 0.5), torch.zeros(16)
    bias[12:] = 0.25
    _, expert = Selected.apply(affinity, bias, 6, 4, 2, True, 1.0)
    assert expert.tolist() == [[0, 1, 12, 13, 14, 15]] * 3


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_group", [1, 4])
def test_experts_differ_whatever_a_token_holds(value, n_group):
    affinity = torch.rand(3, 16)
    affinity[0] = value
    affinity[1, ::2] = value
    weight, expert = Selected.apply(affinity, torch.zeros(16), 8, n_group, max(1, n_group // 2), True, 1.0)
    assert (expert.diff() > 0).all()
    assert ((expert >= 0) & (expert < 16)).all()
    assert weight[2].isfinite().all()


def test_no_tokens():
    weight, expert = Selected.apply(torch.empty(0, 8), torch.zeros(8), 2, 1, 1, True, 1.0)
    assert weight.shape == expert.shape == (0, 2)


def test_a_transposed_tensor_of_affinities():
    affinity, bias = torch.rand(8, 5).t(), torch.zeros(8)
    for found, expected in zip(Selected.apply(affinity, bias, 3, 1, 1, True, 1.0), select(affinity, bias, 3, 1, 1, True, 1.0), strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected)
