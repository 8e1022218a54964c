"""The kernels of attention, interpreted in float32."""

import pytest
import torch

from dsv3.ops.attention import ends, in_blocks, parts, reference, starts
from tests.ops.poisoned import inside

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels.attention import Config, backward, forward
from dsv3.ops.kernels.documents import bounds

SMALL = Config(32, 16, 4, 2)


def heads(batch, length, query, value, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, 2, width, generator=generator) for width in (query, query, value, value)]


def documents(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def check(length, segments, query=48, value=16, scale=0.2, of=SMALL, of_keys=SMALL):
    """Out, the logarithm of the sum, and all gradients, against autograd of the definition."""
    batch = 1 if segments is None else len(segments)
    q, k, v, grad = heads(batch, length, query, value)
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    expected = reference(*leaves, scale, segments)
    wanted = torch.autograd.grad(expected, leaves, grad)
    start, end = (None, None) if segments is None else (starts(segments), ends(segments))
    q, k, v, grad = map(inside, (q, k, v, grad))
    out, log_sum = forward(q, k, v, scale, start, True, of)
    assert torch.equal(forward(q, k, v, scale, start, False, of)[0], out)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    found = backward(grad, q, k, v, out, log_sum, scale, start, end, of, of_keys)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * max(1.0, 10 * scale))


@pytest.mark.parametrize("length", [1, 31, 32, 75])
def test_one_document(length):
    check(length, None)
    check(length, torch.zeros(1, length, dtype=torch.long))


@pytest.mark.parametrize(
    ("of", "of_keys"),
    [(Config(32, 16, 4, 2), Config(16, 32, 4, 2)), (Config(32, 32, 4, 2), Config(64, 16, 4, 2))],
    ids=str,
)
def test_documents_that_begin_within_blocks_and_at_their_borders(of, of_keys):
    segments = torch.stack([documents(1, 1, 5, 25, 32, 26), documents(64, 15, 10, 1), documents(3, 87)])
    check(90, segments, of=of, of_keys=of_keys)


def test_documents_of_one_token():
    check(40, torch.arange(40)[None])


@pytest.mark.parametrize(("query", "value"), [(16, 32), (32, 16), (48, 64)])
def test_widths(query, value):
    check(40, documents(7, 33)[None], query, value)


def test_scores_of_any_size():
    check(40, documents(7, 33)[None], scale=20.0)


def test_numbers_that_return_are_other_documents():
    segments = torch.tensor([[5, 5, 2, 2, 2, 5, 0]])
    assert starts(segments).tolist() == [[0, 0, 2, 2, 2, 5, 6]]
    assert ends(segments).tolist() == [[2, 2, 5, 5, 5, 6, 7]]
    check(7, segments)


@pytest.mark.parametrize("chunk", [4, 32])
def test_bounds_of_documents(chunk):
    segments = torch.stack([documents(1, 1, 14, 5, 2), documents(23), documents(3, 1, 19)])
    segments = torch.cat((segments, torch.full((3, 2), -1)), 1)[:, :23]
    assert torch.equal(bounds(segments, False, chunk), starts(segments))
    assert torch.equal(bounds(segments, True, chunk), ends(segments))
    assert torch.equal(bounds(segments.t().contiguous().t(), True, chunk), ends(segments))
    assert bounds(torch.tensor([[7]]), True, chunk).tolist() == [[1]]


def test_widths_that_blocks_fill():
    assert [parts(width) for width in (192, 96, 32)] == [(128, 64), (64, 32), (32, 0)]
    assert all(in_blocks(*widths) for widths in ((192, 128), (96, 64), (32, 32), (128, 16)))
    assert not any(in_blocks(*widths) for widths in ((12, 8), (8, 16), (24, 16), (112, 16), (256, 128), (192, 96)))
