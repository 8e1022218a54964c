"""Grouped FP8 products on a GPU, against the definition and against BF16."""

import pytest
import torch

from dsv3.ops.block_scaled import dequantize, quantize
from dsv3.ops.gemm_fp8 import columns_reference
from dsv3.ops.grouped_gemm_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_masked,
    grouped_wgrad_fp8,
    rows_of,
    wgrad_reference,
)
from dsv3.ops.operation import kernel
from dsv3.ops.tiles import Tiles, dequantize_reference, rows_reference
from tests.ops.products import difference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)
FP32, BF16 = torch.float32, torch.bfloat16
E4M3_NAN = 0x7F


def matrix(*shape, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=BF16)


def counts_of(*counts):
    return torch.tensor(counts, device="cuda")


def poison(tiles, start, end):
    tiles.values.view(torch.uint8)[start:end] = E4M3_NAN
    tiles.scale[start:end] = torch.nan


def expected_product(x, weight, scale, counts):
    wide, dequantised = dequantize_reference(x, FP32), dequantize(weight, scale, FP32)
    out = torch.zeros(len(wide), weight.shape[1], device="cuda")
    start = 0
    for e, count in enumerate(counts.tolist()):
        out[start : start + count] = wide[start : start + count] @ dequantised[e].t()
        start += count
    return out


# Averages above and below 64 rows an expert take other tiles.
@pytest.mark.parametrize("counts", [(300, 0, 1, 129, 128), (0, 20, 3, 0, 64), (0, 0, 0, 0, 1000)])
@pytest.mark.parametrize(("inner", "across"), [(1408, 2048), (576, 304)])
def test_each_group_meets_its_own_weight(counts, inner, across):
    counts = counts_of(*counts)
    used = int(counts.sum())
    x, (weight, scale) = rows_reference(matrix(used + 70, inner)), quantize(matrix(5, across, inner, seed=1))
    expected = expected_product(x, weight, scale, counts)
    poison(x, used, used + 70)
    found = grouped_gemm_fp8(x, weight, scale, counts)
    assert found.dtype == BF16
    assert difference(found[:used], expected[:used]) < 1e-5
    assert torch.equal(found[used:], torch.zeros_like(found[used:]))


# Columns that end within a tile's first half, within its second, with it.
@pytest.mark.parametrize(("inner", "across"), [(1408, 304), (576, 400), (7168, 4096)])
@pytest.mark.parametrize("counts", [(300, 0, 1, 129, 512), (0, 0, 0, 0, 1000)])
def test_gluon_computes_the_same(counts, inner, across):
    counts = counts_of(*counts)
    used = int(counts.sum())
    x, (weight, scale) = rows_reference(matrix(used + 200, inner)), quantize(matrix(5, across, inner, seed=1))
    reason = dict(grouped_gemm_fp8.explain(x, weight, scale, counts))["gluon"]
    if reason is not None:
        pytest.skip(reason)
    expected = expected_product(x, weight, scale, counts)
    poison(x, used, used + 200)
    gluon = kernel("grouped_gemm_fp8_gluon", "contiguous")
    found = gluon(x, weight, scale, counts)
    assert difference(found[:used], expected[:used]) < 1e-5
    assert torch.equal(found[used:], torch.zeros_like(found[used:]))
    # A different number of multiprocessors hands the tiles out in another way.
    assert torch.equal(found, gluon(x, weight, scale, counts, num_sms=7))


def test_close_to_bf16_at_an_experts_size():
    rows, weight = matrix(1024, 7168), matrix(4, 4096, 7168, seed=1)
    counts = counts_of(256, 128, 256, 256)
    x, blocks = rows_reference(rows), quantize(weight)
    expected = torch.nn.functional.grouped_mm(rows, weight.mT, offs=counts.cumsum(0).int())
    expected[896:] = 0
    poison(x, 896, 1024)
    torch.full_like(expected, torch.nan)  # freed at once: a result comes to lie there
    triton = kernel("grouped_gemm_fp8", "contiguous")
    assert difference(triton(x, *blocks, counts), expected) < 1e-3
    assert torch.equal(triton(x, *blocks, counts.int()), triton(x, *blocks, counts))
    assert difference(grouped_gemm_fp8(x, *blocks, counts, aligned=True), expected) < 1e-3


@pytest.mark.parametrize(("room", "counts"), [(1, (1, 0, 1)), (20, (20, 3, 0)), (192, (192, 65, 64))])
def test_masked_groups(room, counts):
    x, (weight, scale) = rows_reference(matrix(3 * room, 1408)), quantize(matrix(3, 2112, 1408, seed=1))
    expected = [dequantize_reference(rows_of(x, e * room, e * room + n), FP32) for e, n in enumerate(counts)]
    expected = [rows @ dequantize(weight[e], scale[e], FP32).t() for e, rows in enumerate(expected)]
    for e, count in enumerate(counts):
        poison(x, e * room + count, (e + 1) * room)
    found = grouped_gemm_fp8_masked(x, weight, scale, counts_of(*counts), room)
    assert found.shape == (3, room, 2112)
    for e, count in enumerate(counts):
        if count:
            assert difference(found[e, :count], expected[e]) < 1e-5


def weight_gradient(name, *arguments, **out):
    (one,) = (each for each in grouped_wgrad_fp8.implementations if each.name == name)
    if (reason := one.supports(*arguments, **out)) is not None:
        pytest.skip(reason)
    return one.run(*arguments, **out)


# Tiles that end within a first half, within a second, with one; more steps than stages; tokens behind the last.
@pytest.mark.parametrize("name", ["gluon", "triton"])
@pytest.mark.parametrize("counts", [(128, 0, 384), (512, 0, 0), (0, 0, 0), (1024,), (0, 128, 0, 1152, 256, 0)])
@pytest.mark.parametrize(("down", "across"), [(320, 576), (64, 128), (400, 1384), (1408, 2048)])
def test_weight_gradients(name, counts, down, across):
    counts = counts_of(*counts)
    used, shape = int(counts.sum()), (len(counts), down, across)
    grad, x = rows_reference(matrix(down, used + 384)), rows_reference(matrix(across, used + 384, seed=1))
    expected = wgrad_reference(grad, x, counts)
    for side in (grad, x):
        side.values.view(torch.uint8)[:, used:] = E4M3_NAN
        side.scale[:, used // 128 :] = torch.nan
    # Freed at once: the result comes to lie there.
    torch.full(shape, torch.nan, device="cuda")
    found = weight_gradient(name, grad, x, counts)
    assert found.dtype == FP32
    assert bool((found[counts == 0] == 0).all())
    assert not used or difference(found, expected) < 1e-6
    total = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    before = total.clone()
    assert weight_gradient(name, grad, x, counts, out=total) is total
    torch.testing.assert_close(total, before + found, atol=1e-4, rtol=1e-5)
    assert torch.equal(total[counts == 0], before[counts == 0])


@pytest.mark.parametrize("accumulate", [False, True])
def test_gluon_hands_weight_gradients_out_in_any_way(accumulate):
    counts = counts_of(256, 0, 640, 128)
    grad, x = rows_reference(matrix(640, 1024)), rows_reference(matrix(1536, 1024, seed=1))
    expected = weight_gradient("gluon", grad, x, counts)
    gluon = kernel("grouped_wgrad_fp8_gluon", "wgrad")
    for processors in (1, 7):
        out = torch.zeros_like(expected) if accumulate else None
        assert torch.equal(gluon(grad, x, counts.int(), out, num_sms=processors), expected)


def test_gluon_adds_where_rows_do_not_begin_a_storage():
    counts = counts_of(128, 256)
    grad, x = rows_reference(matrix(192, 384)), rows_reference(matrix(320, 384, seed=1))
    room = torch.zeros(2 * 192 * 320 + 8, device="cuda")
    out = room[4:-4].view(2, 192, 320)
    weight_gradient("gluon", grad, x, counts, out=out)
    assert difference(out, wgrad_reference(grad, x, counts)) < 1e-6
    assert not bool(torch.cat((room[:4], room[-4:])).any())


@pytest.fixture
def room_for_large():
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory")


def raw(*shape):
    """Positive E4M3 values, drawn as bytes."""
    return torch.randint(40, 72, shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)


@pytest.mark.usefixtures("room_for_large")
def test_more_weights_than_32_bits_count():
    experts, across, inner = 42, 7168, 7168
    weight = raw(experts, across, inner)
    scale = torch.rand(experts, across // 128, inner // 128, device="cuda")
    x, counts = rows_reference(matrix(66, inner)), counts_of(*[0] * (experts - 1), 64)
    expected = dequantize_reference(x, FP32)[:64] @ dequantize(weight[-1], scale[-1], FP32).t()
    assert difference(grouped_gemm_fp8(x, weight, scale, counts)[:64], expected) < 1e-5
    room = rows_reference(matrix(experts * 2, inner, seed=3))
    expected = dequantize_reference(rows_of(room, 82, 84), FP32) @ dequantize(weight[-1], scale[-1], FP32).t()
    found = grouped_gemm_fp8_masked(room, weight, scale, counts.clamp(max=2), 2)
    assert difference(found[-1], expected) < 1e-5


@pytest.mark.usefixtures("room_for_large")
def test_more_results_than_32_bits_count():
    rows = 300_000
    x, (weight, scale) = rows_reference(matrix(rows, 128)), quantize(matrix(2, 7168, 128, seed=1))
    found = grouped_gemm_fp8(x, weight, scale, counts_of(1000, rows - 1100))
    last = rows_of(x, rows - 1100, rows - 100)
    expected = dequantize_reference(last, FP32) @ dequantize(weight[1], scale[1], FP32).t()
    assert difference(found[-1100:-100], expected) < 1e-5
    assert not bool(found[-100:].any())


@pytest.mark.usefixtures("room_for_large")
@pytest.mark.parametrize("name", ["gluon", "triton"])
def test_more_gradients_than_32_bits_count(name):
    experts, size = 42, 7168
    grad = Tiles(raw(size, experts * 128), rows_reference(matrix(size, experts * 128)).scale)
    found = weight_gradient(name, grad, grad, torch.full((experts,), 128, device="cuda"))
    last = Tiles(grad.values[:, -128:].contiguous(), grad.scale[:, -1:])
    assert difference(found[-1], columns_reference(last, last)) < 1e-6


def test_nothing_waits_for_the_device():
    x, (weight, scale) = rows_reference(matrix(512, 512)), quantize(matrix(2, 512, 512, seed=1))
    counts = counts_of(128, 128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_gemm_fp8(x, weight, scale, counts)
        grouped_gemm_fp8_masked(x, weight, scale, counts, 256)
        grouped_wgrad_fp8(x, x, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
