import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import dsv3
from dsv3.errors import RunError, UserError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights import safetensors_writer
from dsv3.weights.huggingface import from_pretrained, save_pretrained

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
    n_group=4, topk_group=2, max_position_embeddings=64, initializer_range=0.15,
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5,
    "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 100.0,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "no q-LoRA": {"q_lora_rank": None},
    "YaRN": {"rope_parameters": YARN},
    "YaRN, mscales unequal": {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.7}},
    "YaRN, no mscale_all_dim": {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
    "one group": {"n_group": 1, "topk_group": 1},
    "two shared experts, weights not normalised": {"n_shared_experts": 2, "norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 3},
}


def theirs(seed=0, **changes):
    """A random model of transformers, whose norms and routing biases are not the neutral ones."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    return model


def logits_of(model, tokens, **options):
    with torch.inference_mode():
        return model(tokens, **options).logits


def tokens_of(seed, shape=(2, 48)):
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def directory(tmp_path):
    """Ours, saved: MTP depth 2, several shards."""
    config = ModelConfig.preset("debug", num_nextn_predict_layers=2, vocab_size=96)
    save_pretrained(DeepSeekV3(config).initialize(0.05, seed=3), tmp_path / "model", max_shard_bytes=30_000)
    return tmp_path / "model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant, tmp_path, growing_cache):
    hf = theirs(**VARIANTS[variant])
    hf.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    tokens = tokens_of(1)
    expected = logits_of(hf, tokens)
    assert expected.std() > 0.3  # far above the tolerance
    torch.testing.assert_close(logits_of(ours, tokens), expected, atol=1e-4, rtol=0)

    # Prefill in two chunks, then token by token, in both with a cache.
    cache, steps = growing_cache(), []
    for start, end in [(0, 20), (20, 32), *((t, t + 1) for t in range(32, 48))]:
        positions = cache.begin(torch.arange(start, end).unsqueeze(0))
        steps.append(logits_of(ours, tokens[:, start:end], positions=positions, cache=cache))
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)
    past, their_steps = None, []
    with torch.inference_mode():
        for start, end in [(0, 32), *((t, t + 1) for t in range(32, 48))]:
            out = hf(tokens[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            their_steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), torch.cat(their_steps, dim=1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change", [{"rope_parameters": YARN}, {"n_group": 1, "topk_group": 1}, {"norm_topk_prob": False}]
)
def test_each_variant_matters_to_the_logits(change):
    """Otherwise the test above would pass with the feature left out."""
    tokens, plain, changed = tokens_of(1), theirs(), theirs(**change)
    changed.load_state_dict(plain.state_dict())
    assert (logits_of(plain, tokens) - logits_of(changed, tokens)).abs().max() > 0.01


def test_negative_biases_never_let_a_dropped_groups_expert_in(tmp_path, monkeypatch):
    hf = theirs()
    with torch.no_grad():
        for layer in hf.model.layers[1:]:
            # All biased affinities are negative, so that a mask of 0.0 would win against every kept expert.
            layer.mlp.gate.e_score_correction_bias.uniform_(-3.0, -2.0)
    hf.save_pretrained(tmp_path)
    ours, tokens = from_pretrained(tmp_path), tokens_of(2)
    expected = logits_of(hf, tokens)
    torch.testing.assert_close(logits_of(ours, tokens), expected, atol=1e-4, rtol=0)

    masked_fill = torch.Tensor.masked_fill
    monkeypatch.setattr(
        torch.Tensor,
        "masked_fill",
        lambda x, mask, value: masked_fill(x, mask, 0.0 if x.dim() == 3 and x.shape[1:] == (4, 4) else value),
    )
    assert (logits_of(ours, tokens) - expected).abs().max() > 0.01


def test_transformers_loads_ours_and_gives_our_logits(directory):
    ours = from_pretrained(directory)
    hf = DeepseekV3ForCausalLM.from_pretrained(directory)
    tokens = tokens_of(3)
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(hf, tokens), atol=1e-4, rtol=0)
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10_000, 10**9])
def test_round_trip_is_exact(dtype, max_shard_bytes, tmp_path):
    config = ModelConfig.preset("debug", num_nextn_predict_layers=2, n_shared_experts=2, extra={"use_cache": True})
    model = DeepSeekV3(config).initialize()
    for name, tensor in model.state_dict().items():
        if not name.endswith("e_score_correction_bias"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(tensor.to(dtype)))
    for block in model.blocks():
        if block.moe:
            block.moe.gate.e_score_correction_bias.normal_()
    save_pretrained(model, tmp_path, max_shard_bytes)
    loaded = dsv3.from_pretrained(str(tmp_path))
    assert loaded.config == config
    assert loaded.config.extra["use_cache"] is True
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert loaded.layers[1].moe.gate.e_score_correction_bias.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in loaded.parameters())

    again = tmp_path / "again"
    save_pretrained(loaded, again, max_shard_bytes)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    for file in tmp_path.glob("model*"):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_files_hold_the_released_names_and_shards_keep_their_size(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    placed = {}
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 30_000 or len(tensors) == 1
        placed.update(dict.fromkeys(tensors, file.name))
    assert placed == index["weight_map"]
    first = load_file(directory / placed["model.layers.3.embed_tokens.weight"])
    last = load_file(directory / placed["model.embed_tokens.weight"])
    assert torch.equal(first["model.layers.3.embed_tokens.weight"], last["model.embed_tokens.weight"])
    assert {"model.layers.4.eh_proj.weight", "model.layers.4.shared_head.head.weight"} <= set(placed)
    assert {"model.layers.1.mlp.experts.7.up_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"} <= set(
        placed
    )


def test_dtype_asked_for_is_given_except_to_the_routing_bias(directory):
    model = from_pretrained(directory, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
    exact = from_pretrained(directory).state_dict()
    assert torch.equal(model.lm_head.weight, exact["lm_head.weight"].bfloat16())
    assert model(tokens_of(0)).logits.dtype == torch.bfloat16


def test_mtp_tensors_all_absent_means_depth_0_with_one_line(tmp_path, caplog):
    theirs().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with caplog.at_level(logging.WARNING):
        model = from_pretrained(tmp_path)
    assert model.config.num_nextn_predict_layers == 0
    assert [record.message.split(":")[1] for record in caplog.records] == [" loading without MTP"]


def rewrite(directory, change):
    """Applies `change` to the dict of all tensors and saves them as one file."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_some_mtp_tensors_absent_is_refused(directory):
    rewrite(directory, lambda tensors: tensors.pop("model.layers.4.eh_proj.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of .*model\.layers\.4\.eh_proj\.weight"):
        from_pretrained(directory)


def test_copies_of_embedding_and_head_may_be_absent_or_differ_with_a_line(directory, caplog):
    def change(tensors):
        del tensors["model.layers.4.shared_head.head.weight"]
        tensors["model.layers.3.embed_tokens.weight"] += 1

    expected = from_pretrained(directory).state_dict()
    rewrite(directory, change)
    with caplog.at_level(logging.WARNING):
        found = from_pretrained(directory).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [record.args[1] for record in caplog.records] == ["model.layers.3.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"lacks 1 of .*experts\.3\.up_proj"),
        (lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": torch.zeros(2)}), r"model\.safetensors: unexpected .*gate_proj\.bias"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"model\.safetensors: tensor model\.norm\.weight has shape \[33\].*\[32\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}), r"model\.norm\.weight is I32, expected F32 or BF16"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32).to(torch.float8_e4m3fn)}), r"model\.norm\.weight is F8_E4M3, expected F32 or BF16"),
        (lambda t: t.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(16, 32).bfloat16()}), r"experts\.3\.up_proj\.weight is BF16.*gate_proj\.weight is F32"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(change, message, directory):
    rewrite(directory, change)
    with pytest.raises(UserError, match=message):
        from_pretrained(directory)


def shard(directory):
    return sorted(directory.glob("*.safetensors"))[1]


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(directory):
    data = shard(directory).read_bytes()
    shard(directory).write_bytes(data[: len(data) - 100])


def move_to_pickle(directory):
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model-00002-of-\d+\.safetensors \([\d,]+ bytes\) is truncated"),
        (lambda d: shard(d).write_bytes(b""), r"model-00002-of-\d+\.safetensors \(0 bytes\) is truncated"),
        (lambda d: shard(d).unlink(), r"model-00002-of-\d+\.safetensors, which does not exist"),
        (lambda d: (d / "config.json").unlink(), r"config\.json does not exist"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json holds a list"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), r"but no index"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[1]"), r"is no index"),
        (move_to_pickle, r"pytorch_model\.bin\), which can run any code"),
        (shutil.rmtree, r"is no directory"),
        (lambda d: edit_index(d, lambda m: m.update({"lm_head.weight": "../x.safetensors"})), r"lm_head\.weight in '\.\./x"),
        (lambda d: edit_index(d, lambda m: m.update({"more": shard(d).name})), r"places tensor more in .* lacks it"),
        (lambda d: edit_index(d, lambda m: m.pop("lm_head.weight")), r"holds tensor lm_head\.weight, but .* places it in None"),
    ],
)  # fmt: skip
def test_damaged_directories_are_refused(damage, message, directory):
    damage(directory)
    with pytest.raises(UserError, match=message):
        from_pretrained(directory)


def test_config_of_another_model_is_refused(directory):
    config = ModelConfig.from_hf(directory).replace(vocab_size=97)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    with pytest.raises(UserError, match=r"weight has shape \[96, 32\].*\[97, 32\]"):
        from_pretrained(directory)


def test_saving_replaces_weights_and_keeps_other_files(directory):
    (directory / "tokenizer.json").write_text("{}")
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize()
    save_pretrained(model, directory)
    assert {file.name for file in directory.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert torch.equal(from_pretrained(directory).lm_head.weight, model.lm_head.weight)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_full_disk_leaves_what_was_there(directory, monkeypatch):
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full(path, advance, **options):
        write_shard(path, advance, **options)
        if path.name.startswith("model-00003"):
            raise OSError(28, "No space left on device")

    write_shard = safetensors_writer.write_shard
    monkeypatch.setattr(safetensors_writer, "write_shard", full)
    with pytest.raises(RunError, match="No space left"):
        save_pretrained(DeepSeekV3(ModelConfig.preset("debug")).initialize(), directory, max_shard_bytes=30_000)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_saving_refuses_other_dtypes_and_unwritable_places(tmp_path):
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not write"):
        save_pretrained(model, tmp_path / "file")
    with pytest.raises(UserError, match=r"embed_tokens\.weight is torch\.float16"):
        save_pretrained(model.half(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
