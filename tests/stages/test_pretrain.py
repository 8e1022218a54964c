import json
from pathlib import Path

import pytest

from dsv3.data.tokenizer import train_tokenizer
from dsv3.errors import UserError
from dsv3.recipe.schema import Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.data import make_tokenizer
from dsv3.stages.pretrain import derived, pretraining_stages, with_user_data, write_run
from dsv3.stages.scores import held_out

REDUCED = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"


TRAIN, VALIDATION = "shards.t.train", "shards.t.validation"


def silent(*_, **__):
    pass


def keys(*overrides, out=Path("out")):
    """What each stage is keyed by."""
    recipe = Recipe.load(REDUCED, ['data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', *overrides])
    return {stage.name: json.dumps(stage.inputs) for stage in pretraining_stages(RunContext(recipe, out))}


def changed(*overrides):
    return {name for name, key in keys(*overrides).items() if key != keys()[name]}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("training.tokens=1024", {"pretrain"}),
        ("optimizer.kind=adamw", {"pretrain"}),
        ("data.sequence_length=64", {"pretrain"}),
        ("data.fim_rate=0.5", {TRAIN, "pretrain"}),
        ("data.fim_unit=line", {TRAIN, "pretrain"}),
        ("data.packing=in_order", {"pretrain"}),
        ("data.split_joined_rate=0.5", {TRAIN, "pretrain"}),
        ("data.sources.0.tokens=9K", {"tokenizer", TRAIN, "pretrain"}),
        ("model.vocab_size=600", {"tokenizer", "pretrain"}),
        ("data.sources.0.weight=2.0", {"tokenizer", "pretrain"}),
        ("data.validation_fraction=0.1", {"tokenizer", TRAIN, VALIDATION, "pretrain"}),
        ("training.seed=1", {"tokenizer", TRAIN, VALIDATION, "pretrain"}),
        ("data.seed=1", {"tokenizer", TRAIN, VALIDATION, "pretrain"}),
        ("tokenizer.digits=3", {"tokenizer", "pretrain"}),
        ("notes.length=other words", set()),
    ],
)
def test_a_stage_is_keyed_by_what_it_reads(override, stages):
    """A stage that runs again makes those after it run again as well."""
    assert changed(override) == stages


def test_runs_of_other_seeds_share_what_is_made_of_one_data_seed():
    runs = [keys("data.seed=7", f"training.seed={seed}") for seed in (0, 1)]
    assert [name for name in runs[0] if runs[0][name] != runs[1][name]] == ["pretrain"]
    assert keys("data.seed=0")["tokenizer"] == keys()["tokenizer"]  # training.seed, where there is none


def test_the_texts_and_a_finished_tokenizer_count_by_their_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    train_tokenizer(["a b"], 300).save(tmp_path / "tok")
    overrides = [f'data.sources=[{{name="t", uri="{tmp_path}"}}]', f"tokenizer.path={tmp_path / 'tok'}"]
    first = keys(*overrides)
    assert keys(*overrides) == first
    (tmp_path / "a.txt").write_text("other")
    second = keys(*overrides)
    # A finished tokenizer does not depend on the texts; what is built from them does.
    assert second["tokenizer"] == first["tokenizer"]
    assert second["shards.t.train"] != first["shards.t.train"]
    train_tokenizer(["c d"], 310).save(tmp_path / "tok")
    assert keys(*overrides)["tokenizer"] != second["tokenizer"]


def test_a_finished_tokenizer_is_copied_and_must_fit_the_model(tmp_path):
    train_tokenizer(["a b"], 300).save(tmp_path / "tok")
    recipe = Recipe.load(REDUCED, [f"tokenizer.path={tmp_path / 'tok'}"])
    make_tokenizer(recipe, tmp_path / "out", silent)
    name = "tokenizer.json"
    assert (tmp_path / "out" / name).read_text() == (tmp_path / "tok" / name).read_text()
    small = Recipe.load(REDUCED, [f"tokenizer.path={tmp_path / 'tok'}", "model.vocab_size=299"])
    with pytest.raises(UserError, match=r"has 300 entries, and model.vocab_size = 299"):
        make_tokenizer(small, tmp_path / "other", silent)


def test_user_data_replaces_the_sources_named_after_its_files():
    recipe = Recipe.load(REDUCED)
    assert with_user_data(recipe, []) is recipe
    paths = [
        "a/x.txt",
        "b/x.txt",
        "c/x.md",
        "/",
        "..",
        "logs/*.jsonl",
        "_hidden.txt",
        "Мир und Café.txt",
        "d.jsonl.zst",
    ]
    found = with_user_data(recipe, paths)
    names = ["x", "x-2", "x-3", "data", "data-2", "data-3", "hidden", "und-Caf", "d.jsonl"]
    assert [source.name for source in found.data.sources] == names
    assert [source.uri for source in found.data.sources] == paths
    assert {source.weight for source in found.data.sources} == {1.0}
    # The reason for the mixture that is gone is gone, too.
    assert found.notes.keys() == {"length"}
    assert found.training == recipe.training
    with pytest.raises(UserError, match="--data names a path twice"):
        with_user_data(recipe, ["a.txt", "b.txt", "a.txt"])


def test_derived_figures_are_those_of_the_recipe():
    facts = derived(Recipe.load(REDUCED, ["data.sources.0.weight=3.0", "training.device=cpu"]))
    assert facts["data"] == "stdlib 75%, tinypy 25%; 10% of the documents to fill in the middle"
    assert facts["batch"] == "4 sequences x 128 tokens = 512 tokens a step"
    assert facts["length"].startswith("12,288 tokens in 24 steps, ")
    assert facts["optimizer"] == "muon, weight decay 0.1, clipping at 1"
    assert facts["arithmetic"] == "bf16 on cpu, FP32 weights"
    assert facts["why: length"] == "24 steps, because this is a test"


def test_run_json_is_whole_and_readable_by_others(tmp_path):
    tokenizer = train_tokenizer(["a b"], 300)
    for _ in range(2):
        write_run(Recipe.load(REDUCED), tmp_path, tokenizer, [])
    content = json.loads((tmp_path / "run.json").read_text())
    assert content.keys() == {"recipe", "derived", "machine", "versions", "command"}
    assert Recipe.from_dict(content["recipe"]) == Recipe.load(REDUCED)
    assert content["derived"]["tokenizer"] == "byte-level BPE, 300 entries"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "run.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_held_out_texts_follow_the_data_seed():
    texts = [held_out(Recipe.load(REDUCED, overrides), 2_000) for overrides in (
        ["training.seed=5"], ["training.seed=6", "data.seed=5"], ["training.seed=6"],
    )]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(("device", "name"), [("cpu", "CPU"), ("cuda:1", "GPU number 1"), ("auto", "GPU number 0")])
def test_run_json_names_the_device_that_computes(tmp_path, monkeypatch, device, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU number {device.index}")
    write_run(Recipe.load(REDUCED, [f"training.device={device}"]), tmp_path, train_tokenizer(["a b"], 300), [])
    assert json.loads((tmp_path / "run.json").read_text())["machine"]["device"] == name
