"""The kernels of tiles on a GPU: their reference twins, bit for bit."""

import pytest
import torch

from dsv3.ops.tiles import (
    Tiles,
    both_reference,
    columns_reference,
    dequantize_reference,
    dequantize_rows,
    quantize_both,
    quantize_columns,
    quantize_rows,
    rows_reference,
    transpose_reference,
    transpose_tiles,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def same(found, expected):
    assert torch.equal(found.scale.nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
    assert found.scale.stride() == expected.scale.stride()
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))


def matrix(rows, columns, dtype=torch.bfloat16):
    """Of all sizes, with tiles of zeros, of numbers below FP32's normal ones, infinities and NaN; part of a wider one of NaN."""
    x = torch.randn(rows, columns, device="cuda") * torch.logspace(-30, 30, rows, device="cuda").unsqueeze(1)
    if rows > 8:
        x[0] = 0
        x[1, 0], x[2, -1], x[3, 1] = torch.nan, torch.inf, -torch.inf
        x[4] = x[4].sign() * 1e-40
        x[5] *= torch.logspace(-10, 10, columns, device="cuda")
        x[6, ::2] = -0.0
    wide = torch.full((rows, columns + 16), torch.nan, dtype=dtype, device="cuda")
    wide[:, :columns] = x.to(dtype)
    return wide[:, :columns]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (300, 260), (512, 1024)])
def test_rows(rows, columns, power_of_two):
    for dtype in (torch.bfloat16, torch.float32) if columns == 260 else (torch.bfloat16,):
        x = matrix(rows, columns, dtype)
        assert quantize_rows.explain(x)[0] == ("triton", None)
        found = quantize_rows(x, power_of_two)
        same(found, rows_reference(x, power_of_two))
        torch.testing.assert_close(dequantize_rows(found), dequantize_reference(found), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "columns"), [(300, 260), (512, 1024), (257, 130), (1000, 512), (1023, 384)])
def test_columns_both_and_turned(rows, columns):
    x = matrix(rows, columns)
    for power_of_two in (False, True):
        expected = both_reference(x, power_of_two)
        same(quantize_columns(x, power_of_two), columns_reference(x, power_of_two))
        for found, each in zip(quantize_both(x, power_of_two), expected, strict=True):
            same(found, each)
        same(transpose_tiles(expected[0], power_of_two), transpose_reference(expected[0], power_of_two))


def test_quotients_that_are_hard_to_round():
    """Of every size between midpoints of E4M3 and their neighbours."""
    middle = torch.tensor([j / 16 for j in range(16, 32)], device="cuda")
    largest = torch.rand(1 << 16, 1, device="cuda") + 1
    x = (largest / 448 * middle).repeat(1, 6)
    x = (x.view(torch.int32) + torch.arange(-3, 3, device="cuda", dtype=torch.int32).repeat_interleave(16)).view(
        x.dtype
    )
    x = torch.cat((x * 32, largest), dim=1)
    same(quantize_rows(x), rows_reference(x))


def test_more_than_an_int32_counts():
    rows, columns = 300_032, 7168
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-128:] = torch.randn(128, columns, device="cuda").bfloat16()
    found, turned = quantize_both(x)
    for rows_found in (found, quantize_rows(x)):
        tail = rows_reference(x[-128:])
        assert torch.equal(rows_found.scale[-128:], tail.scale)
        assert torch.equal(rows_found.values[-128:].view(torch.uint8), tail.values.view(torch.uint8))
    tail = columns_reference(x[-128:])
    assert torch.equal(turned.scale[:, -1], tail.scale[:, 0])
    assert torch.equal(turned.values[:, -128:].contiguous().view(torch.uint8), tail.values.view(torch.uint8))
    del found, rows_found
    turned_back = transpose_tiles(Tiles(turned.values, turned.scale), True)
    assert turned_back.scale[-1].eq(turned_back.scale[-1].log2().round().exp2()).all()
