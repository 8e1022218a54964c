"""Absorbed attention: torch's kernel against the definition, with and without hidden positions."""

import pytest
import torch

from dsv3.ops import latent_attention as ops


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "held"), [(1, 1), (1, 9), (3, 9), (2, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_the_reference(masked, tokens, held, dtype):
    q, entries = torch.randn(2, tokens, 4, 24).to(dtype), torch.randn(2, held, 24).to(dtype)
    bias = None
    if masked:
        hidden = torch.rand(2, tokens, held) < 0.4
        hidden[..., 0] = False
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    expected = ops.reference(q.float(), entries.float(), bias, 16, 0.2)
    for run in (ops.sdpa, ops.reference):
        found = run(q, entries, bias, 16, 0.2)
        assert found.shape == (2, tokens, 4, 16)
        assert (found.float() - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_hidden_positions_are_not_read():
    q, entries = torch.randn(1, 1, 2, 12), torch.randn(1, 5, 12)
    bias = torch.tensor([[[0.0, 0.0, float("-inf"), 0.0, float("-inf")]]])
    for run in (ops.sdpa, ops.reference):
        seen = run(q, entries[:, [0, 1, 3]], None, 8, 0.3)
        torch.testing.assert_close(run(q, entries, bias, 8, 0.3), seen)
