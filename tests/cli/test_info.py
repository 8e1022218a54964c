import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.cli.main import run
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.huggingface import save_pretrained


def test_the_table_shows_our_figures_beside_the_report_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "model", "deepseek-v3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, ours, theirs in (
        ("main model", "671,026,419,200", "671B"),
        ("active for one token", "37,552,297,472", "37B"),
        ("MTP modules (1)", "11,610,068,224", "11.5B"),
        ("all in the files", "684,489,845,504", "685B"),
        ("cache a token, BF16", "70,272 B", "70.272 KB"),
        ("training a token", "250.5 GFLOP", "250 GFLOP"),
    ):
        line = next(line for line in lines if line.strip().startswith(name))
        assert ours in line
        assert theirs in line


def test_other_models_are_not_compared_with_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "model", "lite"]) == 0
    shown = capsys.readouterr().out
    assert "15,960,110,208" in shown
    assert "671B" not in shown
    assert "MTP" not in shown


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "model", "deepseek-v3", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"]["main"] == 671_026_419_200
    assert values["parameters"]["active"] == 37_552_297_472
    assert values["parameters"]["mtp"] == 11_610_068_224
    assert values["kv_bytes_per_token"] == 70_272
    assert values["training_flops_per_token"]["causal"] == pytest.approx(250.5e9, rel=2e-4)
    assert ModelConfig.from_hf(values["config"]) == ModelConfig.preset("deepseek-v3")


def test_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.preset("debug").to_hf()))
    assert run(["info", "model", str(tmp_path), "--json"]) == 0
    from_directory = capsys.readouterr().out
    assert run(["info", "model", "debug", "--json"]) == 0
    assert capsys.readouterr().out == from_directory


@pytest.mark.parametrize(("name", "words"), [("tinny", "did you mean 'tiny'?"), ("no/such/dir", "legal are: debug,")])
def test_refuses_what_is_neither(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "model", name]) == 2
    said = capsys.readouterr().err
    assert repr(name) in said
    assert words in said


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_pretrained(DeepSeekV3(ModelConfig.preset("debug")).initialize("fan_in", seed=1), tmp_path)
    return tmp_path


def test_a_directory_of_weights(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "checkpoint", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "Hugging Face, 1 file, " in shown
    assert "3 layers (1 dense), 1 + 8 experts, 2 a token, MTP depth 1, vocabulary 320, context 128" in shown
    assert "quantised: no" in shown
    assert "tokenizer: none" in shown
    assert "missing" not in shown
    assert "problem" not in shown


def test_what_is_wrong_with_it_is_listed_and_no_error(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = directory / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items() if ".experts.5." not in name}
    held["model.extra"] = torch.zeros(1)
    held["lm_head.weight"] = torch.zeros(1)
    save_file(held, file)
    assert run(["info", "checkpoint", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "missing: 9 (model.layers.1.mlp.experts.5.gate_proj.weight, " in shown
    assert "unexpected: 1 (model.extra)" in shown
    assert "of another kind: 1 (lm_head.weight has shape [1], expected [320, 32])" in shown
    assert run(["info", "checkpoint", str(directory), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["missing"]["count"] == 9
    assert values["unexpected"] == {"count": 1, "first": ["model.extra"]}
    assert values["misfits"]["count"] == 1
    assert values["total"]["tensors"] == values["main"]["tensors"] + values["mtp"]["tensors"] + 1 == len(held)
    assert values["architecture"]["mtp_depth"] == 1
    assert values["dtypes"]["F32"]["bytes"] == 4 * values["total"]["parameters"]


def test_a_checkpoint_of_a_run(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "checkpoint", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "training checkpoint" in shown
    assert "MTP modules" in shown


def test_refuses_where_nothing_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "checkpoint", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_ops_says_what_serves_and_why_the_faster_ones_do_not(capsys):
    assert run(["info", "ops", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "CPU"
    product = found["operations"]["grouped_gemm_fp8"]
    assert product["triton"] == "needs tensors on a GPU"
    assert product["reference"] is None
    assert run(["info", "ops", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "grouped_gemm_fp8_masked" in said
    assert "counting_sort" in said
