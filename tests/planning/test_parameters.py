import subprocess
import sys

import pytest
import torch

from dsv3.model.config import PRESETS, ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.planning.flops import training_flops_per_token
from dsv3.planning.parameters import count_parameters, kv_bytes_per_token

V3 = ModelConfig.preset("deepseek-v3")


def test_the_published_checkpoint_to_the_last_parameter() -> None:
    counted = count_parameters(V3)
    assert counted.attention == 187_107_328
    assert counted.expert == 44_040_192
    assert counted.gate == 1_835_264
    assert counted.dense_block == 583_483_392
    assert counted.moe_block == 11_507_286_272
    assert counted.moe_block_active == 585_318_656
    assert counted.embedding == 926_679_040
    assert counted.main == 671_026_419_200
    assert counted.active == 37_552_297_472
    assert counted.active_with_head == 36_625_618_432
    assert counted.active_in_blocks == 35_698_939_392
    assert counted.mtp == 11_610_068_224
    assert counted.mtp_active == 688_100_608
    assert counted.trained == 682_636_487_424
    # The files hold the embedding and the head a second time, under the MTP module.
    assert counted.trained + 2 * counted.embedding == 684_489_845_504


def test_the_cache() -> None:
    assert kv_bytes_per_token(V3) == 70_272


VARIANTS = {
    **{name: ModelConfig.preset(name) for name in PRESETS},
    "no MTP, all dense": ModelConfig.preset("debug", num_nextn_predict_layers=0, first_k_dense_replace=3),
    "more dense than layers": ModelConfig.preset("debug", first_k_dense_replace=9),
    "no shared experts": ModelConfig.preset("debug", n_shared_experts=0, first_k_dense_replace=0),
    "three MTP modules": ModelConfig.preset("debug", num_nextn_predict_layers=3, q_lora_rank=None),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_modules_hold_what_the_arithmetic_says(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = DeepSeekV3(config)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    counted = count_parameters(config)
    assert (sum(sizes.values()) - mtp, mtp) == (counted.main, counted.mtp)


def test_flops_are_the_published_utilisation() -> None:
    causal, full = (training_flops_per_token(V3, 4096, causal=causal) for causal in (True, False))
    assert causal == pytest.approx(250.5e9, rel=2e-4)
    assert full == pytest.approx(281.2e9, rel=2e-4)
    # 272.80B tokens a day on 2048 GPUs of 989 TFLOPS: 38.94% and 43.73% in the paper.
    rate = 272.80e9 / 86400 / 2048 / 989e12
    assert causal * rate == pytest.approx(0.3894, rel=3e-3)
    assert full * rate == pytest.approx(0.4373, rel=3e-3)


def test_mtp_adds_its_block_its_head_and_its_attention() -> None:
    added = training_flops_per_token(V3, 4096, mtp=True) - training_flops_per_token(V3, 4096)
    assert added == 6 * (688_100_608 + 926_679_040 + 128 * 320 * 2048)


def test_planning_needs_no_torch() -> None:
    code = "import sys, dsv3.planning.flops; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
