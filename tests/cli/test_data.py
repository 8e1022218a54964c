import json
import shutil
from pathlib import Path

import pytest

from dsv3.cli import main
from dsv3.data.token_shards import ShardSet
from dsv3.data.tokenizer import Tokenizer

REDUCED = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for number in range(30):
        (path / f"{number}.txt").write_text(f"This is document {number % 20}, which may have a twin.\n" * 5)
    (path / "bad.txt").write_bytes(b"\xff")
    (path / "empty.txt").write_text("")
    return path


def run(capsys, *arguments):
    code = main.run([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def build(capsys, out, texts, *arguments):
    sources = f'data.sources=[{{name="texts", uri="{texts}"}}, {{name="t", uri="builtin:tinypy", tokens="5K"}}]'
    fixed = ["data.validation_fraction=0.2", "model.vocab_size=400", "--json", "--workers", "1"]
    code, said, err = run(capsys, "data", "build", REDUCED, sources, "--out", out, *fixed, *arguments)
    assert code == 0, err
    return json.loads(said), err


def test_the_figures_are_those_of_the_shards_and_a_second_time_nothing_is_built(tmp_path, texts, capsys):
    figures, err = build(capsys, tmp_path / "out", texts)
    assert figures.keys() == {"texts/train", "texts/validation", "t/train", "t/validation"}
    for name, row in figures.items():
        manifest = ShardSet.open(tmp_path / "out" / "shards" / name).manifest
        assert (row["documents"], row["tokens"]) == (manifest.documents, manifest.tokens)
        assert row["bytes_per_token"] == pytest.approx(manifest.bytes / manifest.tokens)
        assert row["tokens_per_second"] > 0
        assert f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens" in err
    assert figures["texts/train"]["skipped"] == figures["texts/train"]["empty"] == 1
    assert figures["texts/train"]["documents"] + figures["texts/validation"]["documents"] == 30
    assert "texts/train: skipped 1 files or rows that are no text: bad.txt: not UTF-8" in err
    again, err = build(capsys, tmp_path / "out", texts)
    assert err.count(": cached") == 5
    assert [row.pop("tokens_per_second") for row in again.values()] == [None] * 4
    assert [{**row, "tokens_per_second": None} for row in figures.values()] == [
        {**row, "tokens_per_second": None} for row in again.values()
    ]
    sources = f'data.sources=[{{name="texts", uri="{texts}"}}]'
    rest = ["data.validation_fraction=0.2", "model.vocab_size=400", "--out", tmp_path / "other"]
    said = run(capsys, "data", "build", REDUCED, sources, *rest)[1]
    assert all(text in said for text in ("bytes/token", "tokens/second", "texts/validation"))


def test_another_rate_builds_the_training_sets_alone(tmp_path, texts, capsys):
    build(capsys, tmp_path / "out", texts)
    _, err = build(capsys, tmp_path / "out", texts, "data.fim_rate=0.5")
    assert [line for line in err.splitlines() if line.endswith(": started")] == [
        "shards.texts.train: started", "shards.t.train: started",
    ]  # fmt: skip


def test_duplicates_are_left_out_on_request(tmp_path, texts, capsys):
    figures, _ = build(capsys, tmp_path / "out", texts, "data.deduplicate=true")
    rows = [figures["texts/train"], figures["texts/validation"]]
    assert (sum(row["documents"] for row in rows), sum(row["duplicates"] for row in rows)) == (20, 10)


def test_a_damaged_set_is_named_and_built_anew_once_it_is_deleted(tmp_path, texts, capsys):
    build(capsys, tmp_path / "out", texts)
    damaged = tmp_path / "out" / "shards" / "texts" / "train"
    with (damaged / "tokens-00000.bin").open("r+b") as file:
        file.write(b"\xff")
    sources = f'data.sources=[{{name="texts", uri="{texts}"}}, {{name="t", uri="builtin:tinypy", tokens="5K"}}]'
    fixed = [sources, "data.validation_fraction=0.2", "model.vocab_size=400", "--out", tmp_path / "out"]
    for command in (["data", "build"], ["pretrain"]):
        code, _, err = run(capsys, *command, REDUCED, *fixed)
        assert code == 2
        assert "tokens-00000.bin is damaged: its sha256 is" in err
        assert f"delete {damaged} and run again" in err
    shutil.rmtree(damaged)
    _, err = build(capsys, tmp_path / "out", texts)
    assert err.count(": started") == 1


def test_a_tokenizer_of_ones_own(tmp_path, texts, capsys):
    out = tmp_path / "tokenizer"
    arguments = ["tokenizer", "train", texts, "builtin:tinypy", "--out", out, "--training-bytes", "60K"]
    code, said, _ = run(capsys, *arguments, "--vocab-size", 500, "--digits", 1)
    assert code == 0
    assert "500 entries from 0.0 MB" in said
    found = Tokenizer.load(out)
    assert found.vocab_size == 500
    assert len(found.encode("123")) == 3
    assert len(found.encode("def ")) < 4
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "holds a tokenizer already" in err
    code, _, err = run(capsys, "tokenizer", "train", texts, "--out", tmp_path / "o", "--training-bytes", "many")
    assert code == 2
    assert "--training-bytes 'many': expected a whole number" in err
    # A recipe that names it builds its shards with it.
    build(capsys, tmp_path / "out", texts, f"tokenizer.path={out}", "model.vocab_size=600")
    assert ShardSet.open(tmp_path / "out" / "shards" / "t" / "train", found.hash)
