"""Context extension: what it starts from, what it refuses, and that nothing but the length changes."""

import json
from pathlib import Path

import pytest
import torch

from dsv3.errors import UserError
from dsv3.recipe.schema import Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.extend import extension_stages, find_start, load_start
from dsv3.stages.pretrain import pretraining_stages
from dsv3.stages.runner import run_stages
from dsv3.training.trainer import Trainer
from dsv3.weights.huggingface import save_pretrained
from dsv3.weights.opening import load_model
from dsv3.weights.tensor_directory import ChunkReader

RECIPES = Path(__file__).parents[1] / "recipes"
START = [
    "model.preset=debug", "training.tokens=1024", "training.precision=fp32", "training.device=cpu", "tokenizer.training_bytes=50K",
    'data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', "evaluation.tasks=[]", "evaluation.sample_prompts=[]",
]  # fmt: skip


def silent(*_, **__):
    pass


def phase(run, *overrides):
    return Recipe.load(RECIPES / "extend-reduced.toml", [f"extension.initial_from={run}", *overrides])


def extended(recipe, out):
    run_stages(extension_stages(RunContext(recipe, out)), out, silent)
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run at 128 tokens."""
    out = tmp_path_factory.mktemp("start")
    recipe = Recipe.load(RECIPES / "quickstart-reduced.toml", START)
    run_stages(pretraining_stages(RunContext(recipe, out)), out, silent)
    return out


@pytest.fixture(scope="module")
def first(start, tmp_path_factory):
    """The phase to 256 tokens."""
    return extended(phase(start), tmp_path_factory.mktemp("first"))


def rows(out):
    return [json.loads(line) for line in (out / "extend" / "metrics.jsonl").read_text().splitlines()]


def test_a_phase_trains_on_with_the_start_s_tokenizer_and_scores_itself(start, first):
    assert [row["step"] for row in rows(first)] == [1, 2, 3]
    assert rows(first)[-1]["bias_update_speed"] == 0.0
    tokenizer = Path("tokenizer") / "tokenizer.json"
    assert (first / tokenizer).read_bytes() == (start / tokenizer).read_bytes()
    before, after = (json.loads(line) for line in (first / "extend" / "evaluations.jsonl").read_text().splitlines())
    for scores in (before, after):
        assert scores["needle"]["lengths"] == [160, 256]
        assert [len(row) for row in scores["needle"]["passed"]] == [2, 2]
        assert scores["loss_by_position"]["tinypy"]["edges"] == list(range(0, 257, 32))
    config = load_model(first)[0].config
    assert (config.max_position_embeddings, config.rope_scaling.factor) == (320, 2.5)


def test_the_first_step_begins_with_the_start_s_weights(start, tmp_path):
    """A rate of 0 and no routing updates leave everything as it was found, and losses are finite."""
    out = extended(phase(start, "schedule.learning_rate=0.0"), tmp_path)
    old, new = load_model(start)[0].state_dict(), load_model(out)[0].state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_optimizer_is_fresh_or_kept(start, tmp_path):
    found = {}
    for state in ("fresh", "kept"):
        recipe = phase(start, f"extension.optimizer_state={state}")
        trainer = Trainer(recipe, None, tmp_path, files={})
        load_start(trainer, find_start(recipe))
        found[state] = trainer.optimizer.tensors()
    assert not any(tensor.any() for tensor in found["fresh"].values())
    reader = ChunkReader(find_start(phase(start)).path)
    names = [name for name in reader.layout if name.startswith("optimizer.")]
    saved = {name: torch.empty_like(found["kept"][name.removeprefix("optimizer.")]) for name in names}
    reader.fill(saved)
    assert {f"optimizer.{name}" for name in found["kept"]} == set(names)
    assert all(torch.equal(found["kept"][name.removeprefix("optimizer.")], saved[name]) for name in names)
    assert any(tensor.any() for tensor in saved.values())


def test_a_kept_state_must_be_this_optimizer_s(start, tmp_path):
    recipe = phase(start, "extension.optimizer_state=kept", "optimizer.kind=adamw")
    trainer = Trainer(recipe, None, tmp_path, files={})
    with pytest.raises(UserError, match=r"lacks \d+ of the \d+ tensors of this recipe's optimizer .*'fresh'"):
        load_start(trainer, find_start(recipe))


def test_published_weights_are_a_start(start, tmp_path):
    """Without a recipe, the length they announce is the one they were trained with."""
    model, tokenizer = load_model(start)
    model.config = model.config.replace(max_position_embeddings=128)
    save_pretrained(model, tmp_path / "hf")
    for file in tokenizer.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    assert len(rows(extended(phase(tmp_path / "hf"), tmp_path / "out"))) == 3
    with pytest.raises(UserError, match="lacks"):
        extended(phase(tmp_path / "hf", "extension.optimizer_state=kept"), tmp_path / "other")


@pytest.mark.parametrize(
    ("run", "overrides", "words"),
    [
        # 128k before 32k: the phase between is missing.
        (
            "start",
            ["extension.from_length=256", "data.sequence_length=320"],
            ["trained with sequences of 128 tokens", "goes on from 256", "to 320", "run the phase before it first"],
        ),
        # 32k after 32k.
        ("first", [], ["trained with sequences of 256 tokens", "goes on from 128", "past this phase already"]),
        ("start", ["model.num_hidden_layers=3"], ["another network", "num_hidden_layers was 2 and is 3"]),
        ("start", ["model.rope_theta=500.0"], ["another network", "rope_theta was 10000.0 and is 500.0"]),
        ("start", ["extension.initial_from=runs/typo"], ["'runs/typo' is not there", "run the phase before"]),
        ("start", ["extension.from_length=256"], ["extension.from_length = 256: expected less than", "256"]),
        ("start", ["tokenizer.path=tok"], ["tokenizer.path and extension.initial_from"]),
    ],
)
def test_refusals(run, overrides, words, request, tmp_path):
    with pytest.raises(UserError) as refusal:
        extension_stages(RunContext(phase(request.getfixturevalue(run), *overrides), tmp_path))
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not list(tmp_path.iterdir())


def test_each_command_refuses_the_other_s_recipe(start, tmp_path):
    with pytest.raises(UserError, match=r"this recipe has no \[extension\]"):
        extension_stages(RunContext(Recipe.load(RECIPES / "quickstart-reduced.toml"), tmp_path))
    with pytest.raises(UserError, match=r"this recipe starts from .*: use dsv3 extend"):
        pretraining_stages(RunContext(phase(start), tmp_path))


def test_a_second_phase_goes_on_from_the_first(first, tmp_path):
    out = extended(phase(first, "extension.from_length=256", "data.sequence_length=320"), tmp_path)
    assert rows(out)[-1]["tokens"] >= 1536


def test_a_phase_is_keyed_by_its_start_s_content(start, first, tmp_path):
    def inputs(run):
        return extension_stages(RunContext(phase(run), tmp_path))[-1].inputs["start"]

    assert inputs(start) == inputs(start)
    longer = Recipe.load(RECIPES / "quickstart-reduced.toml", [*START, "training.tokens=1536"])
    run_stages(pretraining_stages(RunContext(longer, tmp_path)), tmp_path, silent)
    assert inputs(tmp_path) != inputs(start)
