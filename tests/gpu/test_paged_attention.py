"""Attention over pages on a GPU, in BF16 and with packed tokens, against the definition in FP32."""

import pytest
import torch

from dsv3.ops import paged_attention
from dsv3.ops.latent_pages import PAGE, packed_size, reference, store_latents
from dsv3.ops.paged_attention import paged_latent_attention
from tests.ops.paged import sequences

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)
BF16 = torch.bfloat16
SCALE = 192**-0.5
OURS = ["flash_mla", "gluon", "triton"]
LENGTHS = [
    [4096],
    [0, 0],
    [1, 2, 3, 4, 64, 65, 128],
    [700, 0, 4, 64, 3000, 129, 0],
    [int(300 + 37 * n) for n in range(40)],
]


def made(lengths, tokens, heads, packed=False, latent=512, rotated=64):
    return sequences(lengths, tokens, heads, latent, rotated, packed, BF16, "cuda")


def implementation(name, *arguments):
    (one,) = (each for each in paged_latent_attention.implementations if each.name == name)
    if (reason := one.supports(*arguments)) is not None:
        pytest.skip(reason)
    return one.run


def close(found, expected):
    (out, lse), (expected_out, expected_lse) = found, expected
    assert out.dtype == BF16
    out, expected_out = out.double(), expected_out.double()
    torch.testing.assert_close(out, expected_out, atol=8e-4, rtol=2.01 / 128)
    if expected_out.any():
        cosine = 2 * (out * expected_out).sum() / (out.square().sum() + expected_out.square().sum())
        assert 1 - cosine < 5e-6
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (1, 128), (2, 128), (3, 16), (4, 7)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_bf16(name, lengths, tokens, heads):
    arguments = *made(lengths, tokens, heads), 512, SCALE
    run = implementation(name, *arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(found, paged_attention.reference(*arguments))


@pytest.mark.parametrize("name", OURS[1:])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (1, 128), (3, 16), (2, 128)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_packed(name, lengths, tokens, heads):
    arguments = *made(lengths, tokens, heads, packed=True), 512, SCALE
    found = implementation(name, *arguments)(*arguments)
    close(found, paged_attention.reference(*arguments))
    # E4M3 keeps three bits behind the first: 2.5% of what is stored, in the mean, and less of an average over tokens.
    whole, _ = paged_attention.reference(*made(lengths, tokens, heads), 512, SCALE)
    assert (found[0].float() - whole.float()).norm() <= 0.05 * whole.float().norm()


@pytest.mark.parametrize("name", OURS[1:])
def test_scales_far_apart(name):
    q, pages, table, lengths = made([200, 70], 1, 16, packed=True)
    scale = pages.view(torch.float32)[..., 128:132]
    scale *= 2.0 ** torch.randint(-20, 12, scale.shape, device="cuda")
    arguments = q * 0.01, pages, table, lengths, 512, SCALE
    found, expected = implementation(name, *arguments)(*arguments), paged_attention.reference(*arguments)
    assert (found[0].float() - expected[0].float()).norm() <= 1e-2 * expected[0].float().norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 33])
def test_any_number_of_parts(parts, packed):
    from dsv3.ops.kernels import paged_attention as triton

    arguments = *made([700, 0, 4, 64, 3000], 2, 24, packed), 512, SCALE
    expected = paged_attention.reference(*arguments)
    close(triton.decode(*arguments, parts=parts), expected)
    if paged_attention.gluon_serves(*arguments) is None:
        from dsv3.ops.kernels import paged_attention_gluon as gluon

        close(gluon.decode(*arguments, parts=parts), expected)


def test_other_sizes_take_the_kernel_in_triton():
    arguments = *made([700, 65], 2, 10, latent=128, rotated=32), 128, SCALE
    assert dict(paged_latent_attention.explain(*arguments))["triton"] is None
    close(paged_latent_attention(*arguments), paged_attention.reference(*arguments))


@pytest.mark.parametrize(("name", "packed"), [(name, False) for name in OURS] + [("gluon", True), ("triton", True)])
def test_a_recorded_pass_takes_other_lengths(name, packed):
    arguments = *made([640, 130, 64], 2, 64, packed), 512, SCALE
    lengths, run = arguments[3], implementation(name, *arguments)
    for _ in range(2):
        run(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(*arguments)
    for changed in ([640, 130, 64], [2, 0, 33]):
        lengths.copy_(torch.tensor(changed))
        graph.replay()
        close(found, paged_attention.reference(*arguments))


@pytest.mark.parametrize("dtype", [BF16, torch.uint8])
def test_tokens_are_stored_as_the_twin_stores_them(dtype):
    latent = torch.randn(300, 512, device="cuda", dtype=BF16) * 2.0 ** torch.randint(-8, 8, (300, 1), device="cuda")
    latent[5] = 0
    key = torch.randn(300, 64, device="cuda", dtype=BF16)
    size = packed_size(512, 64) if dtype == torch.uint8 else 576
    slots = torch.randperm(10 * PAGE, device="cuda")[:300]
    slots[7] = -1
    found, expected = (torch.zeros(10, PAGE, size, dtype=dtype, device="cuda") for _ in range(2))
    assert store_latents.explain(found, slots, latent, key)[0] == ("triton", None)
    store_latents(found, slots, latent, key)
    reference(expected, slots, latent, key)
    assert torch.equal(found, expected)
