import json

import pytest

from dsv3.errors import UserError
from dsv3.model.config import PRESETS, ModelConfig, RopeScaling

PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
"""The released config.json, value for value."""


def test_the_published_config_is_the_preset_with_its_long_context():
    config = ModelConfig.from_hf(PUBLISHED)
    yarn = dict(max_position_embeddings=163840, initializer_range=0.02, rope_scaling=RopeScaling())
    assert config == ModelConfig.preset("deepseek-v3", **yarn)


def test_the_published_config_is_written_back_value_for_value(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    written = ModelConfig.from_hf(tmp_path).to_hf()
    # As JSON, so that 10000 is not 10000.0; the one more field is what transformers takes for granted.
    assert json.dumps(written, sort_keys=True) == json.dumps({**PUBLISHED, "rope_interleave": True}, sort_keys=True)
    assert ModelConfig.from_hf(written).to_hf() == written


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


def test_both_spellings_of_rope_may_be_given_when_they_agree():
    scaling = {key: value for key, value in PUBLISHED["rope_scaling"].items() if key != "type"}
    newer = {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 10000.0,
        "truncate": True,
        "attention_factor": None,
        **scaling,
    }
    both = {**PUBLISHED, "rope_parameters": newer}
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(PUBLISHED)
    assert "rope_parameters" not in ModelConfig.from_hf(both).extra
    theta = {**PUBLISHED, "rope_parameters": {"rope_theta": 10000.0}, "rope_theta": None}
    assert ModelConfig.from_hf(theta) == ModelConfig.from_hf(PUBLISHED)
    assert ModelConfig.from_hf({**PUBLISHED, "rope_scaling": None}).rope_scaling is None
    absent = {key: value for key, value in PUBLISHED.items() if key != "rope_theta"}
    assert ModelConfig.from_hf(absent).rope_theta == 10000.0


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


def test_unknown_fields_are_kept_and_written_back_in_order():
    unknown = {"zeta": 1, "my_field": {"a": [1]}, "alpha": None, "auto_map": {"AutoConfig": "x.Y"}}
    config = ModelConfig.from_hf({**unknown, **PUBLISHED})
    written = config.to_hf()
    assert [key for key in written if key in unknown] == list(unknown)
    assert {key: written[key] for key in unknown} == unknown
    changed = config.replace(vocab_size=256).to_hf()
    assert {key: changed[key] for key in unknown} == unknown
    ours = ("num_key_value_heads", "qk_head_dim", "head_dim", "rope_parameters", "model_type")
    derived = {"qk_head_dim": 192, "head_dim": 64, "rope_parameters": {"rope_theta": 10000}}
    assert not set(ours) & ModelConfig.from_hf({**PUBLISHED, **derived}).extra.keys()


YARN = PUBLISHED["rope_scaling"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"model_type = 'llama', expected 'deepseek_v3'"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures = \['LlamaForCausalLM'\], but this network is"),
        ({"architectures": "DeepseekV3ForCausalLM"}, r"architectures = 'DeepseekV3ForCausalLM', but"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu', but this network has 'silu'"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax', but this network has 'sigmoid'"),
        ({"topk_method": "group_limited_greedy"}, r"topk_method = 'group_limited_greedy', but this network has 'noaux_tc'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads = 8, expected 128 \(MLA has one per attention head\)"),
        ({"qk_head_dim": 128}, r"qk_head_dim = 128, expected 192 \(qk_nope_head_dim \+ qk_rope_head_dim\)"),
        ({"q_lora_rank": 0}, r"model\.q_lora_rank = 0: expected None or a whole number above 0"),
        ({"n_routed_experts": 255}, r"model\.n_group = 8: expected a divisor of n_routed_experts = 255"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling type 'linear': expected 'yarn'"),
        ({"rope_scaling": "yarn"}, r"rope_scaling = 'yarn', expected an object of fields and values, or null"),
        ({"rope_scaling": {**YARN, "fctor": 2}}, r"unknown field 'rope_scaling\.fctor': did you mean 'factor'"),
        ({"rope_scaling": {**YARN, "rope_type": "default"}}, r"rope_scaling\.rope_type = 'default', but rope_scaling\.type = 'yarn'"),
        ({"rope_scaling": {**YARN, "factor": "40"}}, r"model\.rope_scaling\.factor = '40': expected a number above 0"),
        ({"rope_scaling": {**YARN, "mscale": -1}}, r"model\.rope_scaling\.mscale = -1: expected a number, 0 or more"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 4096.0}}, r"model\.rope_scaling\.original_max_position_embeddings = 4096\.0: expected a whole"),
        ({"rope_parameters": {**YARN, "factor": 32}}, r"rope_parameters\.factor = 32, but rope_scaling\.factor = 40: expected the same"),
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters\.rope_type = 'default', but rope_scaling\.type = 'yarn'"),
        ({"rope_parameters": {"rope_theta": 5e5}}, r"rope_theta = 10000, but rope_parameters\.rope_theta = 500000\.0"),
        ({"rope_parameters": {"truncate": False}}, r"rope_parameters\.truncate = False, but this network has True"),
        ({"rope_parameters": {"attention_factor": 1.2}}, r"rope_parameters\.attention_factor = 1\.2, but this network has None"),
        ({"hidden_size": "7168"}, r"model\.hidden_size = '7168': expected a whole number above 0"),
        ({"num_hidden_layers": 61.0}, r"model\.num_hidden_layers = 61\.0: expected a whole number"),
        ({"n_shared_experts": None}, r"model\.n_shared_experts = None: expected a whole number, 0 or more"),
        ({"eos_token_id": [1, 2]}, r"model\.eos_token_id = \[1, 2\]: expected a whole number, 0 or more"),
        ({"norm_topk_prob": "true"}, r"model\.norm_topk_prob = 'true': expected true or false"),
        ({"routed_scaling_factor": "2.5"}, r"model\.routed_scaling_factor = '2\.5': expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, r"model\.rms_norm_eps = nan: expected a number above 0"),
        ({"rope_theta": True}, r"model\.rope_theta = True: expected a number above 0"),
    ],
)  # fmt: skip
def test_configs_of_other_networks_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=f"^config: {message}"):
        ModelConfig.from_hf({**PUBLISHED, **change})
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **change}))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        ModelConfig.from_hf(tmp_path)


def test_how_weights_are_stored_is_none_of_the_networks_business():
    """Files in other formats than FP8 blocks are refused where they are read."""
    config = ModelConfig.from_hf({**PUBLISHED, "quantization_config": {"quant_method": "awq"}})
    assert config.to_hf()["quantization_config"] == {"quant_method": "awq"}
    assert config == ModelConfig.from_hf(PUBLISHED)


def test_config_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 1}')
    with pytest.raises(UserError, match=r"config\.json: it lacks hidden_size, .*kv_lora_rank"):
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
