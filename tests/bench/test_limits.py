"""Arithmetic and bytes of the limits, against the parameters that FLOPs follow and against what operations really read and write."""

from collections import Counter
from dataclasses import is_dataclass

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dsv3.bench.limits import Rates, limits
from dsv3.bench.share import KINDS
from dsv3.bench.slices import of_depth
from dsv3.model import feed_forward
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.operation import Operation
from dsv3.ops.permute import sort_by_expert
from dsv3.planning.flops import training_flops_per_token

WHOLE = ModelConfig.preset("deepseek-v3")
ONE = Rates(bf16=1e3, fp8=1e3, copy=1e3, attention=0.0)
"""A FLOP and a byte take a millisecond."""
QUANTISERS = (
    "quantize_rows", "quantize_columns", "quantize_both", "dequantize_rows", "transpose_tiles", "pack_e5m6", "unpack_e5m6",
)  # fmt: skip


@pytest.mark.parametrize("mtp", [False, True])
def test_products_are_all_that_the_count_of_flops_has_but_attention(mtp):
    config = of_depth(WHOLE, 1, 4, mtp)
    found = limits(config, 10, "fp8", ONE)
    attention = 6 * (5 + mtp) * 128 * (192 + 128) * 4096 / 2
    expected = training_flops_per_token(config, 4096, mtp=mtp) - attention
    assert found["grouped products"] + found["other products"] == pytest.approx(10 * expected)
    assert found["grouped products"] == 10 * 6 * (4 + mtp) * 8 * 3 * 2048 * 7168


def test_fp8_leaves_head_router_and_mtp_s_projection_to_bf16():
    config, fast = of_depth(WHOLE, 1, 4, True), Rates(bf16=1e3, fp8=1e12, copy=1e3, attention=0.0)
    in_bf16 = 2 * 129280 * 7168 + 2 * 7168**2 + 5 * 256 * 7169
    assert limits(config, 1, "fp8", fast)["other products"] == pytest.approx(6 * in_bf16)
    assert limits(config, 1, "bf16", fast)["other products"] > 1.5 * 6 * in_bf16


def test_kinds_are_those_of_the_budget():
    found = limits(of_depth(WHOLE, 1, 4, True), 4096, "fp8", Rates(7e14, 1e15, 4e12, 5.0))
    assert found.keys() == {*KINDS, "elementwise"} - {"copies and concatenations"}
    assert found["attention"] == 30
    assert "quantise, transpose, 12 bits" not in limits(of_depth(WHOLE, 1, 4, True), 4096, "bf16", ONE)


def test_bytes_are_what_the_operations_read_and_write(monkeypatch):
    config = ModelConfig.preset(
        "tiny", vocab_size=256, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=128,
        n_routed_experts=2, num_experts_per_tok=2, num_nextn_predict_layers=0,
    )  # fmt: skip
    model = DeepSeekV3(config, torch.bfloat16).initialize("fan_in").compute_in_fp8()
    tokens = torch.randint(256, (1, 129))
    # Experts' weight gradients in FP8, from groups that are whole tiles as they are: all experts see all tokens.
    monkeypatch.setattr(feed_forward, "row_alignment", lambda rows, experts: 128)
    monkeypatch.setattr(
        feed_forward, "sort_by_expert", lambda expert, experts, *padding: sort_by_expert(expert, experts)
    )
    model.loss(tokens).total.backward()  # weights are in FP8 from now on
    moved, inside, call = Counter(), [], Operation.__call__

    def counted(self, *arguments, **options):
        if inside:
            return call(self, *arguments, **options)
        inside.append(self)
        try:
            out = call(self, *arguments, **options)
        finally:
            inside.pop()
        for each in tree_leaves((*arguments, *options.values(), out)):
            parts = [each] if isinstance(each, torch.Tensor) else vars(each).values() if is_dataclass(each) else []
            moved[self.name] += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
        return out

    monkeypatch.setattr(Operation, "__call__", counted)
    model.loss(tokens).total.backward()
    found = limits(config, 128, "fp8", ONE)
    # Beside the values there is a scale for 128 of them.
    of_quantisers = sum(moved[name] for name in QUANTISERS)
    assert found["quantise, transpose, 12 bits"] == pytest.approx(of_quantisers, rel=0.02)
    normed = 128 * (2 * (2 * 256 + 128 + 128) + 256)
    of_swiglu = moved["swiglu_tiles"] + moved["swiglu_backward"]
    assert found["norms and SwiGLU"] - 10 * normed == pytest.approx(of_swiglu, rel=0.02)
    assert 4 * normed == pytest.approx(moved["rms_norm"], rel=0.02)
    permuted = moved["permute"] + moved["unpermute"]
    backward = 128 * 2 * 256 * (3 + 5)
    assert found["router, sort, permute"] == pytest.approx(permuted + backward, rel=0.04)
