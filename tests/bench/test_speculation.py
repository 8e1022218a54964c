import pytest
import torch

from dsv3.bench.speculation import answer, bench_speculation
from dsv3.data.tokenizer import train_tokenizer
from dsv3.errors import UserError
from dsv3.inference.engine import Engine, EngineConfig
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.recipe.schema import Recipe
from dsv3.weights.checkpoint import save_checkpoint

TEXT = "def add(first, second):\n    return first + second\n"


def echoing(depth: int) -> DeepSeekV3:
    """A network whose blocks add nothing, so that a token decides the next one: MTP modules are right when they read it alone."""
    model = DeepSeekV3(ModelConfig.preset("debug", num_nextn_predict_layers=depth)).initialize("fan_in", seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.zero_()
    return model


@pytest.fixture
def run(tmp_path):
    def write(recipe: bool = True, depth: int = 1):
        model = DeepSeekV3(ModelConfig.preset("debug", num_nextn_predict_layers=depth)).initialize("fan_in", seed=1)
        content = {
            "model": {"preset": "debug", "num_nextn_predict_layers": depth},
            "data": {
                "sources": [{"name": "stdlib", "uri": "builtin:stdlib"}, {"name": "tinypy", "uri": "builtin:tinypy"}],
                "sequence_length": 32,
            },
            "schedule": {"learning_rate": 1e-3, "batch_size": 2},
            "training": {"tokens": 640},
        }  # fmt: skip
        state = {"model": model.config.to_hf()} | ({"recipe": Recipe.from_dict(content).to_dict()} if recipe else {})
        train_tokenizer([TEXT] * 20, 320).save(tmp_path / "tokenizer")
        save_checkpoint(
            tmp_path / "run" / "checkpoints" / "step-00000001", {"model": model.state_dict()}, state,
            {"tokenizer": tmp_path / "tokenizer"},
        )  # fmt: skip
        return tmp_path / "run"

    return write


def test_every_source_is_continued_with_every_number_of_drafts(run):
    result = bench_speculation(run(), 1, drafts=(0, 1, 2), tokens=12, prompt=8, device="cpu")
    sides = ["no drafts", "1 drafts", "2 drafts"]
    assert [(row.group, row.name) for row in result.rows] == [(g, s) for g in ("stdlib", "tinypy") for s in sides]
    assert [each.title for each in result.ratios] == ["stdlib", "tinypy"]
    assert {each.theirs for each in result.ratios} == {"no drafts"}
    for row in result.rows:
        speed = row.tokens_per_second.median
        assert row.figures["tokens a pass"] / row.figures["ms a pass"] * 1000 == pytest.approx(speed)
    assert result.rows[0].figures["tokens a pass"] == 1
    assert all("4 of 4 answers as without drafts" in each for each in result.checks.values())
    assert list(result.checks) == [f"{g}, {k} drafts" for g in ("stdlib", "tinypy") for k in (1, 2)]


def test_passes_and_accepted_drafts_are_counted():
    plain, drafting = echoing(0), echoing(1)
    with torch.no_grad():
        module = drafting.mtp[0]
        module.eh_proj.weight.zero_()
        hidden = drafting.config.hidden_size
        module.eh_proj.weight[:, :hidden] = torch.eye(hidden)
    prompts = [[1, 5, 9, 200], [3, 4]]
    alone = answer(Engine(plain, None, EngineConfig(4)), prompts, 13)
    assert (alone.passes, alone.accepted) == (26, ())
    # Every draft is right: the prompt's pass gives a token, and each of six others two.
    drafted = answer(Engine(drafting, None, EngineConfig(4, num_speculative_tokens=1)), prompts, 13)
    assert drafted.tokens == alone.tokens
    assert (drafted.passes, drafted.accepted) == (14, (1.0,))


def test_what_cannot_be_measured_is_refused(run):
    with pytest.raises(UserError, match="without the recipe"):
        bench_speculation(run(recipe=False), device="cpu")


def test_a_model_without_modules_is_refused(run):
    with pytest.raises(UserError, match="no MTP modules"):
        bench_speculation(run(depth=0), device="cpu")
