import pytest
import torch

from dsv3.ops.e5m6 import pack_e5m6, unpack_e5m6


def nearest(value: float) -> float:
    """The E5M6 number next to a value, by trying all: 5 bits of exponent with bias 15, 6 of mantissa."""
    numbers = [mantissa / 64 * 2.0**-14 for mantissa in range(64)]
    numbers += [(1 + mantissa / 64) * 2.0 ** (exponent - 15) for exponent in range(1, 31) for mantissa in range(64)]
    distance = min(abs(abs(value) - each) for each in numbers)
    near = [each for each in numbers if abs(abs(value) - each) == distance]
    # Of two equally near, the one whose last bit is 0.
    even = [each for each in near if numbers.index(each) % 2 == 0]
    return (even if len(near) > 1 else near)[0] * (1 if value >= 0 else -1)


def test_values_are_the_nearest_of_twelve_bits():
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 40)
    x[0, 0], x[0, 1], x[1, :2] = 1 + 1 / 128, 1 + 3 / 128, 0.0
    tiles = pack_e5m6(x)
    scale = tiles.scale[:, :1]
    expected = torch.tensor(
        [[nearest(float(each / s)) * float(s) for each in row] for row, s in zip(x, scale, strict=True)]
    )
    torch.testing.assert_close(unpack_e5m6(tiles, torch.float32), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 128), (2, 301)])
def test_twelve_bits_an_element_and_a_power_of_two_a_tile(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    tiles = pack_e5m6(x)
    assert tiles.packed.shape == (shape[0], 3 * -(-shape[1] // 2))
    assert (torch.frexp(tiles.scale).mantissa == 0.5).all()
    back = unpack_e5m6(tiles, torch.float32)
    assert back.shape == x.shape
    largest = torch.nn.functional.pad(x, (0, -shape[1] % 128)).unflatten(1, (-1, 128)).abs().amax(-1)
    assert (tiles.scale * 224 <= largest).all()
    assert (largest <= tiles.scale * 448).all()
    # Half of the last bit; FP32 is rounded to half precision before, BF16 is not.
    assert ((back - x).abs() <= 1.07 * (x.abs() / 128 + tiles.scale.amax(1, True) * 2**-21)).all()
    exact = x.bfloat16()
    back = unpack_e5m6(pack_e5m6(exact), torch.float32)
    assert ((back - exact.float()).abs() <= exact.float().abs() / 128 + tiles.scale.amax(1, True) * 2**-21).all()


def test_tiles_that_are_not_finite_come_back_as_nan():
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = float("inf"), float("nan")
    back = unpack_e5m6(pack_e5m6(x))
    assert back[0, :128].isnan().all()
    assert back[1, 128:].isnan().all()
    assert (back[0, 128:] == 1).all()
    assert (back[1, :128] == 1).all()


def test_a_matrix_in_bf16_survives_turning_its_tiles():
    """Scales are powers of two, so that tiles of 128 x 1 hold the same values as tiles of 1 x 128 (report, section 3.3.3)."""
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    once = unpack_e5m6(pack_e5m6(x), torch.float32)
    turned = unpack_e5m6(pack_e5m6(once.t()), torch.float32).t()
    torch.testing.assert_close(turned, once, rtol=0, atol=0)
