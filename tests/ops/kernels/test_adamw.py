"""The kernel against the reference twin, and that against torch's own AdamW."""

import pytest
import torch

from dsv3.ops import adamw as operation
from dsv3.ops.kernels.adamw import update

SETTING = (3e-3, (0.9, 0.95), 1e-8, 0.1)


def state(size, moments=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, grad, first, second = torch.randn(4, size, generator=generator)
    return weight, grad, (0.1 * first).to(moments), (0.1 * second.square()).to(moments)


@pytest.mark.parametrize("size", [1, 1000, 5000])
@pytest.mark.parametrize("count", [1, 7])
def test_kernel(size, count):
    expected, found = state(size), state(size)
    scalars = torch.tensor(float(count)), torch.ones(()), torch.tensor(2.5)
    operation.reference(*expected, *scalars, *SETTING)
    update(*found, *scalars, *SETTING)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("run", [operation.reference, update])
def test_nothing_changes_where_a_step_is_not_kept(bad, run):
    before, found = state(300), state(300)
    found[1][7] = bad
    run(*found, torch.zeros(()), torch.zeros(()), torch.tensor(torch.nan), *SETTING)
    for a, b in zip(before[::2], found[::2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(before[3], found[3])


def test_reference_is_adamw(monkeypatch):
    monkeypatch.setattr(operation, "PART", 128)
    lr, betas, eps, decay = SETTING
    weight, first, second = torch.randn(3, 100), torch.zeros(3, 100), torch.zeros(3, 100)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    for number in range(1, 5):
        grad = torch.randn(3, 100, generator=torch.Generator().manual_seed(number))
        theirs.grad = grad / 4
        optimizer.step()
        scalars = torch.tensor(float(number)), torch.ones(()), torch.tensor(4.0)
        operation.adamw(weight, grad, first, second, *scalars, *SETTING)
    torch.testing.assert_close(weight, theirs.detach(), rtol=1e-6, atol=1e-6)
