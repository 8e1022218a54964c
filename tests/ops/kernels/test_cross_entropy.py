"""The kernel of cross-entropy, interpreted in float32, and what is built on it, against their twins."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.ops import cross_entropy
from dsv3.ops.cross_entropy import IGNORE, InPlace, reference, token_losses_in_place, token_losses_reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


def expected(logits, target, scale):
    leaf = logits.clone().requires_grad_()
    losses = F.cross_entropy(leaf, target, ignore_index=IGNORE, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses.sum() * scale, leaf)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 17), (3, 64), (4, 1000), (2, 40_000)])
def test_losses_and_the_gradient_in_place_of_the_logits(rows, vocabulary):
    from dsv3.ops.kernels.cross_entropy import losses

    logits, target = torch.randn(rows, vocabulary) * 5, torch.randint(vocabulary, (rows,))
    target[rows // 2 :: 3] = IGNORE
    wanted, wanted_gradient = expected(logits, target, 0.3)
    before = logits.clone()
    torch.testing.assert_close(losses(logits, target, IGNORE, None), wanted)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses(logits, target, IGNORE, 0.3), wanted)
    torch.testing.assert_close(logits, wanted_gradient, atol=1e-6, rtol=1e-4)


def test_rows_stand_large_logits_minus_infinity_and_nan():
    from dsv3.ops.kernels.cross_entropy import losses

    logits = torch.randn(5, 300)
    logits[0] *= 1e4
    logits[1, 40:] = -torch.inf
    logits[2, 7] = torch.nan
    logits[3] = torch.nan
    target = torch.tensor([3, 11, 0, IGNORE, 299])
    wanted, gradient = expected(logits, target, 1.0)
    found = losses(logits, target, IGNORE, 1.0)
    assert found[2].isnan()
    assert logits[2].isnan().all()
    assert (logits[3] == 0).all()
    good = [0, 1, 3, 4]
    torch.testing.assert_close(found[good], wanted[good])
    torch.testing.assert_close(logits[[0, 1, 4]], gradient[[0, 1, 4]], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("target", [17, -1])
def test_a_target_outside_the_vocabulary_gives_nan(target):
    from dsv3.ops.kernels.cross_entropy import losses

    assert losses(torch.randn(1, 17), torch.tensor([target]), IGNORE, 1.0).isnan().all()


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 1000])
@pytest.mark.parametrize("ignored", [0, 4, 10])
def test_linear_cross_entropy(rows_a_chunk, ignored, monkeypatch):
    monkeypatch.setattr(cross_entropy, "IN_PLACE_ELEMENTS", rows_a_chunk * 17)
    target = torch.randint(0, 17, (10,))
    target[torch.randperm(10)[:ignored]] = IGNORE
    hidden, weight = torch.randn(6, 10).t().requires_grad_(), torch.randn(17, 6, requires_grad=True)
    results = []
    for function in (InPlace.apply, reference):
        loss = function(hidden, weight, target, 7.0)
        results.append((loss.detach(), *torch.autograd.grad(loss * 3, (hidden, weight))))
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_token_losses(monkeypatch):
    monkeypatch.setattr(cross_entropy, "IN_PLACE_ELEMENTS", 3 * 17)
    hidden, weight, target = torch.randn(10, 6), torch.randn(17, 6), torch.randint(0, 17, (10,))
    target[3] = IGNORE
    found = token_losses_in_place(hidden, weight, target)
    torch.testing.assert_close(found, token_losses_reference(hidden, weight, target))


def test_no_positions():
    hidden, weight = torch.empty(0, 6, requires_grad=True), torch.randn(17, 6, requires_grad=True)
    loss = InPlace.apply(hidden, weight, torch.empty(0, dtype=torch.int64), 1.0)
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()
