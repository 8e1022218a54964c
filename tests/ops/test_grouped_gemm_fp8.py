import pytest
import torch

from dsv3.errors import UserError
from dsv3.ops.block_scaled import dequantize, quantize
from dsv3.ops.grouped_gemm_fp8 import grouped_gemm_fp8, grouped_gemm_fp8_masked, grouped_wgrad_fp8
from dsv3.ops.grouped_linear import reference as grouped_linear
from dsv3.ops.kernels.deep_gemm import expert_of_rows
from dsv3.ops.tiles import dequantize_rows, quantize_columns, quantize_rows
from tests.ops.products import difference


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def test_each_group_meets_its_own_weight(random):
    x, (weight, scale) = quantize_rows(random(40, 300)), quantize(random(4, 130, 300))
    counts = torch.tensor([17, 0, 1, 20])
    found = grouped_gemm_fp8(x, weight, scale, counts, out_dtype=torch.float32)
    wide = dequantize_rows(x, torch.float32), dequantize(weight, scale, torch.float32)
    assert difference(found[:38], grouped_linear(wide[0][:38], wide[1], counts)) < 1e-10
    assert torch.equal(found[38:], torch.zeros(2, 130))
    assert grouped_gemm_fp8(x, weight, scale, counts).dtype == torch.bfloat16


def test_rows_behind_the_last_group_are_of_no_account(random):
    rows = random(10, 128)
    rows[6:] = torch.nan
    found = grouped_gemm_fp8(quantize_rows(rows), *quantize(random(2, 16, 128)), torch.tensor([2, 4]))
    assert found.isfinite().all()


def test_masked_groups_are_the_contiguous_ones_in_rooms(random):
    rows, (weight, scale) = random(3 * 5, 256), quantize(random(3, 24, 256))
    x = quantize_rows(rows)
    counts = torch.tensor([5, 0, 2])
    found = grouped_gemm_fp8_masked(x, weight, scale, counts, 5)
    packed = quantize_rows(torch.cat((rows[:5], rows[10:12])))
    expected = grouped_gemm_fp8(packed, weight, scale, counts)
    assert torch.equal(torch.cat((found[0, :5], found[2, :2])), expected)


def test_weight_gradients_are_those_of_the_product(random):
    counts = torch.tensor([128, 0, 256])
    grad, x, weight = random(384, 40), random(384, 72), random(3, 40, 72).requires_grad_()
    sides = quantize_columns(grad), quantize_columns(x)
    found = grouped_wgrad_fp8(*sides, counts)
    assert found.dtype == torch.float32
    wide = [dequantize_rows(side, torch.float32).t() for side in sides]
    grouped_linear(wide[1], weight, counts).backward(wide[0])
    assert difference(found, weight.grad) < 1e-10
    before = random(3, 40, 72)
    total = before.clone()
    assert grouped_wgrad_fp8(*sides, counts, out=total) is total
    torch.testing.assert_close(total, before + found)


def test_which_group_rows_belong_to():
    assert expert_of_rows(torch.tensor([2, 0, 1]), 5).tolist() == [0, 0, 2, -1, -1]
    assert expert_of_rows(torch.tensor([0, 0]), 2).tolist() == [-1, -1]


def test_shapes_that_do_not_agree_are_named(random):
    x, (weight, scale) = quantize_rows(random(4, 128)), quantize(random(2, 16, 128))
    with pytest.raises(UserError, match="2 experts and 3 counts"):
        grouped_gemm_fp8(x, weight, scale, torch.tensor([1, 1, 2]))
    with pytest.raises(UserError, match="128 elements, the weight's 120"):
        grouped_gemm_fp8(x, weight[..., :120], scale, torch.tensor([1, 1]))
    with pytest.raises(UserError, match="room for 3 rows each do not take 4"):
        grouped_gemm_fp8_masked(x, weight, scale, torch.tensor([1, 1]), 3)
    with pytest.raises(UserError, match=r"adds to float32 \[1, 4, 4\], not to torch.bfloat16"):
        grouped_wgrad_fp8(x, x, torch.tensor([128]), out=torch.zeros(1, 4, 4, dtype=torch.bfloat16))
