import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.checkpoint import save_checkpoint
from dsv3.weights.describe import Share, describe
from dsv3.weights.huggingface import save_pretrained
from tests.weights.inference_layout import split
from tests.weights.sparse import published, write_sparse

CONFIG = ModelConfig.preset("debug")
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
INDEX = "model.safetensors.index.json"


def sparse(directory, config, shard_bytes, **quantization):
    """A directory of the released form without values."""
    files = write_sparse(directory, {name: (e.dtype, e.shape) for name, e in published(config).items()}, shard_bytes)
    (directory / "config.json").write_text(
        json.dumps({**config.to_hf(), "quantization_config": {**FP8, **quantization}})
    )
    return files


def test_the_published_model_is_counted_exactly_and_soon(tmp_path):
    """91,991 tensors and 688,574,839,360 bytes in 163 files, as DeepSeek's own headers say; the main model apart."""
    files = sparse(tmp_path, ModelConfig.preset("deepseek-v3"), 4_250_000_000)
    start = time.process_time()
    found = describe(tmp_path)
    assert time.process_time() - start < 30
    assert len(files) == len(found.files) == 163
    assert found.total == Share(91_991, 684_489_845_504, 688_574_839_360)
    assert found.main == Share(90_427, 671_026_419_200, 673_150_611_808)
    assert found.mtp == Share(1_564, 13_463_426_304, 15_424_227_552)
    assert found.dtypes["F8_E4M3"].tensors == 45_808
    assert found.dtypes["F32"] == Share(45_867, 59 * 256, 4 * (41_540_496 + 59 * 256))
    assert (found.fit.missing, found.fit.unexpected, found.fit.misfits, found.problems) == ([], [], {}, [])
    expected = {"method": "fp8", "format": "e4m3", "block": [128, 128], "scale_format": "float32", "tensors": 45_808}
    assert found.quantization == expected


def save(directory, config=CONFIG):
    """A random model in FP32; its state dict."""
    model = DeepSeekV3(config).initialize("fan_in", seed=1)
    save_pretrained(model, directory)
    return model.state_dict()


def share_of(tensors):
    counts = [tensor.numel() for tensor in tensors]
    return Share(len(counts), sum(counts), 4 * sum(counts))


def test_a_directory_of_ours(tmp_path):
    save(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    found = describe(tmp_path)
    assert found.config == CONFIG
    assert found.main == share_of(tensor for name, tensor in held.items() if ".layers.3." not in name)
    assert found.mtp == share_of(tensor for name, tensor in held.items() if ".layers.3." in name)
    assert found.dtypes == {"F32": found.total}
    assert (len(found.files), found.file_bytes) == (1, (tmp_path / "model.safetensors").stat().st_size)
    assert (found.fit.missing, found.fit.unexpected, found.fit.misfits, found.problems) == ([], [], {}, [])
    assert (found.quantization, found.tokenizer) == (None, False)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert describe(tmp_path).tokenizer


def test_a_training_checkpoint_or_its_run(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in save(tmp_path / "hf").items()}
    tensors = {"model": state, "optimizer": {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.uint8)}}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    save_checkpoint(checkpoint, tensors, {"model": CONFIG.to_hf()}, {"tokenizer/tokenizer.json": b"{}"})
    found, theirs = describe(tmp_path / "run"), describe(tmp_path / "hf")
    assert found.layout == "training checkpoint"
    assert found.main == Share(theirs.main.tensors, theirs.main.parameters, 2 * theirs.main.parameters)
    assert found.mtp.tensors == theirs.mtp.tensors - 2
    assert found.mtp.bytes == theirs.mtp.bytes // 2 - 2 * 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert found.beside == {"optimizer": Share(2, 17, 53)}
    assert found.tokenizer
    assert (found.fit.missing, found.fit.unexpected, found.fit.misfits, found.problems) == ([], [], {}, [])
    data = next(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="the checkpoint is incomplete"):
        describe(checkpoint)


def test_deepseeks_own_layout(tmp_path):
    save(tmp_path / "hf", CONFIG.replace(num_nextn_predict_layers=0))
    directory = tmp_path / "shards"
    split(load_file(tmp_path / "hf" / "model.safetensors"), directory, 2, experts=8, mtp="model.layers.3.")
    arguments = {
        "vocab_size": 320, "dim": 32, "inter_dim": 48, "moe_inter_dim": 16, "n_layers": 3, "n_dense_layers": 1,
        "n_heads": 2, "n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 2, "n_expert_groups": 4,
        "n_limited_groups": 2, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(arguments))
    found = describe(directory)
    assert (found.layout, len(found.files)) == ("DeepSeek inference", 2)
    assert found.main == describe(tmp_path / "hf").main == found.total
    assert (found.fit.missing, found.fit.unexpected, found.fit.misfits, found.problems) == ([], [], {}, [])
    (directory / "config.json").write_text(json.dumps({**arguments, "vocab_size": 640}))
    assert len(describe(directory).fit.misfits) == 2
    assert (
        "model.embed_tokens.weight has shape [320, 32], expected [640, 32]" in describe(directory).fit.misfits.values()
    )


def test_what_an_incomplete_download_lacks(tmp_path):
    files = sparse(tmp_path, CONFIG, 10_000)
    placed = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    absent, damaged = files[1], files[2]
    absent.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = describe(tmp_path)
    assert len(found.files) == len(files) - 1
    assert f"in {absent.name}, which does not exist" in found.problems[0]
    assert f"{damaged} (" in found.problems[1]
    assert "is truncated" in found.problems[1]
    copies = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert set(found.fit.missing) == {n for n, file in placed.items() if file in (absent.name, damaged.name)} - copies
    for file in files:
        file.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has no file with weights that can be read: .*00001.*, which does not exist"):
        describe(tmp_path)


def test_mtp_modules_that_were_left_out(tmp_path):
    main = {name: (e.dtype, e.shape) for name, e in published(CONFIG).items() if ".layers.3." not in name}
    write_sparse(tmp_path, main, 10**9)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    found = describe(tmp_path)
    assert found.problems == ["none of the 1 MTP modules that the config announces is stored"]
    assert found.config.num_nextn_predict_layers == 0
    assert (found.fit.missing, found.mtp) == ([], Share(0, 0, 0))


def test_tensors_that_do_not_fit(tmp_path):
    """Each of them is named, and the rest described all the same."""
    save(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    gate = "model.layers.1.mlp.gate.weight"
    held[gate] = held[gate][:7].contiguous()
    held["model.norm.weight"] = held["model.norm.weight"].half()
    held["model.layers.0.self_attn.o_proj.weight"] = held["model.layers.0.self_attn.o_proj.weight"].to(
        torch.float8_e4m3fn
    )
    held["model.extra"] = torch.zeros(2, 3, dtype=torch.int64)
    del held["lm_head.weight"]
    save_file(held, tmp_path / "model.safetensors")
    found = describe(tmp_path)
    assert found.fit.missing == ["model.layers.0.self_attn.o_proj.weight_scale_inv", "lm_head.weight"]
    assert found.fit.unexpected == ["model.extra"]
    assert found.dtypes["I64"] == Share(1, 6, 48)
    assert sorted(found.fit.misfits.values()) == [
        f"{gate} has shape [7, 32], expected [8, 32]",
        "model.norm.weight is F16, expected F32 or BF16",
    ]
    stated = {"method": None, "format": "e4m3", "block": None, "scale_format": "float32", "tensors": 1}
    assert found.quantization == stated


def test_files_that_contradict_one_another(tmp_path):
    files = sparse(tmp_path, CONFIG, 20_000, scale_fmt="ue8m0")
    assert describe(tmp_path).quantization["scale_format"] == "ue8m0"
    save_file({"model.norm.weight": torch.ones(32)}, files[0])
    problems = describe(tmp_path).problems
    assert [each for each in problems if "tensor model.norm.weight is in" in each]


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        describe(tmp_path)
    with pytest.raises(UserError, match="holds no model"):
        describe(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    with pytest.raises(UserError, match="holds no weights: expected"):
        describe(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds weights as pickles"):
        describe(tmp_path)
