"""`recipes/small`: its sizes, and all of it in seconds at other ones."""

from pathlib import Path

import pytest

from dsv3.cli import main
from dsv3.planning.parameters import count_parameters
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "small" / "pretrain.toml"


def test_it_is_a_deepseek_v3_of_twelve_blocks_trained_in_fp8_from_what_is_installed():
    recipe = Recipe.load(RECIPE)
    config = recipe.model.config()
    assert (config.num_hidden_layers, config.first_k_dense_replace, config.num_nextn_predict_layers) == (12, 1, 1)
    assert (config.n_routed_experts, config.n_shared_experts, config.n_group, config.topk_group) == (64, 1, 8, 4)
    counted = count_parameters(config)
    assert (counted.active, counted.trained) == (121_875_392, 747_019_648)
    assert recipe.training.precision == "fp8"
    assert {source.uri for source in recipe.data.sources} == {
        "package:torch", "package:sympy", "builtin:stdlib", "builtin:tinypy",
    }  # fmt: skip
    assert Schedules.resolve(recipe).total_steps == 2564
    # Twelve minutes at 60K tokens a second; the quarter of an hour has data and evaluations in it.
    assert recipe.training.tokens / 60e3 / 60 < 12
    assert {"bpb", "tinypy", "mtp"} == set(recipe.evaluation.tasks)


@pytest.mark.prove
def test_scaled_down_it_runs_to_its_scores(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.py").write_text("".join(f"value_{k} = {number} * {k}\n" for k in range(30)))
    overrides = [
        "model.preset=tiny", "model.vocab_size=512", "model.num_hidden_layers=2", "model.hidden_size=32",
        "model.intermediate_size=32", "model.moe_intermediate_size=16", "data.sequence_length=128",
        *(f"data.sources.{number}.uri={corpus}" for number in range(3)),
        "data.sources.3.tokens=20K", "tokenizer.training_bytes=100K", "training.tokens=4096", "training.device=cpu",
        "schedule.learning_rate.0.steps=1", "schedule.learning_rate.1.until_tokens=2048",
        "evaluation.bits_per_byte_bytes=1", "evaluation.validation_tokens=1K", "evaluation.tinypy_tasks=1",
        "evaluation.sample_prompts=[]", "data.fim_rate=0",
    ]  # fmt: skip
    assert main.run(["pretrain", str(RECIPE), "--out", str(tmp_path / "run"), *overrides]) == 0
    said = capsys.readouterr().out
    for source in ("torch", "sympy", "stdlib", "tinypy"):
        assert f"{source}: accepted of the MTP modules' drafts: draft 1 " in said
    assert said.count("bits per byte") == 4
    assert "tinypy: 0 of 1 tasks solved" in said
