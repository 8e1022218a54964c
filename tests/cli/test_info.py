import json
from pathlib import Path

import pytest

from dsv3.cli.main import run
from dsv3.model.config import ModelConfig


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
