"""Why one correction of a product by the inverse divides well enough. All in float64, where each product of two FP32 numbers is
exact, and so is the sign of each sum."""

import numpy as np
import pytest
import torch

SIGNIFICANDS = 1 << 23
WHERE_ROUNDING_CHANGES = [j / 16 for j in range(16, 32)]
"""Midpoints between neighbours in E4M3, up to a power of two: 1.xxx1 between normal numbers, k + 1/2 between subnormal ones."""


def fp32(x):
    """float64 to the nearest FP32 number, as float64."""
    return x.astype(np.float32).astype(np.float64)


def neighbour(x, steps):
    """The FP32 number that many steps above x."""
    return (x.astype(np.float32).view(np.int32) + np.int32(steps)).view(np.float32).astype(np.float64)


def product_and_correction(dividend, divisor, inverse):
    """What the kernels add, and round once."""
    product = fp32(dividend * inverse)
    return product, fp32(dividend - product * divisor) * inverse


def wrong_sides(divisor):
    """How many quotients around the midpoints end up on the other side."""
    inverse, wrong = fp32(1 / divisor), 0
    for middle in WHERE_ROUNDING_CHANGES:
        # An even number: FP32 rounds to it what is half a step away.
        up, down = middle + 2.0**-24, middle - (2.0**-25 if middle == 1 else 2.0**-24)
        for step in range(-3, 4):
            dividend = neighbour(fp32(divisor * middle), step)
            product, correction = product_and_correction(dividend, divisor, inverse)
            above, below = product - up + correction > 0, product - down + correction < 0
            wrong += np.count_nonzero(above != (dividend > up * divisor))
            wrong += np.count_nonzero(below != (dividend < down * divisor))
    return wrong


def divisors(stride):
    for start in range(0, SIGNIFICANDS, 1 << 18):
        yield (np.arange(start, start + (1 << 18), stride, dtype=np.int32) | 0x3F800000).view(np.float32).astype(float)


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.prove)])
def test_inverses_are_rounded_to_nearest_from_three_steps_off(stride):
    for divisor in [2 - np.arange(1, 4097) * 2.0**-23, *divisors(stride)]:
        nearest = fp32(1 / divisor)
        for off in range(-3, 4):
            start, correction = neighbour(nearest, off), fp32(1 - neighbour(nearest, off) * divisor)
            once = fp32(start + correction * start)
            assert np.array_equal(fp32(once + 2.0**-24 * (fp32(1 - once * divisor) > divisor * 2.0**-25)), nearest)


@pytest.mark.parametrize("stride", [257, pytest.param(1, marks=pytest.mark.prove)])
def test_e4m3_rounds_a_corrected_product_like_the_quotient(stride):
    # The largest significands are the hardest.
    assert wrong_sides(2 - np.arange(1, 4097) * 2.0**-23) == 0
    assert sum(map(wrong_sides, divisors(stride))) == 0


@pytest.mark.parametrize("off", range(-2, 3))
def test_e4m3_rounds_products_of_bf16_by_an_inverse_in_two_parts_like_quotients(off):
    significands = 1 + np.arange(128) / 128
    scale = fp32(significands / 448)[:, None]
    x = (significands[:, None] * 2.0 ** np.arange(-20, 1)).reshape(1, -1)
    inverse = neighbour(fp32(1 / scale), off)
    most = neighbour(inverse, -3)
    rest = fp32(fp32(1 - most * scale) * inverse)
    assert (rest > 0).all()
    found, expected = fp32(x * most + fp32(x * rest)), fp32(x / scale)
    found, expected = (torch.from_numpy(each).clamp(max=448).to(torch.float8_e4m3fn) for each in (found, expected))
    assert torch.equal(found.float(), expected.float())


def test_without_correction_it_would_not():
    divisor = next(divisors(997))
    middle = 17 / 16
    dividend = fp32(divisor * middle)
    product = fp32(dividend * fp32(1 / divisor))
    assert np.count_nonzero(np.sign(product - middle) != np.sign(fp32(dividend / divisor) - middle)) > 0


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.prove)])
def test_a_corrected_product_by_the_inverse_of_448_is_the_quotient(stride):
    inverse = float(np.float32(1 / 1.75))
    for largest in divisors(stride):
        product, correction = product_and_correction(largest, 1.75, inverse)
        nearest = fp32(largest / 1.75)
        step = np.spacing(nearest.astype(np.float32)).astype(float)
        assert (np.abs(product - nearest + correction) / step).max() < 0.499


def test_scales_are_the_twins_at_all_exponents():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU")
    from dsv3.ops.kernels.tiles import quantize_rows
    from dsv3.ops.tiles import rows_reference

    largest = torch.tensor([1.0, 1.5, 1.75, 1.9999999]).outer(torch.ldexp(torch.ones(277), torch.arange(-149, 128)))
    x = largest.flatten()[: -(largest.numel() % 64) or None].view(-1, 1)
    for power_of_two in (False, True):
        found, expected = quantize_rows(x, power_of_two, torch.float32, (64, 4)), rows_reference(x, power_of_two)
        torch.testing.assert_close(found.scale, expected.scale, rtol=1.2e-7, atol=0)
