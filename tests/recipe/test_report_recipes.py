"""`recipes/deepseek-v3/` key by key against the technical report (arXiv 2412.19437), its numbers written out here."""

import tomllib
from pathlib import Path

import pytest

from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe

HOME = Path(__file__).parents[2] / "recipes" / "deepseek-v3"

PRETRAIN = {
    "model": {"preset": "deepseek-v3"},
    "data": {
        "sources": [{"name": "corpus", "uri": "corpus/"}],
        "sequence_length": 4096,  # "the maximum sequence length to 4K"
        "fim_rate": 0.1,  # section 4.1
    },
    "optimizer": {"kind": "adamw", "betas": [0.9, 0.95], "moments": "bf16", "weight_decay": 0.1, "clip_norm": 1.0},
    "schedule": {
        "learning_rate": [
            {"kind": "linear", "from": 0, "to": 0.00022, "steps": 2000},
            {"kind": "constant", "value": 0.00022, "until_tokens": 10_000_000_000_000},
            {"kind": "cosine", "from": 0.00022, "to": 0.000022, "tokens": 4_300_000_000_000},
            {"kind": "constant", "value": 0.000022, "tokens": 333_000_000_000},
            {"kind": "constant", "value": 0.0000073},
        ],
        "batch_size": [
            {"kind": "linear", "from": 3072, "to": 15360, "tokens": 469_000_000_000},
            {"kind": "constant", "value": 15360},
        ],
        "batch_size_multiple": 256,  # ours
        "mtp_weight": [
            {"kind": "constant", "value": 0.3, "until_tokens": 10_000_000_000_000},
            {"kind": "constant", "value": 0.1},
        ],
        "bias_update_speed": [
            {"kind": "constant", "value": 0.001, "until_tokens": 14_300_000_000_000},
            {"kind": "constant", "value": 0},
        ],
    },
    "training": {
        "tokens": 14_800_000_000_000,
        "precision": "fp8",
        "balance_alpha": 0.0001,
        "initialization": 0.006,
        "micro_batch_size": 1,  # ours
        "recompute": ["norms", "mla_up", "swiglu"],  # sections 3.2.3 and 3.3.3
    },
    # Section 3.2: 16 stages, experts over 64 ranks on 8 nodes, ZeRO-1.
    "parallel": {
        "pipeline": 16,
        "data": 128,
        "expert": 64,
        "schedule": "dual_pipe",
        "schedule_below": "one_f_one_b",  # ours
    },
}
YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1,
    "mscale_all_dim": 1,
}
TO_32K = {
    "model": {"preset": "deepseek-v3", "max_position_embeddings": 163840, "rope_scaling": YARN},
    "extension": {"initial_from": "runs/deepseek-v3", "from_length": 4096, "optimizer_state": "fresh"},
    "data": {**PRETRAIN["data"], "sequence_length": 32768},
    "optimizer": PRETRAIN["optimizer"],
    "schedule": {"learning_rate": 0.0000073, "batch_size": 1920, "mtp_weight": 0.1, "bias_update_speed": 0},
    "training": {"tokens": 1000 * 1920 * 32768, "precision": "fp8", "balance_alpha": 0.0001},
}
TO_128K = {
    **TO_32K,
    "extension": {"initial_from": "runs/deepseek-v3/extend-32k", "from_length": 32768, "optimizer_state": "fresh"},
    "data": {**PRETRAIN["data"], "sequence_length": 131072},
    "schedule": {**TO_32K["schedule"], "batch_size": 480},
    "training": {**TO_32K["training"], "tokens": 1000 * 480 * 131072},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pretrain.toml", PRETRAIN), ("extend-32k.toml", TO_32K), ("extend-128k.toml", TO_128K)],
)
def test_every_key_is_the_report_s(name, expected):
    written = tomllib.loads((HOME / name).read_text())
    # No key more and none less than here, in whatever spelling of a number.
    assert {section: set(keys) for section, keys in written.items()} == {
        section: set(keys) for section, keys in expected.items()
    }
    assert Recipe.from_dict(written).to_dict() == Recipe.from_dict(expected).to_dict()


def test_every_batch_of_the_ramp_suits_the_layout():
    recipe = Recipe.load(HOME / "pretrain.toml")
    assert recipe.parallel.ranks == 2048
    sizes = Schedules.resolve(recipe).batch_sizes
    assert sizes == list(range(3072, 15360 + 256, 256))
    names = [
        make_schedule("dual_pipe", 16, recipe.micro_batches(size), recipe.parallel.schedule_below).name
        for size in sizes
    ]
    assert names == ["one_f_one_b"] * 4 + ["dual_pipe"] * 45


def test_the_report_s_defaults_are_the_recipe_s():
    """What the report says and a recipe leaves out."""
    plain = Recipe.from_dict(
        {
            "data": {"sources": [{"name": "a", "uri": "a"}]},
            "model": {"preset": "deepseek-v3"},
            "schedule": {"learning_rate": 1e-4, "batch_size": 8},
            "training": {"tokens": 1},
        }
    )
    assert plain.data.sequence_length == 4096
    assert plain.data.fim_rate == 0.1
    assert plain.data.document_mask is False
    assert (plain.optimizer.kind, plain.optimizer.betas, plain.optimizer.weight_decay) == ("adamw", (0.9, 0.95), 0.1)
    assert plain.optimizer.clip_norm == 1.0
    assert (plain.schedule.mtp_weight, plain.schedule.bias_update_speed) == (0.3, 0.001)
    assert (plain.training.balance_alpha, plain.training.initialization) == (1e-4, 0.006)


@pytest.mark.parametrize("name", ["extend-32k.toml", "extend-128k.toml"])
def test_a_phase_has_a_thousand_steps_and_the_report_s_temperature(name):
    recipe = Recipe.load(HOME / name)
    schedules = Schedules.resolve(recipe)
    assert schedules.total_steps == 1000
    scaling = recipe.model.config().rope_scaling
    # sqrt(t) = 0.1 ln 40 + 1, which scales the logits twice; cos and sin stay as they are.
    assert scaling.logit_factor == pytest.approx(1.3688879**2, rel=1e-6)
    assert scaling.rotation_factor == 1.0


def test_the_phases_follow_each_other():
    first, second = (Recipe.load(HOME / name) for name in ("extend-32k.toml", "extend-128k.toml"))
    assert first.extension.from_length == Recipe.load(HOME / "pretrain.toml").data.sequence_length
    assert second.extension.from_length == first.data.sequence_length
    assert first.model == second.model
