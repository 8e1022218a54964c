"""The kernels of tiles, interpreted in float32: indexing, masks, padding. Their rounding is tested on a GPU."""

import pytest
import torch

from dsv3.ops.tiles import (
    E4M3_MAX,
    TILE,
    Tiles,
    dequantize_reference,
    dequantize_rows,
    empty_scale,
    quantize_both,
    quantize_columns,
    quantize_rows,
    rows_reference,
    scale_of,
    transpose_tiles,
)
from tests.ops.poisoned import inside

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels import tiles as kernels

F32 = torch.float32
SHAPES = [(1, 128), (1, 1), (130, 300), (33, 129), (256, 128), (5, 260)]


def unrounded(x, power_of_two=False):
    """`rows_reference` before the cast."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
    factor = scale_of(padded.abs().amax(-1), power_of_two)
    quotient = (padded / factor.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0).flatten(1)[:, : x.shape[1]]
    scale = empty_scale(*x.shape, x.device)
    scale.copy_(factor)
    return Tiles(quotient, scale)


def turned(x, power_of_two=False):
    """`columns_reference` before the cast: the last tile of tokens is filled with zeros."""
    tiles = unrounded(x.t(), power_of_two)
    return Tiles(torch.nn.functional.pad(tiles.values, (0, -len(x) % TILE)), tiles.scale)


def same(found, expected):
    assert found.values.is_contiguous()
    assert (found.scale.shape, found.scale.stride()) == (expected.scale.shape, expected.scale.stride())
    # The interpreter's fused multiply-add rounds twice.
    torch.testing.assert_close(found.scale, expected.scale, rtol=2.4e-7, atol=0, equal_nan=True)
    # A quotient that has no full mantissa left may be a step off.
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1.5e-45)


def matrix(shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-12, 3, shape[0]).unsqueeze(1)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_columns_and_both(shape, power_of_two):
    x = matrix(shape)
    rows, columns = unrounded(x, power_of_two), turned(x, power_of_two)
    same(kernels.quantize_rows(inside(x), power_of_two, F32, (32, 4)), rows)
    same(kernels.quantize_columns(inside(x), power_of_two, F32), columns)
    same(kernels.quantize_columns(inside(x), power_of_two, F32, (64, 8)), columns)
    found = kernels.quantize_both(inside(x), power_of_two, F32)
    same(found[0], rows)
    same(found[1], columns)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_at_their_limits(power_of_two):
    x = torch.randn(8, 256)
    x[0] = 0
    x[1, 3], x[2, 130], x[3, 5] = torch.nan, torch.inf, -torch.inf
    x[4], x[5, :128] = x[4] * 1e-38, 1e-42
    x[6, :128] = torch.full((128,), 448.0) * 2.0**-20
    x[7, 7] = torch.finfo(F32).max
    found = kernels.quantize_rows(x, power_of_two, F32)
    same(found, unrounded(x, power_of_two))
    assert found.scale[0].tolist() == [1, 1]
    assert found.scale.isnan().sum() == 3
    assert found.values[1, :128].eq(0).all()
    same(kernels.quantize_columns(x.t().contiguous(), power_of_two, F32), turned(x.t(), power_of_two))


def test_zeros_keep_their_sign():
    x = torch.tensor([[-0.0, 0.0, 3.0]])
    assert kernels.quantize_rows(x, False, F32).values.signbit().tolist() == [[True, False, False]]


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_and_transpose(shape):
    tiles = unrounded(matrix(shape, 1))
    poisoned = Tiles(inside(tiles.values), tiles.scale)
    wide = dequantize_reference(tiles, F32)
    torch.testing.assert_close(kernels.dequantize_rows(poisoned, F32), wide, rtol=0, atol=0)
    same(kernels.transpose_tiles(poisoned, False, F32), turned(wide))
    same(kernels.transpose_tiles(poisoned, True, F32, (64, 4)), turned(wide, True))


def test_a_scale_of_nan_marks_the_channels_of_its_tile():
    tiles = unrounded(torch.randn(140, 140))
    tiles.scale[3, 1] = torch.nan
    found = kernels.transpose_tiles(tiles, False, F32)
    same(found, turned(dequantize_reference(tiles, F32)))
    assert found.scale.isnan().nonzero().tolist() == [[c, 0] for c in range(128, 140)]


def test_empty():
    assert kernels.quantize_rows(torch.empty(0, 256), dtype=F32).scale.shape == (0, 2)
    both = kernels.quantize_both(torch.empty(0, 256), dtype=F32)
    assert (both[1].values.shape, both[1].scale.shape) == ((256, 0), (256, 0))


def test_the_twin_is_the_unrounded_one_cast():
    x = matrix((9, 200), 2)
    expected = unrounded(x)
    assert torch.equal(
        rows_reference(x).values.float(), expected.values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    )


def test_without_a_gpu_the_twins_serve():
    x = torch.randn(3, 200)
    for operation in (quantize_rows, quantize_columns, quantize_both):
        assert operation.explain(x, power_of_two=True)[0] == ("triton", "needs tensors on a GPU")
    tiles = quantize_rows(x)
    assert dequantize_rows.explain(tiles, dtype=F32)[0] == ("triton", "needs tensors on a GPU")
    assert transpose_tiles.explain(tiles, power_of_two=True)[0] == ("triton", "needs tensors on a GPU")
    assert quantize_rows.explain(x.half())[0] == ("triton", "needs BF16 or FP32, not torch.float16")
    assert quantize_rows.explain(x.t())[0] == ("triton", "needs a matrix with the elements of a row side by side")
