"""Cross-entropy on a GPU, in place of BF16 logits, against a twin in FP32."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.ops import cross_entropy
from dsv3.ops.cross_entropy import (
    IGNORE,
    InPlace,
    linear_cross_entropy,
    reference,
    token_losses,
    token_losses_reference,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("rows", "vocabulary"), [(300, 129_280), (77, 50_257), (5, 100)])
def test_losses_and_the_gradient_in_place_of_the_logits(rows, vocabulary):
    from dsv3.ops.kernels.cross_entropy import losses

    logits = (torch.randn(rows, vocabulary, device="cuda") * 4).bfloat16()
    target = torch.randint(vocabulary, (rows,), device="cuda")
    target[::7] = IGNORE
    wide = logits.float().requires_grad_()
    wanted = F.cross_entropy(wide, target, ignore_index=IGNORE, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum() * 1e-3, wide)
    alone = losses(logits, target, IGNORE, None)
    found = losses(logits, target, IGNORE, 1e-3)
    torch.testing.assert_close(alone, found, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, wanted.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits.float(), gradient, atol=1e-9, rtol=2**-8)
    assert (logits[target == IGNORE] == 0).all()


def test_more_elements_than_32_bits_count():
    """17,000 rows of 129,280 logits pass 2^31."""
    from dsv3.ops.kernels.cross_entropy import losses

    logits = torch.zeros(17_000, 129_280, device="cuda", dtype=torch.bfloat16)
    target = torch.full((17_000,), IGNORE, device="cuda")
    target[-1] = 129_279
    logits[-1, -1] = 10.0
    found = losses(logits, target, IGNORE, 1.0)
    wanted = F.cross_entropy(torch.zeros(1, 129_280, device="cuda").index_fill_(1, target[-1:], 10.0), target[-1:])
    torch.testing.assert_close(found[-1], wanted, atol=2e-5, rtol=1e-5)
    assert float(logits[-1, -1]) == pytest.approx(float(torch.exp(-wanted)) - 1, rel=1e-2)
    assert (logits[:-1, -1] == 0).all()


@pytest.mark.parametrize("rows_a_chunk", [96, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_cross_entropy(rows_a_chunk, dtype, monkeypatch):
    """Gradients in BF16 within what BF16 logits and their rounded gradient cost; in FP32 (without TF32) exactly."""
    vocabulary = 4096
    monkeypatch.setattr(cross_entropy, "IN_PLACE_ELEMENTS", rows_a_chunk * vocabulary)
    hidden = torch.randn(250, 512, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 512, device="cuda") * 512**-0.5).requires_grad_()
    target = torch.randint(vocabulary, (250,), device="cuda")
    target[::5] = IGNORE
    assert linear_cross_entropy.explain(hidden, weight, target, 200.0)[0] == ("in_place", None)
    loss = InPlace.apply(hidden, weight, target, 200.0)
    found = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    rounded = weight.detach().to(dtype).float().requires_grad_()
    wide = hidden.detach().float().requires_grad_()
    loss = reference(wide, rounded, target, 200.0)
    wanted = (loss.detach(), *torch.autograd.grad(loss, (wide, rounded)))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert [each.dtype for each in found] == [torch.float32, dtype, torch.float32]
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < limit
    each = token_losses(hidden.detach(), weight.detach(), target)
    torch.testing.assert_close(each.sum() / 200, found[0], atol=1e-3, rtol=1e-3)
    # Products of other sizes may be summed in another order, and BF16 logits be rounded the other way.
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        each, token_losses_reference(hidden.detach(), weight.detach(), target), atol=limit, rtol=0
    )
