"""The router on a GPU against its twin there."""

import pytest
import torch

from dsv3.ops.router import Selected, select, select_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def without_ties(tokens, experts, n_group):
    """Affinities and a bias, multiples of 2^-20. By what remains of them after division by 2 E, no two sums of both are
    alike, and no two groups' sums of two are."""
    number = torch.arange(experts, device="cuda")
    group, within = number // (experts // n_group), number % (experts // n_group)
    affinity = torch.randint(2048, (tokens, experts), device="cuda") * 2 * experts + 1
    bias = torch.randint(-2048, 2048, (experts,), device="cuda") * 2 * experts + group + 2 * n_group * within
    return affinity / 2**20, bias / 2**20


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "n_group", "topk_group", "normalise"),
    [(16_384, 256, 8, 8, 4, True), (1001, 64, 6, 1, 1, True), (1001, 72, 8, 8, 3, False), (1, 8, 2, 1, 1, True)],
)
def test_selection_weights_and_gradient(tokens, experts, k, n_group, topk_group, normalise):
    affinity, bias = without_ties(tokens, experts, n_group)
    affinity.requires_grad_()
    arguments = affinity, bias, k, n_group, topk_group, normalise, 2.5
    assert select_experts.explain(*arguments)[0] == ("triton", None)
    grad, results = torch.randn(tokens, k, device="cuda"), []
    for function in (Selected.apply, select):
        weight, expert = function(*arguments)
        results.append((weight.detach(), expert, *torch.autograd.grad(weight, affinity, grad)))
    (weight, expert, gradient), (wanted_weight, wanted_expert, wanted_gradient) = results
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight, wanted_weight, atol=0, rtol=2e-6)
    assert torch.equal(expert, wanted_expert)


def test_experts_differ_whatever_a_token_holds():
    affinity = torch.rand(40, 256, device="cuda")
    affinity[::2] = torch.nan
    affinity[1, ::2] = torch.inf
    _, expert = Selected.apply(affinity, torch.zeros(256, device="cuda"), 8, 8, 4, True, 2.5)
    assert (expert.diff() > 0).all()
    assert ((expert >= 0) & (expert < 256)).all()
