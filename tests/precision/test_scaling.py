"""What one scale covers: each choice against quantisation written out, in both directions."""

from typing import get_args

import pytest
import torch

from dsv3.ops.block_scaled import dequantize, quantize_blocks
from dsv3.ops.swiglu import swiglu
from dsv3.ops.tiles import dequantize_rows, quantize_columns, quantize_rows
from dsv3.precision.scaling import QUANTIZERS, Scaling
from dsv3.recipe.schema import TrainingSection


def random(rows, columns, seed=0):
    """Rows and channels of different sizes, so that it shows what shares a scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.logspace(-2, 1, rows).unsqueeze(1) * torch.logspace(0, 1, columns)


def wide(tiles):
    return dequantize_rows(tiles, torch.float64)


def turned(x):
    """[R, K] -> [K, R], zeros behind up to whole tiles."""
    return torch.nn.functional.pad(x.t(), (0, -len(x) % 128))


def in_one_scale(x):
    scale = x.abs().max() / torch.full((), 448.0)
    return (x / scale).to(torch.float8_e4m3fn).double() * scale.double()


@pytest.mark.parametrize("shape", [(300, 272), (1, 128), (128, 16)])
def test_each_choice_against_its_definition(shape):
    x = random(*shape)
    blocks = dequantize(*quantize_blocks(x), torch.float64)
    expected = {
        "tiles": (wide(quantize_rows(x)), wide(quantize_columns(x))),
        "gradient_blocks": (blocks, turned(blocks)),
        "tensors": (in_one_scale(x), turned(in_one_scale(x))),
    }
    for scaling, (rows, columns) in expected.items():
        quantizers = QUANTIZERS[scaling]
        both = quantizers.gradient_both(x)
        torch.testing.assert_close(wide(quantizers.gradient_rows(x)), rows, rtol=1e-6, atol=0)
        torch.testing.assert_close(wide(quantizers.gradient_both(x)[1]), columns, rtol=1e-6, atol=0)
        torch.testing.assert_close(wide(both[0]), rows, rtol=1e-6, atol=0)
        torch.testing.assert_close(wide(both[1]), columns, rtol=1e-6, atol=0)
        # What a bulk copy reads lies as the products expect it.
        assert both[0].scale.stride() == quantize_rows(x).scale.stride()
        assert both[1].values.is_contiguous()


def test_activations_and_weights():
    x = random(200, 256, seed=1)
    tiles, one = QUANTIZERS["gradient_blocks"], QUANTIZERS["tensors"]
    assert torch.equal(wide(tiles.rows(x)), wide(quantize_rows(x)))
    assert torch.equal(tiles.weight(x)[0].float(), quantize_blocks(x)[0].float())
    torch.testing.assert_close(wide(one.rows(x)), in_one_scale(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(wide(one.columns(one.rows(x))), turned(in_one_scale(x)), rtol=1e-6, atol=0)
    torch.testing.assert_close(wide(one.columns(x)), turned(in_one_scale(x)), rtol=1e-6, atol=0)
    torch.testing.assert_close(wide(one.activated(x)), in_one_scale(swiglu(x)), rtol=1e-6, atol=0)
    stack = torch.stack((x, 3 * x))
    torch.testing.assert_close(dequantize(*one.weight(stack), torch.float64), in_one_scale(stack), rtol=1e-6, atol=0)


def test_a_power_of_two_and_what_is_not_finite():
    x = random(130, 128, seed=2)
    for scaling in ("gradient_blocks", "tensors"):
        scale = QUANTIZERS[scaling].gradient_rows(x, True).scale
        assert torch.equal(scale, 2 ** scale.log2().round())
        broken = x.clone()
        broken[3, 5] = torch.inf
        assert QUANTIZERS[scaling].gradient_rows(broken).scale.isnan().any()


def test_a_recipe_may_ask_for_each():
    asked = get_args(TrainingSection.model_fields["fp8_scaling"].annotation)
    assert asked == get_args(Scaling) == tuple(QUANTIZERS)
