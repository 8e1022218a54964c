import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.ops.block_scaled import dequantize, quantize, scale_shape

SHAPES = [(128, 128), (256, 384), (576, 200), (1, 1), (130, 7), (3, 150, 260)]


def random(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[-2], 1, generator=generator).pow(8)


def by_loops(values, scale, dtype):
    """Block by block, from the format's description."""
    out = torch.empty(values.shape)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            out[row, column] = values[row, column].float() * scale[row // 128, column // 128]
    return out.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_bits_are_those_of_a_loop(dtype):
    values, scale = quantize(random((140, 133)))
    assert torch.equal(dequantize(values, scale, dtype), by_loops(values, scale, dtype))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_half_a_unit_in_the_last_place(shape, power_of_two):
    weight = random(shape)
    values, scale = quantize(weight, power_of_two)
    assert values.dtype == torch.float8_e4m3fn
    assert values.shape == weight.shape
    assert tuple(scale.shape) == scale_shape(shape)
    found = dequantize(values, scale, torch.float32)
    per_element = dequantize(torch.ones_like(values), scale, torch.float32)
    # E4M3 has 3 bits of mantissa, and a smallest normal number of 2^-6.
    exponent = torch.frexp((weight / per_element).abs()).exponent - 1
    half_unit = torch.ldexp(per_element, exponent.clamp(min=-6) - 4)
    assert ((found - weight).abs() <= half_unit * (1 + 1e-6)).all()
    assert found.abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_each_block_uses_the_whole_range(shape):
    values, scale = quantize(random(shape))
    largest = torch.nn.functional.max_pool2d(values.float().abs().reshape(-1, 1, *shape[-2:]), 128, 128, ceil_mode=True)
    assert (largest == 448).all()
    assert largest.numel() == scale.numel()


def test_scales_that_are_powers_of_two_round_up():
    weight = random((300, 300))
    _, exact = quantize(weight)
    _, scale = quantize(weight, power_of_two=True)
    assert torch.equal(scale, torch.exp2(torch.log2(exact).ceil()))
    weight = torch.full((128, 128), 448.0 * 2**-5)
    assert quantize(weight, power_of_two=True)[1].item() == 2**-5


def test_blocks_of_zeros_stay_zeros():
    weight = random((256, 256))
    weight[128:, :128] = 0
    values, scale = quantize(weight)
    assert scale[1, 0] == 1
    assert not values[128:, :128].float().any()
    assert torch.equal(dequantize(values, scale, torch.float32)[128:, :128], torch.zeros(128, 128))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31), st.booleans())
def test_quantising_what_was_dequantised_changes_nothing(rows, columns, seed, power_of_two):
    values, scale = quantize(random((rows, columns), seed), power_of_two)
    again, same = quantize(dequantize(values, scale, torch.float32), power_of_two)
    assert torch.equal(dequantize(again, same, torch.float32), dequantize(values, scale, torch.float32))


def test_of_bf16_the_blocks_are_as_near_to_the_master():
    """The figures of docs/fp8.md."""
    master = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    (values, scale), (others, other_scale) = quantize(master), quantize(master.bfloat16())
    away, further = (
        ((dequantize(*each, torch.float32) - master).norm() / master.norm()).item()
        for each in ((values, scale), (others, other_scale))
    )
    assert away == pytest.approx(0.0264, abs=2e-4)
    assert 0 < further / away - 1 < 0.003
    assert 0.02 < (values.float() != others.float()).float().mean() < 0.03


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 3e38])
def test_extreme_magnitudes(magnitude):
    values, scale = quantize(torch.full((2, 2), magnitude))
    found = dequantize(values, scale, torch.float32)
    assert torch.allclose(found, torch.full((2, 2), magnitude), rtol=2**-4, atol=1.2e-38 * 2**-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinities_and_nan_are_refused(value):
    weight = random((200, 200))
    weight[150, 3] = value
    with pytest.raises(UserError, match=r"\[200, 200\] holds infinities or NaN"):
        quantize(weight)
