import json

import pytest

from dsv3.errors import UserError
from dsv3.model.config import PRESETS, ModelConfig, RopeScaling

PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_the_published_config_is_the_preset_with_its_long_context():
    config = ModelConfig.from_hf(PUBLISHED)
    yarn = dict(max_position_embeddings=163840, initializer_range=0.02, rope_scaling=RopeScaling())
    assert config == ModelConfig.preset("deepseek-v3", **yarn)
    written = config.to_hf()
    assert {key: written[key] for key in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_round_trip(preset, tmp_path):
    config = ModelConfig.preset(preset, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 64})
    assert ModelConfig.from_hf(config.to_hf()) == config
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.preset(preset).to_hf()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == ModelConfig.preset(preset)


def test_the_newer_spelling_of_rope_means_the_same():
    newer = {key: value for key, value in PUBLISHED.items() if key not in ("rope_scaling", "rope_theta")}
    scaling = {key: value for key, value in PUBLISHED["rope_scaling"].items() if key != "type"}
    newer["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000, **scaling}
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(PUBLISHED)
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    assert ModelConfig.from_hf(newer).rope_scaling is None
    assert ModelConfig.from_hf(newer).rope_theta == 50000.0


def test_yarn_without_mscale_all_dim_scales_cos_and_sin_instead_of_the_logits():
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    config = ModelConfig.from_hf({**PUBLISHED, "rope_scaling": scaling})
    assert config.softmax_scale == 192**-0.5
    assert config.rope_scaling.rotation_factor == pytest.approx(1.36889, abs=1e-5)


def test_absent_fields_mean_what_other_readers_take_them_for():
    optional = (
        "num_nextn_predict_layers",
        "n_group",
        "topk_group",
        "q_lora_rank",
        "first_k_dense_replace",
        "rope_scaling",
    )
    config = ModelConfig.from_hf({key: value for key, value in PUBLISHED.items() if key not in optional})
    assert (config.num_nextn_predict_layers, config.n_group, config.topk_group) == (0, 1, 1)
    assert (config.q_lora_rank, config.first_k_dense_replace, config.rope_scaling) == (None, 0, None)


def test_unknown_fields_are_kept_and_written_back():
    config = ModelConfig.from_hf({**PUBLISHED, "my_field": {"a": [1]}})
    assert config.extra["my_field"] == {"a": [1]}
    assert config.to_hf()["my_field"] == {"a": [1]}
    assert config.replace(vocab_size=256).to_hf()["my_field"] == {"a": [1]}
    assert "num_key_value_heads" not in config.extra


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu', but this network has 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads = 8, but MLA has one per attention head \(128\)"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling type 'linear': expected 'yarn'"),
        ({"hidden_size": "7168"}, r"model\.hidden_size = '7168': expected a whole number above 0"),
        ({"n_routed_experts": 255}, r"model\.n_group = 8: expected a divisor of n_routed_experts = 255"),
    ],
)
def test_configs_of_other_networks_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf({**PUBLISHED, **change})


def test_config_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 1}')
    with pytest.raises(UserError, match=r"config\.json lacks hidden_size, .*kv_lora_rank"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"model\.vocab_size = 0: expected a whole number above 0"),
        ({"hidden_size": 32.0}, r"model\.hidden_size = 32\.0"),
        ({"num_hidden_layers": True}, r"model\.num_hidden_layers = True"),
        ({"num_nextn_predict_layers": -1}, r"model\.num_nextn_predict_layers = -1: expected a whole number, 0 or more"),
        ({"q_lora_rank": 0}, r"model\.q_lora_rank = 0: expected None or"),
        ({"qk_rope_head_dim": 3}, r"model\.qk_rope_head_dim = 3: expected an even number"),
        ({"n_group": 3}, r"model\.n_group = 3: expected a divisor"),
        ({"topk_group": 5}, r"model\.topk_group = 5: expected at most n_group = 4"),
        ({"topk_group": 1, "num_experts_per_tok": 3}, r"model\.num_experts_per_tok = 3: expected at most .* = 2"),
        ({"n_group": 8}, r"model\.n_group = 8: expected 1, or groups of at least 2"),
        ({"hidden_sise": 1}, r"unknown model field 'hidden_sise': did you mean 'hidden_size'"),
        ({"rope_scaling": {"fctor": 4}}, r"unknown model field 'rope_scaling\.fctor': did you mean 'factor'"),
    ],
)
def test_contradictions_are_refused_with_the_fields_name(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.preset("debug", **changes)


def test_unknown_presets_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'tinny': did you mean 'tiny'"):
        ModelConfig.preset("tinny")


def test_changes_are_checked_again():
    with pytest.raises(UserError, match="topk_group"):
        ModelConfig.preset("debug").replace(topk_group=9)
