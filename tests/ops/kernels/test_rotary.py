"""The kernels of heads, interpreted in float32, against the twin and its autograd."""

import pytest
import torch

from dsv3.ops.rotary import KeysAndValues, Rotate, keys_reference, rotate_reference

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

SHAPES = [(1, 1, 1, 32, 16, 32), (2, 5, 3, 24, 8, 40), (1, 3, 17, 128, 64, 128), (2, 2, 4, 0, 16, 16)]
"""B, T, H, N, R, V."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def strided(x):
    """x as a part of a tensor that holds NaN elsewhere, heads before tokens as attention gives them."""
    poisoned = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 4), torch.nan).transpose(1, 2)
    poisoned[..., : x.shape[3]] = x
    return poisoned[..., : x.shape[3]]


def both(function, inputs, outputs):
    """(what it gives, the gradients of its inputs) for fixed gradients of its outputs."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    found = function(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    return found, torch.autograd.grad(found, leaves, outputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("one_row", [False, True])
def test_queries(shape, one_row):
    batch, tokens, heads, content, rotary, _ = shape
    turn = torch.polar(
        torch.ones(1 if one_row else batch, tokens, rotary // 2), random(1 if one_row else batch, tokens, rotary // 2)
    )
    x, grad = (
        random(batch, tokens, heads, content + rotary),
        strided(random(batch, tokens, heads, content + rotary, seed=1)),
    )
    expected = both(lambda x: rotate_reference(x, turn), [strided(x)], [grad])
    found = both(lambda x: Rotate.apply(x, turn), [strided(x)], [grad])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [each for each in SHAPES if each[3]])
def test_keys_and_values(shape):
    batch, tokens, heads, content, rotary, value = shape
    kv, key = strided(random(batch, tokens, heads, content + value)), random(batch, tokens, rotary, seed=1)
    grads = [strided(random(batch, tokens, heads, size, seed=2)) for size in (content + rotary, value)]
    expected = both(lambda *given: keys_reference(*given, content), [kv, key], grads)
    found = both(lambda *given: KeysAndValues.apply(*given, content), [kv, key], grads)
    torch.testing.assert_close(found, expected)
    assert found[0][1].data_ptr() != found[0][0].data_ptr()
