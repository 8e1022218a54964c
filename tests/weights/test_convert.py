import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.errors import RunError, UserError
from dsv3.model.block import Pass
from dsv3.model.config import ModelConfig
from dsv3.model.rope import rotations
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights import convert, jobs
from dsv3.weights.checkpoint import save_checkpoint
from dsv3.weights.convert import export_weights, import_weights, plan_import
from dsv3.weights.huggingface import from_pretrained, save_pretrained
from dsv3.weights.opening import load_model
from dsv3.weights.safetensors import read_headers, read_tensor
from tests.weights.sparse import published, write_sparse

E4M3 = torch.float8_e4m3fn
CONFIGS = {
    "MTP 2, two shared experts": dict(num_nextn_predict_layers=2, n_shared_experts=2),
    "no MTP, no q-LoRA, one group": dict(num_nextn_predict_layers=0, q_lora_rank=None, n_group=1, topk_group=1),
    # Blocks of 128 x 128 that end inside: 150 = 128 + 22, and a latent with its key of 572 + 4 = 576 rows.
    "ragged blocks": dict(hidden_size=200, moe_intermediate_size=150, intermediate_size=260, kv_lora_rank=572),
}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several files a checkpoint."""
    monkeypatch.setattr(convert, "FILE_BYTES", 100_000)


def random_model(seed=0, **changes):
    """Biases and norms that are not the neutral ones."""
    model = DeepSeekV3(ModelConfig.preset("debug", **changes)).initialize(0.05, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "bias" in name:
                tensor.normal_()
    return model


def tensors_of(directory):
    """All of a Hugging Face directory, as bytes."""
    return {
        name: (stored.dtype, read_tensor(stored).view(torch.uint8)) for name, stored in read_headers(directory).items()
    }


def assert_same_files(a, b, configs=True):
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, (dtype, values) in first.items():
        assert second[name][0] == dtype, name
        assert torch.equal(values, second[name][1]), name
    assert not configs or (a / "config.json").read_text() == (b / "config.json").read_text()


def same_state(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, E4M3])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_published_to_checkpoint_to_published_is_exact(changes, dtype, tmp_path):
    save_pretrained(random_model(**changes), tmp_path / "fp32")
    export_weights(tmp_path / "fp32", tmp_path / "hf", dtype, max_shard_bytes=150_000)
    import_weights(plan_import(tmp_path / "hf"), tmp_path / "checkpoint")
    export_weights(tmp_path / "checkpoint", tmp_path / "again", max_shard_bytes=250_000)
    assert_same_files(tmp_path / "hf", tmp_path / "again")
    found = {each.dtype for each in read_headers(tmp_path / "again").values()}
    assert found == {None: {"F32"}, torch.bfloat16: {"BF16", "F32"}, E4M3: {"F8_E4M3", "BF16", "F32"}}[dtype]


@pytest.mark.parametrize("dtype", [None, E4M3])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_checkpoint_to_published_to_checkpoint_is_exact(changes, dtype, tmp_path):
    model = random_model(**changes)
    if dtype is not None:
        save_pretrained(model, tmp_path / "fp32")
        export_weights(tmp_path / "fp32", tmp_path / "fp8", dtype)
        model = from_pretrained(tmp_path / "fp8")
    moments = {name: tensor.float() for name, tensor in model.state_dict().items()}
    trained = tmp_path / "run" / "step-1"
    save_checkpoint(trained, {"model": model.state_dict(), "optimizer": moments}, {"model": model.config.to_hf()}, {})
    export_weights(trained, tmp_path / "hf", max_shard_bytes=100_000)
    import_weights(plan_import(tmp_path / "hf"), tmp_path / "imported")
    loaded, _ = load_model(tmp_path / "imported", dtype=None if dtype is None else "bf16")
    expected, _ = load_model(trained, dtype=None if dtype is None else "bf16")
    assert same_state(loaded.state_dict(), expected.state_dict())
    if dtype is None:
        assert same_state(loaded.state_dict(), model.state_dict())


def test_weights_kept_in_fp8_compute_what_dequantised_ones_do(tmp_path):
    save_pretrained(random_model(**CONFIGS["ragged blocks"]), tmp_path / "fp32")
    export_weights(tmp_path / "fp32", tmp_path / "fp8", E4M3)
    kept, wide = from_pretrained(tmp_path / "fp8"), from_pretrained(tmp_path / "fp8", torch.float32)
    assert kept.layers[1].mlp.experts.gate_up_proj.dtype == E4M3
    assert kept.layers[0].self_attn.q_a_proj.weight.dtype == E4M3
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    # BF16 holds what is not in FP8, and activations here.
    kept.compute_dtype = torch.float32
    tokens = torch.randint(320, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(kept(tokens).logits, wide(tokens).logits, atol=1e-5, rtol=1e-5)
    hidden, embeddings = torch.randn(2, 2, 30, 200, generator=torch.Generator().manual_seed(1))
    shared = Pass(rotations(kept.config, torch.arange(30).unsqueeze(0)))
    with torch.inference_mode():
        ours, theirs = (model.mtp[0](hidden, embeddings, shared)[0] for model in (kept, wide))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_scales_are_powers_of_two_where_the_config_asks(tmp_path):
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }  # fmt: skip
    save_pretrained(random_model(extra={"quantization_config": quantization}), tmp_path / "fp32")
    assert "quantization_config" not in json.loads((tmp_path / "fp32" / "config.json").read_text())
    config = json.loads((tmp_path / "fp32" / "config.json").read_text())
    # A checkpoint remembers it, though its weights are not in FP8.
    save_checkpoint(
        tmp_path / "run" / "step-1", {"model": random_model().state_dict()}, {"model": {**config, "quantization_config": quantization}}, {}
    )  # fmt: skip
    export_weights(tmp_path / "run", tmp_path / "fp8", E4M3)
    scales = [read_tensor(each) for name, each in read_headers(tmp_path / "fp8").items() if name.endswith("scale_inv")]
    assert len(scales) > 50
    for scale in scales:
        assert (torch.frexp(scale).mantissa == 0.5).all()
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"] == quantization
    import_weights(plan_import(tmp_path / "fp8"), tmp_path / "checkpoint")
    export_weights(tmp_path / "checkpoint", tmp_path / "again")
    assert_same_files(tmp_path / "fp8", tmp_path / "again")


def test_companions_travel_and_code_does_not(tmp_path):
    save_pretrained(random_model(), tmp_path / "hf")
    texts = {"tokenizer.json": "{}", "tokenizer_config.json": "{ }", "generation_config.json": '{"temperature": 0.6}'}
    for name, text in {**texts, "modeling_deepseek.py": "print()", "pytorch_model.bin": "x"}.items():
        (tmp_path / "hf" / name).write_text(text)
    import_weights(plan_import(tmp_path / "hf"), tmp_path / "checkpoint")
    export_weights(tmp_path / "checkpoint", tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == {*texts, "config.json", "model.safetensors"}
    assert {name: (tmp_path / "again" / name).read_text() for name in texts} == texts

    save_pretrained(random_model(), tmp_path / "bare")
    export_weights(tmp_path / "bare", tmp_path / "complete")
    assert json.loads((tmp_path / "complete" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_unknown_fields_of_the_config_come_back(tmp_path):
    save_pretrained(random_model(extra={"use_cache": True, "auto_map": {"AutoModel": "x"}}), tmp_path / "hf")
    import_weights(plan_import(tmp_path / "hf"), tmp_path / "checkpoint")
    export_weights(tmp_path / "checkpoint", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == {"AutoModel": "x"}
    assert_same_files(tmp_path / "hf", tmp_path / "again")


def test_a_differing_copy_of_the_embedding_is_named(tmp_path, caplog):
    save_pretrained(random_model(), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    import_weights(plan_import(tmp_path / "hf"), tmp_path / "checkpoint")
    assert [record.args[1] for record in caplog.records] == ["model.layers.3.embed_tokens.weight"]


# Stops, full disks and damage.


def written(directory):
    """When each complete file was written."""
    return {file.name: file.stat().st_mtime_ns for file in directory.glob("[!.]*")}


KILLED = """
import os, sys
from pathlib import Path
from dsv3.weights import convert, jobs
convert.FILE_BYTES = 100_000
add, count = jobs.Journal.add, 0
def stop_after_three(self, file, result):
    global count
    count += 1
    if count == 4:
        os._exit(9)
    add(self, file, result)
jobs.Journal.add = stop_after_three
source, target = map(Path, sys.argv[2:])
if sys.argv[1] == "import":
    convert.import_weights(convert.plan_import(source), target, workers=1)
else:
    convert.export_weights(source, target, max_shard_bytes=30_000, workers=1)
"""


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_killed_run_goes_on_with_the_files_that_are_complete(command, tmp_path):
    source, target = tmp_path / "hf", tmp_path / "target"
    save_pretrained(random_model(), source)
    killed = subprocess.run([sys.executable, "-c", KILLED, command, source, target], timeout=300)
    assert killed.returncode == 9
    unfinished = tmp_path / "target.partial" if command == "import" else target / ".partial"
    before = written(unfinished)
    # The fourth file is written and not noted.
    assert len(before) == 4
    damaged = sorted(before)[1]
    content = (unfinished / damaged).read_bytes()
    (unfinished / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = written(unfinished)

    ran = []
    run = jobs.Journal.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.Journal, "add", lambda self, file, result: (ran.append(file), run(self, file, result)))
        if command == "import":
            import_weights(plan_import(source), target, workers=1)
        else:
            export_weights(source, target, max_shard_bytes=30_000, workers=1)
    kept = before.keys() - {*ran}
    assert len(kept) == 2
    assert damaged not in kept
    after = written(target)
    assert all(after[name] == before[name] for name in kept)
    assert not unfinished.exists()
    if command == "import":
        assert same_state(load_model(target)[0].state_dict(), from_pretrained(source).state_dict())
    else:
        assert same_state(from_pretrained(target).state_dict(), from_pretrained(source).state_dict())


def test_other_weights_begin_anew(tmp_path):
    save_pretrained(random_model(0), tmp_path / "hf")
    subprocess.run([sys.executable, "-c", KILLED, "import", tmp_path / "hf", tmp_path / "target"], timeout=300)
    save_pretrained(random_model(1), tmp_path / "hf")
    import_weights(plan_import(tmp_path / "hf"), tmp_path / "target")
    assert same_state(load_model(tmp_path / "target")[0].state_dict(), random_model(1).state_dict())


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_leaves_nothing_that_looks_whole(command, tmp_path, monkeypatch):
    save_pretrained(random_model(), tmp_path / "hf")
    target = tmp_path / "target"

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs, "sync", full)
    plan = plan_import(tmp_path / "hf")
    with pytest.raises(RunError, match=r"No space left.*complete in .*partial"):
        _ = import_weights(plan, target) if command == "import" else export_weights(tmp_path / "hf", target)
    assert not list(target.glob("[!.]*"))
    with pytest.raises(UserError):
        load_model(target)


def test_torch_errors_on_a_full_disk_are_the_systems(tmp_path):
    """A disk of 300 KB would need a mount: a limit on the size of files is the same to the writer."""
    save_pretrained(random_model(), tmp_path / "hf")
    code = (
        "import resource, signal, sys; from pathlib import Path; from dsv3.cli.main import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    for command in ("import", "export"):
        arguments = [sys.executable, "-c", code, command, tmp_path / "hf", tmp_path / command]
        failed = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert failed.returncode == 1, failed.stderr
        assert "File too large" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not (tmp_path / command / "config.json").exists()


def test_targets_that_exist_or_are_the_source_are_refused(tmp_path):
    save_pretrained(random_model(), tmp_path / "hf")
    with pytest.raises(UserError, match="exists: name a directory"):
        import_weights(plan_import(tmp_path / "hf"), tmp_path / "hf")
    with pytest.raises(UserError, match="where the weights are read from"):
        export_weights(tmp_path / "hf", tmp_path / "x" / ".." / "hf")
    with pytest.raises(UserError, match="holds no model"):
        plan_import(tmp_path)


# Size.

QUANTIZED = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
# Of this program alone: what getrusage says begins with the size of the process that started it.
PEAK = "import re, sys; from dsv3.cli.main import run; code = run(sys.argv[1:]); print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024); sys.exit(code)"


def sparse_model(directory, shard_bytes, **changes):
    """The published form of a config, every value zero. Returns the tensors' bytes."""
    config = ModelConfig.preset("deepseek-v3", **{"extra": QUANTIZED, **changes})
    tensors = published(config)
    write_sparse(directory, {name: (each.dtype, each.shape) for name, each in tensors.items()}, shard_bytes)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    return sum(each.bytes for each in tensors.values())


def peak(*arguments):
    """Bytes of memory that one command took at most."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_memory_stays_below_a_shard_and_2_gb(tmp_path):
    size = sparse_model(
        tmp_path / "hf", 64 * 10**6, num_hidden_layers=4, n_routed_experts=32, hidden_size=2048, intermediate_size=4096,
        moe_intermediate_size=1024, vocab_size=16000, num_attention_heads=16, first_k_dense_replace=1, q_lora_rank=512,
    )  # fmt: skip
    assert size + 2 * 10**8 > 1.0e9
    limit = 64 * 10**6 + 2 * 10**9
    assert peak("import", tmp_path / "hf", tmp_path / "checkpoint") < limit
    assert peak("export", tmp_path / "checkpoint", tmp_path / "again", "--shard-size", "0.064") < limit
    stored = {name: (each.dtype, each.shape) for name, each in read_headers(tmp_path / "hf").items()}
    assert {name: (each.dtype, each.shape) for name, each in read_headers(tmp_path / "again").items()} == stored


@pytest.mark.prove
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_20_gb_in_fp8_pass_through_in_little_memory(tmp_path):
    if (free := shutil.disk_usage(tmp_path).free) < 45 * 10**9:
        pytest.skip(f"needs 45 GB of disk, has {free / 1e9:.0f}")
    shard = 4 * 10**9
    size = sparse_model(tmp_path / "hf", shard, num_hidden_layers=5, first_k_dense_replace=3, n_routed_experts=96)
    assert size > 20e9
    limit = shard + 2 * 10**9
    assert peak("import", tmp_path / "hf", tmp_path / "checkpoint") < limit
    assert peak("export", tmp_path / "checkpoint", tmp_path / "again") < limit
    assert sum(each.bytes for each in read_headers(tmp_path / "again").values()) == size
    # pytest keeps the directories of three runs.
    for name in ("hf", "checkpoint", "again"):
        shutil.rmtree(tmp_path / name)


@pytest.mark.timeout(60)
def test_the_full_model_is_planned_in_less_than_a_minute(tmp_path):
    sparse_model(tmp_path / "v3", 43 * 10**8)
    done = subprocess.run(
        [sys.executable, "-m", "dsv3", "import", tmp_path / "v3", tmp_path / "x", "--dry-run"],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "91,991 tensors, 688,574,839,360 bytes" in done.stdout
    assert not list(Path(tmp_path).glob("x*"))
