from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.recipe.load import find_lines, parse_value
from dsv3.recipe.schema import Recipe

TEXT = """\
[model]
preset = "debug"

[[data.sources]]
name = "one"
uri = "builtin:stdlib"

[[data.sources]]
name = "two"
uri = "texts"

[data]
sequence_length = 64

[schedule]
learning_rate = [
    { kind = "linear", from = 0.0, to = 1e-3, steps = "2K" },
    { kind = "constant", value = 1e-3 },
]
batch_size = 8
[training]
tokens = "1M"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        Recipe.load(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_reads_the_file(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.model.config().hidden_size == 32
    assert [source.name for source in recipe.data.sources] == ["one", "two"]
    assert recipe.training.tokens == 1_000_000
    assert isinstance(recipe.schedule.learning_rate, tuple)
    assert recipe.schedule.learning_rate[0].steps == 2000


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.weight_decay=0.05", "optimizer", "weight_decay", 0.05),
        ("optimizer.kind=muon", "optimizer", "kind", "muon"),
        ('optimizer.kind="muon"', "optimizer", "kind", "muon"),
        ("training.tokens=2.5M", "training", "tokens", 2_500_000),
        ("training.tokens = 4_096", "training", "tokens", 4096),
        ("data.document_mask=true", "data", "document_mask", True),
        ("tokenizer.path=/a/b=c", "tokenizer", "path", "/a/b=c"),
        ("schedule.learning_rate=3e-4", "schedule", "learning_rate", 3e-4),
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
    ],
)
def test_overrides(path: Path, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(Recipe.load(path, [override]), section), key) == value


def test_overrides_reach_into_lists_and_the_last_one_wins(path: Path) -> None:
    recipe = Recipe.load(
        path, ["data.sources.1.weight=3.0", "data.sources.1.weight=0.25", "schedule.learning_rate.0.to=1e-4"]
    )
    assert [source.weight for source in recipe.data.sources] == [1.0, 0.25]
    assert isinstance(recipe.schedule.learning_rate, tuple)
    assert recipe.schedule.learning_rate[0].to == 1e-4


def test_from_dict_leaves_its_argument_alone() -> None:
    values = {
        "data": {"sources": [{"name": "a", "uri": "b", "weight": 1.0}], "sequence_length": 8},
        "schedule": {"learning_rate": 1.0, "batch_size": 1},
        "training": {"tokens": 8},
    }
    Recipe.from_dict(values, ["data.sources.0.weight=2.0", "training.tokens=16"])
    assert values["data"]["sources"][0]["weight"] == 1.0  # type: ignore[index]  # a dict of mixed values
    assert values["training"] == {"tokens": 8}


def test_a_text_that_hides_a_second_key_stays_a_text() -> None:
    assert parse_value("1\nother = 2") == "1\nother = 2"


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("batch_size = 8", "batch_sise = 8", 20, ["unknown key schedule.batch_sise", "'batch_size'"]),
        ('tokens = "1M"', 'tokens = "many"', 22, ["training.tokens = 'many'", "'1.9M'"]),
        ("sequence_length = 64", 'sequence_length = "4K"', 13, ["data.sequence_length = '4K'", "no suffix"]),
        ("sequence_length = 64", "sequence_length = 512", 13, ["data.sequence_length = 512", "128"]),
        ('name = "two"', 'name = "a b"', 9, ["data.sources.1.name = 'a b'"]),
        ('kind = "constant", value', 'kind = "konstant", value', 16, ["schedule.learning_rate.1.kind = 'konstant'"]),
        ("value = 1e-3 }", "valeu = 1e-3 }", 16, ["unknown key schedule.learning_rate.1.valeu", "'value'"]),
        ('preset = "debug"', 'preset = "debug"\nvocab = 3', 3, ["unknown key model.vocab", "'vocab_size'"]),
        ("[training]", "[trainig]", 21, ["unknown key trainig", "'training'"]),
        ('preset = "debug"', "[optimizer]\nvocab_size = 1", 3, ["optimizer.vocab_size", "'model.vocab_size'"]),
        ('preset = "debug"', "initializer_range = 0.1", 2, ["'training.initialization'"]),
        (', steps = "2K"', "", 16, ["segment 0", "another follows"]),
    ],
)
def test_a_refusal_names_the_line_and_what_was_expected(
    path: Path, before: str, after: str, line: int, words: list[str]
) -> None:
    assert TEXT.count(before) == 1
    path.write_text(TEXT.replace(before, after))
    said = refusal(path)
    assert said.startswith(f"{path}:{line}: ")
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.weight_decai=1", ["override optimizer.weight_decai=1", "'weight_decay'"]),
        ("learning_rate=1", ["'schedule.learning_rate'"]),
        ("model.hidden_size=wide", ["model.hidden_size = 'wide'", "a valid integer"]),
        ("schedule=1", ["schedule = 1", "a table"]),
        ("training", ["KEY=VALUE"]),
        ("training..seed=1", ["KEY=VALUE"]),
        ("model.preset.x=1", ["model.preset is 'debug'"]),
        ("data.sources.2.weight=1", ["data.sources has the entries 0 to 1"]),
        ("data.sources.one.weight=1", ["data.sources has the entries 0 to 1"]),
    ],
)
def test_a_refusal_names_the_override(path: Path, override: str, words: list[str]) -> None:
    said = refusal(path, override)
    assert all(word in said for word in words), said


def test_missing_parts_are_named(path: Path) -> None:
    path.write_text(TEXT.replace('tokens = "1M"', ""))
    assert "training.tokens is missing: expected where the training stops" in refusal(path)
    path.write_text(TEXT[: TEXT.index("[training]")])
    assert "training is missing: expected a section with tokens" in refusal(path)


def test_files_that_are_no_recipes(path: Path, tmp_path: Path) -> None:
    assert f"did you mean '{path}'?" in refusal(tmp_path / "recipes.toml")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.toml").write_text(TEXT)
    assert f"did you mean '{tmp_path}/sub/other.toml'?" in refusal(tmp_path / "sob" / "other.toml")
    assert str(path) in refusal(tmp_path)
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(path)
    path.write_text("[model\n")
    assert "line 1" in refusal(path)


def test_lines_of_tables_keys_and_entries() -> None:
    lines = find_lines(TEXT)
    assert lines["model", "preset"] == 2
    assert lines["data", "sources", 1, "name"] == 9
    assert lines["data", "sources"] == 4
    assert lines["schedule",] == 15
