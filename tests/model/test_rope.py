import math

import pytest
import torch

from dsv3.model.config import ModelConfig, RopeScaling
from dsv3.model.rope import correction_range, frequencies, rotations
from dsv3.ops.rotary import rotated

V3 = ModelConfig.preset("deepseek-v3")
V3_LONG = V3.replace(rope_scaling=RopeScaling(), max_position_embeddings=163840)


def test_yarn_numbers_of_the_released_model():
    """Report, section 4.3, with the released code's correction range."""
    assert correction_range(V3_LONG.rope_scaling, 64, 10000.0) == (10, 23)
    plain, scaled = frequencies(V3), frequencies(V3_LONG)
    ratio = plain / scaled
    assert torch.equal(scaled[:11], plain[:11])
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0))
    assert (ratio[10:24].diff() > 0).all()
    # In between, the share of the divided frequency grows linearly.
    share = (plain - scaled) / (plain - plain / 40)
    torch.testing.assert_close(share[10:24], torch.arange(14) / 13, atol=1e-5, rtol=0)
    assert V3_LONG.rope_scaling.magnitude(1.0) == pytest.approx(1.36889, abs=1e-5)
    assert V3_LONG.softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert V3.softmax_scale == pytest.approx(0.0721688, abs=1e-7)
    assert V3_LONG.rope_scaling.rotation_factor == 1.0


def test_plain_frequencies_are_powers_of_the_base():
    expected = [10000.0 ** (-2 * i / 64) for i in range(32)]
    torch.testing.assert_close(frequencies(V3), torch.tensor(expected))


@pytest.mark.parametrize("config", [V3, V3_LONG])
def test_rotation_is_that_of_complex_numbers_on_adjacent_pairs(config):
    positions = torch.tensor([[0, 1, 5, 4095], [7, 7, 100, 163839]])
    x = torch.randn(2, 4, 3, 64)
    found = rotated(x, rotations(config, positions))
    for b in range(2):
        for t in range(4):
            for i in range(32):
                angle = float(positions[b, t]) * float(frequencies(config)[i])
                turned = torch.view_as_complex(x[b, t, :, 2 * i : 2 * i + 2].contiguous()) * complex(
                    math.cos(angle), math.sin(angle)
                )
                expected = torch.view_as_real(turned)
                rounding = 6 * (angle * 2**-23 + 1e-6)  # of the angle, times the longest vector
                torch.testing.assert_close(found[b, t, :, 2 * i : 2 * i + 2], expected, atol=rounding, rtol=0)


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def product(i, j):
        return float(
            (rotated(q, rotations(V3, torch.tensor([[i]]))) * rotated(k, rotations(V3, torch.tensor([[j]])))).sum()
        )

    assert product(10, 3) == pytest.approx(product(1010, 1003), abs=1e-3)
    assert product(10, 3) != pytest.approx(product(10, 4), abs=1e-2)


def test_lengths_are_kept_and_yarn_scales_by_the_ratio_of_its_mscales():
    x = torch.randn(1, 5, 2, 64)
    positions = torch.arange(5).unsqueeze(0)
    torch.testing.assert_close(rotated(x, rotations(V3_LONG, positions)).norm(dim=-1), x.norm(dim=-1))
    uneven = V3.replace(rope_scaling=RopeScaling(mscale=1.0, mscale_all_dim=0.5))
    factor = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    torch.testing.assert_close(rotated(x, rotations(uneven, positions)).norm(dim=-1), x.norm(dim=-1) * factor)


def test_a_token_is_turned_alike_at_every_length_and_batch():
    x = torch.randn(1, 20, 2, 64)
    whole = rotations(V3_LONG, torch.arange(20).unsqueeze(0))
    for t in (0, 7, 19):
        alone = rotations(V3_LONG, torch.tensor([[t]]))
        assert torch.equal(rotated(x[:, t : t + 1], alone), rotated(x, whole)[:, t : t + 1])
    assert torch.equal(rotated(x[:, 3:9], whole[:, 3:9]), rotated(x, whole)[:, 3:9])


def test_bfloat16_is_turned_in_float32():
    x = torch.randn(1, 8, 2, 64).bfloat16()
    rope = rotations(V3, torch.arange(4000, 4008).unsqueeze(0))
    assert torch.equal(rotated(x, rope), rotated(x.float(), rope).bfloat16())


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (V3_LONG, 131072),
        (ModelConfig.preset("tiny", rope_scaling=RopeScaling(5.0, 256), max_position_embeddings=1280), 1024),
    ],
)
def test_yarn_shows_no_angle_that_training_did_not(config, longest):
    """A pair that turned round once in the original length has been at every angle; the others turn no further than they did."""
    original = config.rope_scaling.original_max_position_embeddings
    plain, scaled = frequencies(config.replace(rope_scaling=None)), frequencies(config)
    turned = original * plain >= 2 * math.pi
    assert 0 < turned.sum() < len(plain)
    assert (longest * scaled[~turned] <= original * plain[~turned]).all()
    assert not (longest * plain[~turned] <= original * plain[~turned]).any()
