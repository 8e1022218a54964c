import json
from pathlib import Path

import pytest

from dsv3.cli.main import run
from dsv3.model.config import ModelConfig


def test_the_table_shows_our_figures_beside_the_report_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "model", "deepseek-v3"]) == 0
    shown = {line.split("  ")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line[:2] == "  "}
    assert "671,026,419,200" in shown["main model"]
    assert "671B" in shown["main model"]
    text = "\n".join(shown.values())
    for figure in (
        "37,552,297,472",
        "37B",
        "11,610,068,224",
        "684,489,845,504",
        "685B",
        "70,272 B",
        "70.272 KB",
        "250.5",
    ):
        assert figure in text


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
