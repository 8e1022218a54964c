"""What every quantising kernel does with a tile: its largest magnitude, its scale, its quotients. Twin: `ops.tiles.scale_of`."""

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """Of FP32, as int32: in the order of magnitudes, infinity and then NaN last, which a maximum of floats would lose."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest_bits, POWER_OF_TWO: tl.constexpr):
    """FP32 scales of tiles whose largest `magnitude_bits` are given."""
    # 448 is 1.75 2^8. A division by it costs a row's threads more than a quotient does; see there.
    exponent = (largest_bits & 0x7F800000).to(tl.float32, bitcast=True)
    significand = (largest_bits & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
    scale = significand * (1 / 1.75)
    scale = tl.fma(tl.fma(scale, -1.75, significand), 1 / 1.75, scale)
    scale = tl.maximum(scale * exponent * 2.0**-8, 2.0**-126)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(largest_bits > 0, scale, 1.0)
    return tl.where(largest_bits < 0x7F800000, scale, float("nan"))


@triton.jit
def inverse_of(divisor):
    """Rounded to nearest, of FP32 in [1, 2): what `tl.div_rn` gives, without its branches."""
    nearly = 1.0 / divisor
    nearly = tl.fma(tl.fma(nearly, -divisor, 1.0), nearly, nearly)
    remainder = tl.fma(nearly, -divisor, 1.0)
    return tl.where(remainder > divisor * 2.0**-25, nearly + 2.0**-24, nearly)


@triton.jit
def quotient(x, scale, POWER_OF_TWO: tl.constexpr, SHORT: tl.constexpr):
    """FP32 `x / scale` as E4M3 sees it; 0 where the scale is NaN. The cast to E4M3 that follows saturates.

    A division rounded to nearest costs more than memory leaves time for. With a power of two, the product by the inverse is
    exact. With other scales, what is computed is not always the nearest FP32 number, but lies on the same side of every value
    where E4M3's rounding changes. SHORT says that x holds BF16 numbers, and the scale comes from one: then the product by an
    inverse in two parts does, for scales up to 2^100. Else a product is corrected once. tests/ops/kernels/test_scaling.py tries
    all significands.
    """
    finite = scale == scale
    x = tl.where(finite, x, 0.0)
    scale = tl.where(finite, scale, 1.0)
    bits = scale.to(tl.int32, bitcast=True)
    if POWER_OF_TWO:
        return x * (0x7F000000 - bits).to(tl.float32, bitcast=True)
    if SHORT:
        inverse = 1.0 / scale
        # Below the inverse for certain, so that what is left is positive, and zeros keep their sign.
        most = (inverse.to(tl.int32, bitcast=True) - 3).to(tl.float32, bitcast=True)
        rest = tl.fma(most, -scale, 1.0) * inverse
        return tl.fma(x, most, x * rest)
    # Shifted by a power of two, so that the remainder is a normal number however small the scale is; negative, as is the inverse,
    # so that zeros keep their sign.
    shift = (0x7F000000 - (bits & 0x7F800000) | -0x80000000).to(tl.float32, bitcast=True)
    divisor = (bits & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
    inverse = -inverse_of(divisor)
    dividend = x * shift
    nearly = dividend * inverse
    return tl.fma(tl.fma(nearly, divisor, dividend), inverse, nearly)
