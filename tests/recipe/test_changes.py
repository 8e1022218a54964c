import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.recipe.changes import agree, check_changes
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe

LR = '[{kind="linear", from=0.0, to=1e-3, steps=10}, {kind="constant", value=1e-3, until_tokens=6400}, {kind="cosine", from=1e-3, to=1e-4}]'  # fmt: skip


def recipe(*overrides):
    content = {
        "model": {"preset": "debug"},
        "data": {"sources": [{"name": "a", "uri": "builtin:stdlib"}], "sequence_length": 32},
        "schedule": {"learning_rate": 1e-3, "batch_size": 4},
        "training": {"tokens": 12_800},
    }
    return Recipe.from_dict(content, overrides)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.checkpoint_every_steps=5", "training.checkpoint_every_steps"),
        ("training.keep_last=2", "training.keep_last"),
        ("training.device=cuda", "training.device"),
        ('training.recompute=["norms"]', "training.recompute"),
        ("evaluation.tinypy_tasks=3", "evaluation.tinypy_tasks"),
        ('logging.sinks=["wandb"]', "logging.sinks"),
        ("training.tokens=25_600", "training.tokens"),
    ],
)
def test_what_decides_nothing_of_the_steps_made_is_safe(override, key):
    (accepted,), refused = check_changes(recipe(), recipe(override), 40)
    assert accepted.startswith(f"{key} was")
    assert refused == []


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.weight_decay=0.2", "data.fim_rate=0.5", "training.seed=1", "training.micro_batch_size=2",
        "training.precision=fp32", "training.ema_decay=0.9", "schedule.learning_rate=2e-3", "schedule.batch_size=8",
        "schedule.mtp_weight=0.1", "model.hidden_size=64", "training.tokens=4000", "training.balance_alpha=0.0",
    ],
)  # fmt: skip
def test_what_decides_the_result_is_not(override):
    accepted, refused = check_changes(recipe(), recipe(override), 40)
    assert (accepted, bool(refused)) == ([], True)


def test_a_longer_training_is_safe_until_the_piece_that_stretches_with_it_begins():
    """The cosine lasts to the end of the training: from its first step on, another end is another past."""
    old, new = recipe(f"schedule.learning_rate={LR}"), recipe(f"schedule.learning_rate={LR}", "training.tokens=25_600")
    refused = [bool(check_changes(old, new, step)[1]) for step in (1, 10, 49, 51, 52, 99)]
    assert refused == [False, False, False, False, True, True]


def test_what_is_still_to_come_may_be_scheduled_anew():
    old = recipe('schedule.batch_size=[{kind="constant", value=4, steps=20}, {kind="constant", value=8}]')
    new = recipe('schedule.batch_size=[{kind="constant", value=4, steps=20}, {kind="constant", value=16}]')
    assert agree(old, new, 20)
    assert not agree(old, new, 21)
    split = '[{kind="constant", value=1e-3, steps=7}, {kind="constant", value=1e-3}]'
    assert agree(recipe(), recipe(f"schedule.learning_rate={split}"), 100)


@given(
    up=st.integers(1, 30), low=st.floats(0, 1e-3), kind=st.sampled_from(["linear", "cosine"]), step=st.integers(0, 100),
    other=st.integers(1, 30), tokens=st.sampled_from([12_800, 12_928, 25_600]),
)  # fmt: skip
def test_agreement_is_that_of_every_single_step(up, low, kind, step, other, tokens):
    def made(steps, *more):
        pieces = f'[{{kind="linear", from=0.0, to=1e-3, steps={steps}}}, {{kind="{kind}", from=1e-3, to={low:f}}}]'
        return recipe(f"schedule.learning_rate={pieces}", *more)

    old, new = made(up), made(other, f"training.tokens={tokens}")
    a, b = Schedules.resolve(old).learning_rate, Schedules.resolve(new).learning_rate
    same = all(a.at(at, at * 128) == b.at(at, at * 128) for at in range(step))
    assert agree(old, new, step) == same


def test_what_is_allowed_by_name_passes_and_is_listed():
    old, new = recipe(), recipe("data.fim_rate=0.5", "optimizer.weight_decay=0.2", "training.keep_last=3")
    accepted, refused = check_changes(old, new, 40, [])
    assert accepted == ["training.keep_last was None and is 3"]
    assert refused == ["data.fim_rate was 0.1 and is 0.5", "optimizer.weight_decay was 0.1 and is 0.2"]
    accepted, refused = check_changes(old, new, 40, ["data.fim_rate", "optimizer"])
    assert refused == []
    assert "data.fim_rate was 0.1 and is 0.5 (allowed)" in accepted
    with pytest.raises(UserError, match=r"--allow data.fim_rat: .*did you mean 'data.fim_rate'"):
        check_changes(old, new, 40, ["data.fim_rat"])
