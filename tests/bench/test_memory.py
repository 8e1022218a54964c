import pytest
import torch

from dsv3.bench.memory import BF16, FP8, TECHNIQUES, Live, bench_memory
from dsv3.model.config import ModelConfig
from dsv3.ops.attention import attention
from dsv3.planning.parameters import count_parameters


def test_what_lives_is_counted_and_what_is_gone_is_not():
    with Live() as live:
        a = torch.zeros(1000)
        assert live.now == 4000
        b = a.view(10, 100) + 1
        assert live.now == 8000
        a.mul_(2)
        b[0].exp_()
        assert live.now == 8000  # views and changes in place hold nothing new
        del a
        assert live.now == 4000
    del b
    assert (live.now, live.most) == (0, 8000)


@pytest.fixture(scope="module")
def small():
    heads = {"q_lora_rank": 32, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 48}
    return ModelConfig.preset("debug", hidden_size=64, n_routed_experts=4, n_group=1, topk_group=1, **heads)


@pytest.fixture(scope="module")
def found(small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "preset", lambda name: small)
        patch.setattr(attention, "candidates", [each for each in attention.candidates if each.name == "sdpa"])
        return bench_memory("small", batch=2, length=128, rounds=1)


def test_every_technique_saves_memory_of_the_same_step(found):
    assert found.keys() == {each for pair in TECHNIQUES.values() for each in pair}
    for name, (without, used) in TECHNIQUES.items():
        # Emulated products in FP8 have large temporaries; 12 bits are kept beside attention's own copy.
        if "in place of" not in name and "E5M6" not in name:
            assert found[used].peak < found[without].peak, name
    for each in found.values():
        assert each.resting < each.resting + each.kept <= each.peak
        assert each.seconds > 0


def test_what_rests_is_counted_to_the_byte(found, small):
    """Weights, gradients and moments in FP32; FP8 adds a copy for each direction of a product, BF16 halves the moments."""
    counted = count_parameters(small)
    biases = 3 * small.n_routed_experts
    weights = counted.trained - biases
    assert 0 <= found[BF16].resting - 16 * weights < 20_000  # biases, counts of steps, the batch
    by_name = {name: found[without].resting - found[used].resting for name, (without, used) in TECHNIQUES.items()}
    assert by_name["FP8: moments in BF16"] == 4 * weights
    assert by_name["FP8: average of the weights on the CPU"] == 4 * weights
    assert by_name["FP8: MTP shares embedding and head"] == 2 * 16 * counted.embedding
    in_fp8 = by_name["FP8 in place of BF16, `swiglu` computed again"] / -2 / weights
    assert 0.3 < in_fp8 < 1


def test_what_waits_is_what_the_layers_keep(found, small):
    kept = {name: found[without].kept - found[used].kept for name, (without, used) in TECHNIQUES.items()}
    assert kept["BF16: all three"] > max(
        kept[f"BF16: `{each}` computed again"] for each in ("norms", "mla_up", "swiglu")
    )
    assert kept["FP8 in place of BF16, `swiglu` computed again"] > 0.1 * found[BF16].kept
    assert kept["FP8: layers' inputs kept in E4M3"] > 0.1 * found[FP8].kept
    # Beside attention's own BF16 copy, 12 bits an element and 32 a tile: four blocks, 2 heads, 256 tokens, MTP one less a row.
    elements = (3 * 256 + 254) * 2 * small.v_head_dim
    assert kept["FP8: `o_proj`'s input kept in E5M6"] == pytest.approx(-1.5 * elements, rel=0.1)


def test_the_meter_begins_anew():
    with Live() as live:
        big = torch.zeros(1000)
        del big
        live.restart()
        torch.zeros(10)
    assert live.most == 40
