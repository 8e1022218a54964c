import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig, RopeScaling
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.deepseek import find_config, is_deepseek, read_config, read_headers
from dsv3.weights.huggingface import save_pretrained
from dsv3.weights.opening import load_model
from dsv3.weights.safetensors import read_tensor
from tests.weights.inference_layout import split

CONFIG = ModelConfig.preset(
    "debug", vocab_size=320, hidden_size=160, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
    n_shared_experts=4, num_attention_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=64,
    v_head_dim=64,
)  # fmt: skip
"""All that four ranks share divides by four, blocks of 128 included; widths of 160 and 96 leave ragged blocks."""
PUBLISHED = {
    "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
    "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8,
    "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
}  # fmt: skip
"""The values of DeepSeek's config for the 671B model."""
ARGUMENTS = {
    "vocab_size": 320, "dim": 160, "inter_dim": 512, "moe_inter_dim": 128, "n_layers": 2, "n_dense_layers": 1, "n_heads": 8,
    "n_routed_experts": 8, "n_shared_experts": 4, "n_activated_experts": 2, "n_expert_groups": 4, "n_limited_groups": 2,
    "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "max_seq_len": 128, "original_seq_len": 128,
}  # fmt: skip
"""Those of `CONFIG`."""


def shards_of(released, directory, ranks):
    """Files of a model of `CONFIG`."""
    return split(released, directory, ranks, experts=CONFIG.n_routed_experts, mtp="model.layers.2.")


def tensors_of(tmp_path, config=CONFIG):
    """A random model's released tensors in FP32."""
    save_pretrained(DeepSeekV3(config).initialize("fan_in", seed=3), tmp_path / "hf")
    return load_file(tmp_path / "hf" / "model.safetensors")


def quantised(released):
    """Random bytes instead of every linear layer's matrix, and random scales, one a block."""
    made = {}
    for name, tensor in released.items():
        made[name] = tensor
        if tensor.dim() == 2 and not re.search(r"embed_tokens|head|mlp\.gate\.|eh_proj", name):
            rows, columns = tensor.shape
            made[name] = torch.randint(0, 127, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128))
    return made


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stored", ["FP32", "FP8", "no q-LoRA"])
def test_every_tensor_comes_back_bit_for_bit(ranks, stored, tmp_path):
    released = tensors_of(tmp_path, CONFIG.replace(q_lora_rank=None) if stored == "no q-LoRA" else CONFIG)
    released = quantised(released) if stored == "FP8" else released
    directory = shards_of(released, tmp_path / "shards", ranks)
    expected = {name: tensor for name, tensor in released.items() if not name.startswith("model.layers.2.")}
    headers = read_headers(directory)
    assert headers.keys() == expected.keys()
    for name, tensor in expected.items():
        assert headers[name].shape == tensor.shape
        assert headers[name].dtype == {"float32": "F32", "float8_e4m3fn": "F8_E4M3"}[str(tensor.dtype)[6:]]
    read = {name: read_tensor(stored) for name, stored in headers.items()}
    assert read.keys() == expected.keys()
    assert [name for name in expected if not same(read[name], expected[name])] == []


def test_the_model_is_the_one_of_the_released_files(tmp_path):
    directory = shards_of(tensors_of(tmp_path), tmp_path / "shards", 4)
    written(directory, ARGUMENTS)
    model, tokenizer = load_model(directory)
    original, _ = load_model(tmp_path / "hf")
    assert model.config == CONFIG.replace(num_nextn_predict_layers=0)
    assert tokenizer == directory
    tokens = torch.arange(40).view(1, 40)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
    written(directory, {**ARGUMENTS, "vocab_size": 324})
    with pytest.raises(UserError, match=r"(?:lm_head|embed_tokens)\.weight has shape \[320, 160\], .* \[324, 160\]"):
        load_model(directory)


def test_what_every_rank_holds_whole_is_read_once(tmp_path):
    headers = read_headers(shards_of(tensors_of(tmp_path), tmp_path / "shards", 4))
    pieces = {name: [piece.file.name[:6] for piece in each.pieces] for name, each in headers.items()}
    assert pieces["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == ["model0"]
    assert pieces["model.layers.1.mlp.gate.e_score_correction_bias"] == ["model0"]
    assert pieces["model.layers.1.mlp.shared_experts.down_proj.weight"] == ["model0", "model1", "model2", "model3"]
    assert pieces["model.layers.1.mlp.experts.5.down_proj.weight"] == ["model2"]
    assert headers["model.layers.1.mlp.experts.5.down_proj.weight"].pieces[0].name == "layers.1.ffn.experts.5.w2.weight"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two ranks' files."""
    root = tmp_path_factory.mktemp("two ranks")
    return shards_of(tensors_of(root), root / "shards", 2)


def edited(shards, tmp_path, rank, edit):
    """A copy of the shards whose one rank was changed."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    file = copy / f"model{rank}-mp2.safetensors"
    held = load_file(file)
    edit(held)
    save_file(held, file)
    return copy


EXPERT = "layers.1.ffn.experts.{}.w1.weight"


def drop_expert(number):
    return lambda held: [held.pop(name) for name in list(held) if f".experts.{number}." in name]


@pytest.mark.parametrize(
    ("rank", "edit", "message"),
    [
        (1, lambda t: t.pop("norm.weight"), r"model1-mp2\.safetensors lacks norm\.weight \(model\.norm\.weight\), which rank 0 holds"),
        (0, lambda t: t.pop("head.weight"), r"model0-mp2\.safetensors lacks head\.weight"),
        (1, lambda t: t.update({"head.weight": torch.zeros(5, 160)}), r"model1-mp2\.safetensors: head\.weight is F32 \[5, 160\], but rank 0 holds F32 \[160, 160\]"),
        (1, lambda t: t.update({"norm.weight": torch.zeros(160).bfloat16()}), r"norm\.weight is BF16 \[160\], but rank 0 holds F32"),
        (1, lambda t: t.update({"layers.0.attn.wo.bias": torch.zeros(1)}), r"unknown tensor layers\.0\.attn\.wo\.bias"),
        (0, lambda t: t.update({"layers.0.attn.wz.weight": torch.zeros(1)}), r"unknown tensor layers\.0\.attn\.wz\.weight"),
        (0, lambda t: t.update({"model.norm.weight": torch.zeros(1)}), r"unknown tensor model\.norm\.weight: expected the names"),
        (0, lambda t: t.update({EXPERT.format(7): torch.zeros(128, 160)}), r"experts\.7\.gate_proj\.weight is in the files of ranks 0, 1"),
        (0, drop_expert(2), r"no file holds expert 2 of model\.layers\.1"),
        (1, drop_expert(7), r"model1-mp2\.safetensors holds 3 experts of model\.layers\.1, where model0-mp2\.safetensors holds 4"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_refused(rank, edit, message, shards, tmp_path):
    with pytest.raises(UserError, match=message):
        read_headers(edited(shards, tmp_path, rank, edit))


def test_a_vector_where_matrices_are_cut_is_refused(shards, tmp_path):
    copy = shards
    for rank in range(2):
        copy = edited(copy, tmp_path / str(rank), rank, lambda t: t.update({"head.weight": torch.zeros(4)}))
    with pytest.raises(UserError, match=r"head\.weight has shape \[4\]: expected a part of a matrix"):
        read_headers(copy)


def test_incomplete_and_mixed_sets_are_refused(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    assert is_deepseek(copy)
    assert not is_deepseek(tmp_path)
    shutil.copy(copy / "model1-mp2.safetensors", copy / "model2-mp2.safetensors")
    with pytest.raises(UserError, match=r"has model2-mp2\.safetensors: expected ranks 0 to 1"):
        read_headers(copy)
    (copy / "model2-mp2.safetensors").rename(copy / "model0-mp4.safetensors")
    with pytest.raises(UserError, match="has files of 2 and 4 ranks: expected those of one conversion"):
        read_headers(copy)
    (copy / "model0-mp4.safetensors").unlink()
    (copy / "model1-mp2.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model1-mp2\.safetensors \(5 bytes\) is truncated"):
        read_headers(copy)
    (copy / "model1-mp2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model1-mp2\.safetensors: expected the files of all 2 ranks"):
        read_headers(copy)
    (copy / "model0-mp2.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\{rank\}-mp\{N\}\.safetensors"):
        read_headers(copy)


def written(tmp_path, values, name="config.json"):
    (tmp_path / name).write_text(json.dumps(values))
    return tmp_path / name


def test_the_published_config_means_the_published_network(tmp_path):
    config = read_config(written(tmp_path, PUBLISHED))
    yarn = RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    expected = ModelConfig.preset(
        "deepseek-v3", num_nextn_predict_layers=0, rope_scaling=yarn, max_position_embeddings=163840
    )
    assert config == expected
    assert config.to_hf()["torch_dtype"] == "bfloat16"
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}  # fmt: skip
    assert config.to_hf()["quantization_config"] == quantization
    newer = read_config(written(tmp_path, {**PUBLISHED, "scale_fmt": "ue8m0"}))
    assert newer.to_hf()["quantization_config"] == {**quantization, "scale_fmt": "ue8m0"}


def test_absent_fields_mean_what_they_do_in_their_code(tmp_path):
    config = read_config(written(tmp_path, {"score_func": "sigmoid", "max_seq_len": 4096, "original_seq_len": 4096}))
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (2048, 27, 64)
    assert (config.q_lora_rank, config.n_group, config.routed_scaling_factor) == (None, 1, 1.0)
    assert (config.rope_scaling, config.max_position_embeddings) == (None, 4096)
    assert "quantization_config" not in config.extra


def test_yarn_begins_above_the_original_length(tmp_path):
    values = {**PUBLISHED, "max_seq_len": 4097, "mscale": 0.707, "rope_factor": 2.5, "rope_theta": 500}
    config = read_config(written(tmp_path, values))
    assert config.rope_scaling == RopeScaling(factor=2.5, mscale=0.707, mscale_all_dim=0.707)
    assert config.rope_scaling.rotation_factor == 1.0
    assert (config.max_position_embeddings, config.rope_theta) == (10240, 500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_func": "softmax"}, r"config\.json: score_func = 'softmax' but this network has 'sigmoid'"),
        ({"n_layer": 3}, r"unknown field 'n_layer': did you mean 'n_layers'"),
        ({"dim": "7168"}, r"dim = '7168': expected a whole number"),
        ({"n_heads": True}, r"n_heads = True: expected a whole number"),
        ({"rope_theta": None}, r"rope_theta = None: expected a number"),
        ({"score_func": 1}, r"score_func = 1: expected a text"),
        ({"dtype": "fp4"}, r"dtype = 'fp4': expected 'bf16' or 'fp8'"),
        ({"scale_fmt": "e5m2"}, r"scale_fmt = 'e5m2': expected 'ue8m0', or none"),
        ({"n_expert_groups": 7}, r"config\.json: model\.n_group = 7: expected a divisor"),
    ],
)
def test_configs_of_other_networks_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_config(written(tmp_path, {**PUBLISHED, **change}))


def test_an_absent_score_function_is_softmax(tmp_path):
    values = {key: value for key, value in PUBLISHED.items() if key != "score_func"}
    with pytest.raises(UserError, match="score_func = 'softmax', which is what an absent one means, but"):
        read_config(written(tmp_path, values))


def test_the_config_is_found_by_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"no config of DeepSeek's inference code: .* copy the model's own there"):
        find_config(tmp_path)
    written(tmp_path, {"hidden_size": 7168})
    with pytest.raises(UserError, match="no config of DeepSeek's"):
        find_config(tmp_path)
    only = written(tmp_path, PUBLISHED, "config_671B.json")
    (tmp_path / "config_broken.json").write_text("{")
    assert find_config(tmp_path) == only
    written(tmp_path, PUBLISHED, "config_v3.1.json")
    with pytest.raises(UserError, match=r"has config_671B\.json, config_v3\.1\.json: expected one file"):
        find_config(tmp_path)
    named = written(tmp_path, PUBLISHED)
    assert find_config(tmp_path) == named


def test_config_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist: expected the fields of ModelArgs"):
        read_config(tmp_path / "config.json")
    with pytest.raises(UserError, match="holds a list, expected an object"):
        read_config(written(tmp_path, []))
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(tmp_path / "config.json")
