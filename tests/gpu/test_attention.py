"""Attention within documents on a GPU, in BF16, against its definition in FP32."""

import pytest
import torch

from dsv3.ops.attention import attention, by_cudnn, reference, triton
from tests.ops.products import difference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)


def heads(batch, length, count, query, value, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    widths = (query, query, value, value)
    return [torch.randn(batch, length, count, width, generator=generator, device="cuda").bfloat16() for width in widths]


def documents(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()


def in_fp32(q, k, v, grad, scale, segments):
    leaves = [each.float().requires_grad_() for each in (q, k, v)]
    out = reference(*leaves, scale, segments)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.float())


def ours(q, k, v, grad, scale, segments):
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    out = triton(*leaves, scale, segments)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def close(found, expected):
    """Rounding the weights of a softmax to BF16 costs 2e-6 to 4e-6, and single elements that much where terms cancel out."""
    for name, mine, wanted, limit in zip(
        ("out", "q", "k", "v"), found, expected, (4e-3, 3e-2, 3e-2, 3e-2), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert not wanted.any() or difference(mine, wanted) < 5e-6, name
        torch.testing.assert_close(mine.float(), wanted, atol=limit, rtol=2.01 / 128)


SEGMENTS = [
    None,
    [(1024,), (1024,)],
    [(1, 1, 126, 128, 1, 255, 512), (700, 324)],
    [(256, 256, 256, 256), tuple([32] * 32)],
]


@pytest.mark.parametrize("widths", [(192, 128), (96, 64), (32, 32)], ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
def test_forward_and_backward(lengths, widths):
    q, k, v, grad = heads(2, 1024, 4, *widths)
    segments = None if lengths is None else torch.stack([documents(*each) for each in lengths])
    args = q, k, v, grad, widths[0] ** -0.5, segments
    found, expected = ours(*args), in_fp32(*args)
    close(found, expected)
    if lengths is None:
        torch.testing.assert_close(found[0][:, 512:].float(), expected[0][:, 512:], atol=8e-4, rtol=2.01 / 128)


@pytest.mark.parametrize("length", [1, 77, 129, 1000])
def test_lengths_and_strides(length):
    """Keys and values as the model has them: parts of other tensors, with NaN around them."""
    q, k, v, grad = heads(2, length, 3, 192, 128)
    kv = torch.full((2, length + 2, 3, 256), torch.nan, device="cuda", dtype=torch.bfloat16)
    kv[:, :length, :, 128:] = v
    segments = torch.arange(length, device="cuda").div(50, rounding_mode="floor").expand(2, -1)
    expected = in_fp32(q, k, v, grad, 0.07, segments)
    close(ours(q, k, kv[:, :length, :, 128:], grad, 0.07, segments), expected)
    summed = torch.ones((), device="cuda", dtype=torch.bfloat16).expand_as(grad)
    close(ours(q, k, v, summed, 0.07, segments), in_fp32(q, k, v, summed, 0.07, segments))


def test_what_is_hidden_leaves_nothing_at_any_scale():
    """The second document's queries see nothing of the first blocks of keys: how that rounds depends on the scale."""
    segments = documents(100, 156).expand(2, -1)
    q, k, v, grad = heads(2, 256, 2, 192, 128)
    for number in range(16):
        args = q, k, v, grad, 0.05 + 0.0037 * number, segments
        close(ours(*args), in_fp32(*args))


def test_repeats_bit_for_bit():
    args = *heads(2, 2000, 16, 192, 128), 0.07, documents(300, 1000, 700).expand(2, -1)
    expected = ours(*args)
    with torch.no_grad():
        assert torch.equal(triton(*args[:3], *args[4:]), expected[0])
    for _ in range(5):
        assert all(map(torch.equal, ours(*args), expected))


def test_who_serves():
    q, k, v, _ = heads(1, 512, 4, 192, 128)
    segments = documents(200, 312)[None]
    chosen = [name for name, reason in attention.explain(q, k, v, 0.07, segments) if reason is None]
    assert chosen[0] == "triton"
    if torch.cuda.get_device_capability()[0] == 9:
        assert by_cudnn(q, k, v)
        assert dict(attention.explain(q, k, v, 0.07))["triton"] is not None
    torch.use_deterministic_algorithms(True)
    try:
        assert dict(attention.explain(q, k, v, 0.07))["triton"] is None
    finally:
        torch.use_deterministic_algorithms(False)
    found = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with found:
        attention(q, k, v, 0.07)
        torch.cuda.synchronize()
    assert any("cudnn" in each.key for each in found.key_averages()), [each.key for each in found.key_averages()]


def test_a_slow_way_is_said_once(caplog):
    q, k, v, _ = (each.float() for each in heads(1, 64, 2, 48, 16))
    for _ in range(2):
        attention(q, k, v, 0.1)
    assert sum("slow on this GPU" in each.message for each in caplog.records) == 1


def test_more_elements_than_32_bits_count():
    """Offsets of 700,000 tokens of 16 heads of 192 pass 2^31; the documents keep the work small."""
    length = 700_000
    q, k, v, grad = heads(1, length, 16, 192, 128)
    segments = torch.arange(length, device="cuda").div(250, rounding_mode="floor")[None]
    found = ours(q, k, v, grad, 0.07, segments)
    for part in (slice(0, 500), slice(length - 500, length)):
        few = [each[:, part] for each in (q, k, v, grad)]
        close([each[:, part] for each in found], in_fp32(*few, 0.07, segments[:, part]))
