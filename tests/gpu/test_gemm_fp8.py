"""Dense FP8 products on a GPU: cuBLAS and Triton against the definition and against BF16."""

import pytest
import torch

from dsv3.ops.block_scaled import dequantize, quantize
from dsv3.ops.gemm_fp8 import columns_triton, gemm_fp8, gemm_fp8_columns, prepared_scale, triton
from dsv3.ops.tiles import Tiles, dequantize_reference, quantize_columns, rows_reference
from tests.ops.products import difference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)
FP32, BF16 = torch.float32, torch.bfloat16


def matrix(*shape, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=BF16)


def on_hopper():
    return torch.cuda.get_device_capability()[0] == 9


# K of 4 n blocks, of other numbers of whole blocks, with a half block; N with a half block; rows that are no multiple of 4.
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [
        (512, 7168, 2112),
        (256, 1536, 4096),
        (130, 640, 576),
        (64, 576, 7168),
        (1, 1408, 256),
        (3, 128, 128),
        (6, 16, 16),
    ],
)
def test_cublas_and_triton_compute_the_definition(rows, inner, columns):
    rows_wide, weight_wide = matrix(rows, inner), matrix(columns, inner, seed=1)
    x, (weight, scale) = rows_reference(rows_wide), quantize(weight_wide)
    assert (dict(gemm_fp8.explain(x, weight, scale))["scaled_mm"] is None) == (on_hopper() and inner % 128 == 0)
    expected = dequantize_reference(x, FP32) @ dequantize(weight, scale, FP32).t()
    found = gemm_fp8(x, weight, scale)
    assert found.dtype == BF16
    assert found.is_contiguous()
    assert difference(found, expected) < 1e-5
    assert difference(found, rows_wide.float() @ weight_wide.float().t()) < 2e-3
    assert torch.equal(gemm_fp8(x, weight, prepared_scale(scale)), found)
    assert difference(triton(x, weight, scale), expected) < 1e-5
    assert difference(triton(x, weight, prepared_scale(scale), FP32), expected) < 1e-6


def test_the_products_gate_against_bf16():
    rows, weight = matrix(512, 7168), matrix(4096, 7168, seed=1)
    found = gemm_fp8(rows_reference(rows), *quantize(weight))
    assert difference(found, rows @ weight.t()) < 1e-3


def test_no_tail_of_scales_is_forgotten():
    """Five blocks of K, each with another scale: where they were read in another layout, the product would be far off."""
    x = rows_reference(matrix(64, 640) * torch.tensor([1, 10, 100, 1e3, 1e4], device="cuda").repeat_interleave(128))
    factors = torch.tensor([1e4, 1e3, 100, 10, 1], device="cuda").repeat_interleave(128)
    weight, scale = quantize(matrix(384, 640, seed=1) * factors)
    expected = dequantize_reference(x, FP32) @ dequantize(weight, scale, FP32).t()
    for found in (gemm_fp8(x, weight, scale), triton(x, weight, scale)):
        assert difference(found, expected) < 1e-5


@pytest.mark.parametrize(("down", "tokens", "across"), [(2112, 1024, 1536), (256, 640, 576), (512, 4000, 512)])
def test_both_sides_in_tiles(down, tokens, across):
    a, b = rows_reference(matrix(down, tokens)), rows_reference(matrix(across, tokens, seed=1))
    assert (dict(gemm_fp8_columns.explain(a, b))["scaled_mm"] is None) == (on_hopper() and tokens % 128 == 0)
    expected = dequantize_reference(a, FP32) @ dequantize_reference(b, FP32).t()
    found = gemm_fp8_columns(a, b)
    assert found.dtype == FP32
    assert difference(found, expected) < 1e-6
    assert difference(columns_triton(a, b), expected) < 1e-6


@pytest.mark.parametrize(
    ("down", "tokens", "across"), [(2112, 1024, 1536), (4096, 4096, 7168), (256, 640, 576), (512, 4000, 512)]
)
def test_a_product_is_added_to_what_is_there(down, tokens, across):
    """Of some rows of one side as well, as those of one of several layers that read the same."""
    a, b = rows_reference(matrix(down, tokens)), rows_reference(matrix(across, tokens, seed=1))
    for part in (slice(0, down), slice(64, down - 64)):
        side = Tiles(a.values[part], a.scale[part])
        expected = dequantize_reference(side, FP32) @ dequantize_reference(b, FP32).t()
        before = matrix(len(side.values), across, seed=2).float()
        for each in gemm_fp8_columns.implementations:
            total = before.clone()
            if each.supports(side, b, out=total) is None:
                assert each.run(side, b, out_dtype=FP32, out=total) is total
                assert difference(total - before, expected) < 1e-5, each.name
        assert gemm_fp8_columns(side, b, out=before) is before


def test_triton_serves_what_cublas_does_not():
    x, (weight, scale) = rows_reference(matrix(20, 256)), quantize(matrix(40, 256, seed=1))
    reasons = dict(gemm_fp8.explain(x, weight, scale))
    assert not on_hopper() or "a multiple of 16 columns" in reasons["scaled_mm"]
    assert reasons["triton"] is None
    expected = dequantize_reference(x, FP32) @ dequantize(weight, scale, FP32).t()
    assert difference(gemm_fp8(x, weight, scale, FP32), expected) < 1e-6
    odd = Tiles(x.values[:, :250].contiguous(), x.scale)
    assert "multiple of 16 bytes" in dict(gemm_fp8.explain(odd, weight[:, :250], scale))["triton"]


@pytest.mark.parametrize("tokens", [1, 257, 4095])
def test_cublas_multiplies_columns_of_any_number_of_tokens(tokens):
    """MTP has one token fewer than a sequence."""
    a, b = quantize_columns(matrix(tokens, 512)), quantize_columns(matrix(tokens, 256, seed=1))
    assert (dict(gemm_fp8_columns.explain(a, b))["scaled_mm"] is None) == on_hopper()
    expected = dequantize_reference(a, FP32) @ dequantize_reference(b, FP32).t()
    for each in gemm_fp8_columns.implementations:
        if each.supports(a, b) is None:
            assert difference(each.run(a, b), expected) < 1e-6, each.name


def test_nothing_waits_for_the_device():
    x, (weight, scale) = rows_reference(matrix(130, 640)), quantize(matrix(256, 640, seed=1))
    side = Tiles(weight, scale.repeat_interleave(128, 0).t().contiguous().t())
    torch.cuda.set_sync_debug_mode("error")
    try:
        gemm_fp8(x, weight, scale)
        triton(x, weight, scale)
        gemm_fp8_columns(side, side)
    finally:
        torch.cuda.set_sync_debug_mode("default")
