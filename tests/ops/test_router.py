import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.ops.router import add_loss, balance_loss, expert_frequency, select_experts


def by_the_loop(affinity, bias, k, n_group, topk_group, normalise, scaling):
    """Equations (13) to (16) and the group limit for one token, in plain Python: {expert: weight}."""
    biased = [a + b for a, b in zip(affinity, bias, strict=True)]
    size = len(biased) // n_group
    allowed = set(range(len(biased)))
    if topk_group < n_group:
        groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
        ranked = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
        allowed = {e for group in ranked[:topk_group] for e in group}
    chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
    total = sum(affinity[e] for e in chosen) if normalise else 1.0
    return {e: affinity[e] / total * scaling for e in chosen}


@st.composite
def routers(draw):
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    per_group = draw(st.integers(2 if n_group > 1 else 1, 6))
    topk_group = draw(st.integers(1, n_group))
    k = draw(st.integers(1, topk_group * per_group))
    low = draw(st.sampled_from([-5.0, -0.5, 0.0]))
    return n_group * per_group, k, n_group, topk_group, low, draw(st.booleans()), draw(st.integers(0, 2**31))


@settings(max_examples=150, deadline=None)
@given(routers())
def test_selection_is_that_of_a_loop_over_tokens(router):
    experts, k, n_group, topk_group, low, normalise, seed = router
    generator = torch.Generator().manual_seed(seed)
    # In float64, so that sums of two compare alike in both.
    affinity = torch.rand(5, experts, generator=generator, dtype=torch.float64)
    bias = low + torch.rand(experts, generator=generator, dtype=torch.float64)
    weight, expert = select_experts(affinity, bias, k, n_group, topk_group, normalise, 2.5)
    assert weight.shape == expert.shape == (5, k)
    for t in range(5):
        expected = by_the_loop(affinity[t].tolist(), bias.tolist(), k, n_group, topk_group, normalise, 2.5)
        assert dict(zip(expert[t].tolist(), weight[t].tolist(), strict=True)) == pytest.approx(expected)


def test_a_dropped_group_stays_out_when_all_biased_affinities_are_negative():
    affinity = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.2, 0.3]])
    bias = torch.full((6,), -2.0)
    _, expert = select_experts(affinity, bias, 3, 2, 1, True, 1.0)
    assert set(expert[0].tolist()) == {0, 1, 2}  # a mask of 0.0 would win against -1.1, -1.2, -1.3


def test_groups_are_ranked_by_their_two_best_and_weights_ignore_the_bias():
    affinity = torch.tensor([[0.9, 0.1, 0.0, 0.6, 0.5, 0.4]])
    bias = torch.zeros(6)
    weight, expert = select_experts(affinity, bias, 2, 2, 1, True, 1.0)
    assert expert[0].tolist() == [3, 4]  # 0.6 + 0.5 against 0.9 + 0.1; three would be summed alike, one would not
    bias[5] = 1.0
    weight, expert = select_experts(affinity, bias, 2, 2, 1, True, 1.0)
    assert expert[0].tolist() == [3, 5]  # ascending, whichever is the better
    torch.testing.assert_close(weight[0], torch.tensor([0.6, 0.4]))


def test_gradients_flow_through_the_weights_of_the_chosen_alone():
    affinity = torch.rand(4, 8, requires_grad=True)
    bias = torch.rand(8, requires_grad=True)
    weight, expert = select_experts(affinity, bias.detach(), 2, 1, 1, True, 2.5)
    (weight * torch.randn(4, 2)).sum().backward()
    chosen = torch.zeros(4, 8, dtype=torch.bool).scatter_(1, expert, True)
    assert (affinity.grad[~chosen] == 0).all()
    assert (affinity.grad[chosen] != 0).all()


def balance_by_the_loop(affinity, k):
    """Equations (17) to (20) for one sequence [T][E]."""
    length, experts = len(affinity), len(affinity[0])
    f, p = [0.0] * experts, [0.0] * experts
    for row in affinity:
        for e in sorted(range(experts), key=lambda e: -row[e])[:k]:
            f[e] += experts / (k * length)
        for e in range(experts):
            p[e] += row[e] / sum(row) / length
    return sum(a * b for a, b in zip(f, p, strict=True))


@pytest.mark.parametrize(
    ("sequences", "length", "experts", "k"), [(1, 1, 4, 1), (1, 9, 8, 2), (3, 5, 8, 3), (2, 7, 5, 5)]
)
def test_sequence_balance_follows_the_equations(sequences, length, experts, k):
    affinity = torch.rand(sequences * length, experts)
    by_sequence = [balance_by_the_loop(part.tolist(), k) for part in affinity.chunk(sequences)]
    assert float(balance(affinity, sequences, k)) == pytest.approx(sum(by_sequence) / sequences, rel=1e-5)


def balance(affinity, parts, k):
    return balance_loss(affinity, expert_frequency(affinity, parts, k))


def test_batch_balance_of_parts_adds_up_to_that_of_the_whole():
    """The same equations over a whole batch, of which three micro-batches each see a third and are told its f."""
    affinity = torch.rand(12, 8, requires_grad=True)
    whole = balance(affinity, 1, 3)
    assert float(whole.detach()) == pytest.approx(balance_by_the_loop(affinity.tolist(), 3), rel=1e-5)
    micro = affinity.chunk(3)
    frequency = torch.stack([expert_frequency(part, 1, 3)[0] for part in micro]).mean(0, keepdim=True)
    parts = sum(balance_loss(part, frequency) for part in micro) / 3
    torch.testing.assert_close(parts, whole)
    (expected,), (found,) = (torch.autograd.grad(loss, affinity) for loss in (whole, parts))
    torch.testing.assert_close(found, expected)
    own = sum(balance(part, 1, 3) for part in micro) / 3
    assert float((own - whole).detach().abs()) > 1e-3  # what counting in each micro-batch alone would give


def test_balance_is_1_when_even_and_larger_when_skewed():
    even = torch.eye(4).repeat(3, 1) + 0.01
    assert float(balance(even, 1, 1)) == pytest.approx(1.0)
    skewed = torch.full((12, 4), 0.1)
    skewed[:, 0] = 0.9
    assert float(balance(skewed, 1, 1)) == pytest.approx(4 * 0.9 / 1.2)
    # By sequence: each of these is skewed, though both together are not.
    halves = torch.full((2, 4), 0.1).scatter_(1, torch.tensor([[0], [1]]), 0.9)
    assert float(balance(halves, 2, 1)) > float(balance(halves, 1, 1)) + 0.5


def test_add_loss_changes_gradients_alone():
    x = torch.rand(3, requires_grad=True)
    y = add_loss(x, x.square().sum(), 0.5)
    assert torch.equal(y, x)
    (3 * y).sum().backward()
    torch.testing.assert_close(x.grad, 3 + 0.5 * 2 * x.detach())
