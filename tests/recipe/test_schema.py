import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dsv3.errors import UserError
from dsv3.model.config import PRESETS, ModelConfig, RopeScaling
from dsv3.recipe.network import ModelSection
from dsv3.recipe.schema import Recipe
from dsv3.recipe.section import Section

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/**/*.toml"))


def smallest(**sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data": {"sources": [{"name": "text", "uri": "builtin:stdlib"}], "sequence_length": 64},
        "schedule": {"learning_rate": 1e-3, "batch_size": 8},
        "training": {"tokens": 100_000},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def test_the_model_section_has_every_field_of_the_config() -> None:
    elsewhere = {"extra", "initializer_range"}
    assert set(ModelSection.model_fields) - {"preset"} == {field.name for field in fields(ModelConfig)} - elsewhere


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_preset(preset: str) -> None:
    assert ModelSection(preset=preset).config() == ModelConfig.preset(preset)


def test_model_fields_replace_the_preset_s() -> None:
    recipe = Recipe.from_dict(
        smallest(model={"preset": "debug", "q_lora_rank": "none", "hidden_size": 48, "rope_scaling": {"factor": 8}})
    )
    expected = ModelConfig.preset("debug", q_lora_rank=None, hidden_size=48, rope_scaling=RopeScaling(factor=8.0))
    assert recipe.model.config() == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_shipped_recipes_survive_json(path: Path) -> None:
    recipe = Recipe.load(path)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert again.content() == recipe.content()


def test_the_content_is_what_decides_the_result() -> None:
    recipe = Recipe.from_dict(smallest())
    same = Recipe.from_dict(smallest(model={"preset": "tiny", "hidden_size": 128}, training={"tokens": "100K"}))
    other = Recipe.from_dict(smallest(training={"seed": 1}))
    assert recipe.content() == same.content()
    assert recipe.content() != other.content()
    assert recipe.content()["data"] == other.content()["data"]
    assert recipe.content()["training"] != other.content()["training"]


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.from_dict(smallest())
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.seed = 3  # type: ignore[misc]  # the point of the test


def test_every_field_is_documented() -> None:
    def undocumented(section: type[Section], name: str) -> list[str]:
        found = []
        for key, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found += undocumented(field.annotation, f"{name}{key}.") if key != "model" else []
            elif not field.description:
                found.append(name + key)
        return found

    assert undocumented(Recipe, "") == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"sequence_length": 1024}}, ["data.sequence_length = 1024", "max_position_embeddings = 512"]),
        ({"training": {"micro_batch_size": 3}}, ["schedule.batch_size = 8", "micro_batch_size = 3", "6 or 9"]),
        ({"training": {"micro_batch_size": 16}}, ["schedule.batch_size = 8", "16"]),
        (
            {
                "schedule": {"batch_size": [{"kind": "linear", "from": 4, "to": 8}]},
                "training": {"micro_batch_size": 4},
            },
            ["schedule.batch_size_multiple = 1", "micro_batch_size = 4"],
        ),
        ({"model": {"n_group": 3}}, ["model.n_group = 3", "divisor"]),
        ({"model": {"preset": "tinny"}}, ["model.preset = 'tinny'", "did you mean 'tiny'?"]),
        ({"data": {"sources": [{"name": "a", "uri": "x"}, {"name": "a", "uri": "y"}]}}, ["data", "'a' is there twice"]),
        ({"data": {"sources": []}}, ["data.sources", "at least 1"]),
        ({"data": {"sources": [{"name": "../a", "uri": "x"}]}}, ["data.sources.0.name = '../a'"]),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ["betas", "1.0"]),
        ({"training": {"initialization": "fanin"}}, ["training.initialization = 'fanin'", "'fan_in'"]),
        ({"training": {"precision": "fp4"}}, ["training.precision = 'fp4'", "'fp32', 'bf16' or 'fp8'"]),
        ({"optimizer": {"clip_norm": float("nan")}}, ["optimizer.clip_norm", "finite"]),
        ({"training": {"balance": "batch"}}, ["training.balance = 'batch'", "training.balance_alpha", "0.003"]),
        ({"training": {"balance": "loss"}}, ["training.balance = 'loss'", "'bias', 'sequence' or 'batch'"]),
    ],
)
def test_refuses_what_does_not_fit_together(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        Recipe.from_dict(smallest(**sections))
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"data": {"fim_rate": 1.5}}, "data.fim_rate"),
        ({"data": {"split_joined_rate": -0.1}}, "data.split_joined_rate"),
        ({"data": {"validation_fraction": 1.0}}, "data.validation_fraction"),
        ({"data": {"sequence_length": 0}}, "data.sequence_length"),
        ({"data": {"sources": [{"name": "a", "uri": "a.txt", "weight": 0.0}]}}, "data.sources.0.weight"),
        ({"tokenizer": {"digits": 4}}, "tokenizer.digits"),
    ],
)
def test_refuses_figures_out_of_range_by_name(sections: dict[str, Any], key: str) -> None:
    """Here alone: what is made from a recipe does not look again."""
    with pytest.raises(UserError) as refusal:
        Recipe.from_dict(smallest(**sections))
    assert key in str(refusal.value)


def test_a_changing_batch_fits_micro_batches_when_rounded() -> None:
    ramp = {"batch_size": [{"kind": "linear", "from": 4, "to": 8}], "batch_size_multiple": 4}
    assert Recipe.from_dict(smallest(schedule=ramp, training={"micro_batch_size": 4}))
