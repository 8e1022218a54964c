import pytest

from dsv3.errors import UserError
from dsv3.recipe.parallel import ParallelSection, check_world
from dsv3.recipe.schema import Recipe

CONTENT = {
    "model": {"preset": "debug"},
    "data": {"sources": [{"name": "text", "uri": "builtin:stdlib"}], "sequence_length": 32},
    "schedule": {"learning_rate": 1e-3, "batch_size": 8},
    "training": {"tokens": 1000},
}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.data=4", "parallel.expert=3"], r"parallel.expert = 3: expected a divisor .* such as 2 or 4"),
        (["parallel.data=2", "parallel.expert=4"], r"parallel.data = 2 and of model.n_routed_experts = \d+, such as 2"),
        (["parallel.data=3"], r"batch_size = 8 is no multiple of parallel.data = 3: expected a batch of 6 or 9 .*layout"),
        (
            ["parallel.data=4", "training.micro_batch_size=4"],
            r"no multiple of parallel.data = 4 x training.micro_batch_size = 4: expected a batch of 16",
        ),
        (
            ["parallel.data=2", 'schedule.batch_size=[{kind="linear", from=4, to=8, tokens=500}, {kind="constant", value=8}]'],
            r"batch_size_multiple = 1: expected a multiple of parallel.data = 2",
        ),
        (["parallel.experts=2"], "did you mean 'expert'"),
    ],
)  # fmt: skip
def test_an_illegal_layout_is_refused_with_its_neighbours(overrides, said):
    with pytest.raises(UserError, match=said):
        Recipe.from_dict(CONTENT, overrides)


@pytest.mark.parametrize(
    ("layout", "ranks", "said"),
    [
        (dict(data=4), 1, "start it with torchrun --nproc-per-node 4"),
        (dict(), 2, "start it without torchrun, or set parallel.data=2 parallel.pipeline=1"),
        (dict(data=4, expert=2), 6, "parallel.data=6 parallel.pipeline=1 or parallel.data=2 parallel.pipeline=3"),
    ],
)
def test_another_number_of_processes_is_refused(layout, ranks, said):
    with pytest.raises(UserError, match=said):
        check_world(ParallelSection(**layout), ranks)


def test_the_layout_decides_nothing_of_the_result():
    from dsv3.recipe.changes import check_changes

    old, new = (Recipe.from_dict(CONTENT, [f"parallel.data={data}"]) for data in (1, 2))
    accepted, refused = check_changes(old, new, 3)
    assert accepted == ["parallel.data was 1 and is 2"]
    assert refused == []
