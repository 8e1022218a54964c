"""Heads in BF16 on the GPU against the twin: rotations within one rounding, copies exact, sums over heads within one."""

import pytest
import torch

from dsv3.ops.rotary import KeysAndValues, Rotate, keys_reference, rotate_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BATCH, TOKENS, HEADS, CONTENT, ROTARY, VALUE = 2, 300, 16, 128, 64, 128


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def test_queries() -> None:
    turn = torch.polar(
        torch.ones(1, TOKENS, ROTARY // 2, device="cuda"), torch.randn(1, TOKENS, ROTARY // 2, device="cuda")
    )
    x, grad = (
        random(BATCH, TOKENS, HEADS, CONTENT + ROTARY).requires_grad_(),
        random(BATCH, HEADS, TOKENS, CONTENT + ROTARY),
    )
    grad = grad.transpose(1, 2)
    found, expected = Rotate.apply(x, turn), rotate_reference(x, turn)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
    assert torch.equal(found[..., :CONTENT], expected[..., :CONTENT])
    for a, b in zip(torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)


def test_keys_and_values() -> None:
    kv, key = (
        random(BATCH, TOKENS, HEADS, CONTENT + VALUE).requires_grad_(),
        random(BATCH, TOKENS, ROTARY).requires_grad_(),
    )
    grads = [random(BATCH, HEADS, TOKENS, size).transpose(1, 2) for size in (CONTENT + ROTARY, VALUE)]
    found, expected = KeysAndValues.apply(kv, key, CONTENT), keys_reference(kv, key, CONTENT)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    of_kv, of_key = torch.autograd.grad(found, (kv, key), grads)
    expected_kv, _ = torch.autograd.grad(expected, (kv, key), grads)
    assert torch.equal(of_kv, expected_kv)
    torch.testing.assert_close(of_key.float(), grads[0][..., CONTENT:].float().sum(2), rtol=2**-7, atol=1e-2)
