import pytest
import torch

from dsv3.errors import UserError
from dsv3.ops.block_scaled import dequantize, quantize
from dsv3.ops.gemm_fp8 import columns_reference, gemm_fp8, gemm_fp8_columns, laid_out, padded, prepared_scale, reference
from dsv3.ops.tiles import Tiles, dequantize_rows, quantize_rows
from tests.ops.products import difference


def matrix(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 256, 130), (1, 300, 16), (130, 64, 257)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_product_of_what_the_values_stand_for(rows, inner, columns, power_of_two):
    x = quantize_rows(matrix(rows, inner, 0), power_of_two)
    weight, scale = quantize(matrix(columns, inner, 1), power_of_two)
    exact = dequantize_rows(x, torch.float64) @ dequantize(weight, scale, torch.float64).t()
    found = gemm_fp8(x, weight, scale, out_dtype=torch.float32)
    assert found.dtype == torch.float32
    assert found.shape == (rows, columns)
    assert difference(found, exact) < 1e-12
    assert torch.equal(gemm_fp8(x, weight, prepared_scale(scale), torch.float32), found)
    assert torch.equal(gemm_fp8(x, weight, scale), found.bfloat16())


@pytest.mark.parametrize(("down", "tokens", "across"), [(5, 256, 130), (64, 300, 1)])
def test_the_product_of_two_sides_in_tiles(down, tokens, across):
    a, b = quantize_rows(matrix(down, tokens, 0)), quantize_rows(matrix(across, tokens, 1))
    exact = dequantize_rows(a, torch.float64) @ dequantize_rows(b, torch.float64).t()
    found = gemm_fp8_columns(a, b)
    assert found.dtype == torch.float32
    assert difference(found, exact) < 1e-12


def test_the_product_is_added_to_what_is_there():
    a, b = quantize_rows(matrix(12, 256, 0)), quantize_rows(matrix(20, 256, 1))
    total = matrix(12, 20, 2)
    expected = total + gemm_fp8_columns(a, b)
    assert gemm_fp8_columns(a, b, out=total) is total
    assert torch.equal(total, expected)
    with pytest.raises(UserError, match=r"adds to float32 \[12, 20\], not to torch.bfloat16"):
        gemm_fp8_columns(a, b, out=total.bfloat16())


def test_scales_of_some_rows_are_laid_out_anew():
    x = quantize_rows(matrix(12, 256, 0))
    some = Tiles(x.values[4:10], x.scale[4:10])
    found = laid_out(some)
    assert torch.equal(found.scale, some.scale)
    assert found.scale.stride() == (1, 8)
    assert laid_out(x) is x


def test_close_to_the_product_before_quantisation():
    x, weight = matrix(64, 1024, 0), matrix(96, 1024, 1)
    found = reference(quantize_rows(x), *quantize(weight), torch.float32)
    assert 1e-5 < difference(found, x @ weight.t()) < 1e-3


@pytest.mark.parametrize("blocks", [1, 4, 5, 56])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_a_prepared_scale_is_the_same_in_padded_rows(blocks, stack):
    scale = torch.rand(*stack, 7, blocks, generator=torch.Generator().manual_seed(0))
    prepared = prepared_scale(scale)
    assert torch.equal(prepared, scale)
    assert prepared.stride()[-2:] == (-(-blocks // 4) * 4, 1)
    assert torch.equal(prepared_scale(prepared), scale)


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_rows_are_padded_to_fours(rows):
    x = quantize_rows(matrix(rows, 300, 0))
    wide = padded(x)
    assert wide.values.shape == (-(-rows // 4) * 4, 300)
    assert wide.scale.shape == (len(wide.values), 3)
    assert wide.scale.stride() == (1, len(wide.values))
    assert torch.equal(wide.scale[:rows], x.scale)
    assert torch.equal(wide.values[:rows].float(), x.values.float())


def of_bits(x, bits):
    """FP32 cut, as tensor cores do, to so many bits of mantissa (the leading one among them)."""
    return (x.view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)


def summed(a, b, every, rounded):
    """The product as a tensor core computes it: sums of 32 elements are added to a register that `rounded` keeps, which is
    read, scaled and added in FP32 after `every` elements; scaled before where that spans more than one scale."""
    out = torch.zeros(len(a.values), len(b.values))
    for start in range(0, a.values.shape[1], every):
        register = torch.zeros_like(out)
        for k in range(start, start + every, 32):
            part = a.values[:, k : k + 32].float() @ b.values[:, k : k + 32].float().t()
            register = rounded(register + part * a.scale[:, k // 128, None] * b.scale[None, :, k // 128])
        out += register
    return out


def test_promotion_every_128_elements_keeps_what_low_precision_sums_lose():
    a, b = quantize_rows(matrix(48, 4096, 0), True), quantize_rows(matrix(64, 4096, 1), True)
    exact = dequantize_rows(a, torch.float64) @ dequantize_rows(b, torch.float64).t()
    budget = 1e-6
    assert difference(columns_reference(a, b), exact) < budget
    assert difference(summed(a, b, 128, lambda x: of_bits(x, 14)), exact) < budget / 20
    assert difference(summed(a, b, 4096, lambda x: of_bits(x, 14)), exact) > budget
    assert difference(summed(a, b, 4096, lambda x: x.half().float()), exact) > budget


def test_what_is_not_finite_stays_in_its_row():
    x = matrix(6, 256, 0)
    x[2, 5] = torch.inf
    found = gemm_fp8(quantize_rows(x), *quantize(matrix(40, 256, 1)))
    assert found[2].isnan().all()
    assert found[[0, 1, 3, 4, 5]].isfinite().all()


def test_shapes_that_do_not_agree_are_named():
    x = quantize_rows(matrix(4, 256, 0))
    weight, scale = quantize(matrix(40, 128, 1))
    with pytest.raises(UserError, match="256 elements, the weight's 128"):
        gemm_fp8(x, weight, scale)
    with pytest.raises(UserError, match=r"scales of shape \[1, 1\], not \[2, 1\]"):
        gemm_fp8(quantize_rows(matrix(4, 128, 0)), weight, scale.repeat(2, 1))
    with pytest.raises(UserError, match="256 and 128 elements"):
        gemm_fp8_columns(x, Tiles(weight, scale))
