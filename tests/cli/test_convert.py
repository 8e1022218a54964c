import json

import pytest
import torch

import dsv3
from dsv3.cli.main import run
from dsv3.weights.safetensors import read_headers


def command(*arguments):
    return run([str(each) for each in arguments])


def test_a_run_becomes_a_directory_and_a_checkpoint_again(checkpoint, tmp_path, capsys):
    assert command("export", checkpoint, tmp_path / "hf") == 0
    assert f"weights: {tmp_path / 'hf'}" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert command("import", tmp_path / "hf", tmp_path / "again") == 0
    captured = capsys.readouterr()
    assert f"checkpoint: {tmp_path / 'again'}" in captured.out
    assert " MB of " in captured.err

    prompts, params = ["def add(first", "x"], dsv3.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    texts = [
        [each.outputs[0].token_ids for each in dsv3.LLM(path, device="cpu").generate(prompts, params)]
        for path in (checkpoint, tmp_path / "hf", tmp_path / "again")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0][0]) == 12
    capsys.readouterr()
    assert command("generate", tmp_path / "hf", "--prompt", "def", "--max-tokens", "3", "--temperature", "0") == 0
    assert capsys.readouterr().out


def test_dtypes_are_those_asked_for(checkpoint, tmp_path):
    assert command("export", checkpoint, tmp_path / "bf16", "--dtype", "bf16") == 0
    assert {each.dtype for each in read_headers(tmp_path / "bf16").values()} == {"BF16", "F32"}
    assert command("export", checkpoint, tmp_path / "fp8", "--fp8", "--shard-size", "0.0001", "--workers", "3") == 0
    assert {each.dtype for each in read_headers(tmp_path / "fp8").values()} == {"F8_E4M3", "BF16", "F32"}
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["torch_dtype"] == "bfloat16"
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    assert command("import", tmp_path / "fp8", tmp_path / "fp32", "--dtype", "fp32") == 0
    loaded = dsv3.LLM(tmp_path / "fp32", device="cpu").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    # What the weights are no more, the checkpoint's config does not say.
    assert "quantization_config" not in loaded.config.extra


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(checkpoint, tmp_path, capsys):
    assert command("export", checkpoint, tmp_path / "hf") == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert command("import", tmp_path / "hf", tmp_path / "again", "--dry-run", "--dtype", "bf16") == 0
    lines = capsys.readouterr().out.splitlines()
    stored, ours = read_headers(tmp_path / "hf"), dsv3.from_pretrained(tmp_path / "hf").state_dict()
    assert f"{len(stored)} tensors, {sum(each.bytes for each in stored.values()):,} bytes" in lines[0]
    assert lines[1].startswith(f"writes  {len(stored) - 2} of them as {len(ours)}, ")
    assert lines[2].startswith("MTP     1 modules")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{run}", "{tmp}/x", "--fp8", "--dtype", "bf16"], "choose one of them"),
        (["export", "{run}", "{tmp}/x", "--dtype", "bf17"], "did you mean 'bf16'"),
        (["export", "{tmp}/absent", "{tmp}/x"], "holds no model"),
        (["import", "{tmp}/absent", "{tmp}/x"], "holds no model"),
        (["import", "{run}", "{tmp}"], "exists: name a directory"),
        (["import", "{run}", "{tmp}/x", "--config", "args.json"], "not in the layout of DeepSeek's inference/"),
    ],
)
def test_mistakes_end_with_one_paragraph_and_2(arguments, message, checkpoint, tmp_path, capsys):
    assert command(*[each.format(run=checkpoint, tmp=tmp_path) for each in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
