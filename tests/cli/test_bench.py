import json
import re
import sys
from dataclasses import replace

import pytest

from dsv3.bench import memory
from dsv3.cli.main import run
from dsv3.model.config import ModelConfig


def test_train_and_decode_print_tables_and_write_files(tmp_path, capsys):
    out = tmp_path / "results" / "decode.json"
    arguments = ["--preset", "debug", "--batch", "2", "--tokens", "4", "--rounds", "1", "--json", str(out)]
    assert run(["bench", "decode", *arguments]) == 0
    said = capsys.readouterr().out
    assert "times faster" in said
    assert "batch 2" in said
    assert f"written: {out}" in said
    assert json.loads(out.read_text())["shapes"]["workloads"][0] == "batch 2"


@pytest.mark.parametrize("batch", ["", "0", "1,", "1,x", "-1"])
def test_bad_batches_are_refused(batch, capsys):
    assert run(["bench", "decode", "--batch", batch]) == 2
    assert "expected whole numbers from 1 on" in capsys.readouterr().err


def test_an_unknown_preset_is_refused(capsys):
    assert run(["bench", "train", "--preset", "tinny"]) == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "decode"])
def test_without_transformers_the_way_to_it_is_named(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(["bench", command, "--preset", "debug"]) == 2
    assert "pip install 'dsv3[test]'" in capsys.readouterr().err


def test_data_prints_tables_and_a_verdict(tmp_path, capsys):
    out = tmp_path / "data.json"
    arguments = ["--vocabularies", "300,400", "--megabytes", "0.1", "--rounds", "1", "--json", str(out)]
    assert run(["bench", "data", *arguments]) == 0
    said = capsys.readouterr().out
    assert "5.0 MB/s a core, vocabulary 400" in said
    assert "the same as those of tokenizers in all" in said
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "tokenizers", "dsv3 encoding, words known", "dsv3 encoding", "dsv3 data build"
    ] * 2  # fmt: skip
    assert run(["bench", "data", "--vocabularies", "2k"]) == 2
    assert "--vocabularies '2k': expected whole numbers" in capsys.readouterr().err


def test_memory_prints_a_table(tmp_path, capsys, monkeypatch):
    heads = {"q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    small = ModelConfig.preset("debug", num_hidden_layers=1, **heads)
    out = tmp_path / "results" / "memory.json"
    arguments = ["--batch", "1", "--length", "16", "--device", "cpu", "--json", str(out)]
    assert run(["bench", "memory", "--preset", "debug", *arguments]) == 2
    assert "FP8 products need sizes that are multiples of 16" in capsys.readouterr().err
    monkeypatch.setattr(ModelConfig, "preset", lambda name: small)
    few = {"average": (replace(memory.FP8, held="average"), memory.FP8), "in FP8": (memory.BF16, memory.FP8)}
    monkeypatch.setattr(memory, "TECHNIQUES", few)
    assert run(["bench", "memory", *arguments]) == 0
    said = capsys.readouterr().out
    assert re.search(r"average( +-?[\d,]+){5} +-?[\d.]+% +[\d.]+ *\n", said)
    assert f"written: {out}" in said
    steps = json.loads(out.read_text())["steps"]
    assert {each["setting"]["precision"] for each in steps} == {"bf16", "fp8"}


def test_overhead_prints_shares(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'data.sources = [{ name = "t", uri = "builtin:tinypy", tokens = "5K" }]\ndata.sequence_length = 32\n'
        'tokenizer.training_bytes = "50K"\nmodel.preset = "debug"\nschedule.learning_rate = 1e-3\n'
        'schedule.batch_size = 2\ntraining.tokens = "1K"\ntraining.device = "cpu"\n'
    )
    out = tmp_path / "overhead.json"
    assert run(["bench", "train", "--overhead", "--recipe", str(recipe), "--steps", "4", "--json", str(out)]) == 0
    assert "beside the step" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["share"] > 0
    assert found["shapes"]["steps"] == 4
