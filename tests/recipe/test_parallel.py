import pytest

from dsv3.errors import UserError
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.recipe.parallel import ParallelSection, check_world
from dsv3.recipe.schedule import Schedules
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
        (["parallel.transport=copy"], "slabs of one size: expected parallel.bounded_exchange = true"),
        (["parallel.transport=copy", "parallel.bounded_exchange=true", "training.device=cpu"], "expected 'nccl' with"),
        (["parallel.pipeline=2", "parallel.schedule=one_f_one_b"], "pipeline = 2 needs training.micro_batch_size"),
    ],
)  # fmt: skip
def test_an_illegal_layout_is_refused_with_its_neighbours(overrides, said):
    with pytest.raises(UserError, match=said):
        Recipe.from_dict(CONTENT, overrides)


PIPELINE = ["model.num_hidden_layers=8", "training.micro_batch_size=1", "parallel.pipeline=4", "training.tokens=1M"]
RAMP = """schedule.batch_size=[{kind="linear", from=2, to=20, tokens="400K"}, {kind="constant", value=20}]"""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["parallel.pipeline=5", "parallel.schedule=dual_pipe"],
            "dual_pipe on 5 ranks .* an even number, such as 4 or 6",
        ),
        (
            ["parallel.pipeline=5"],
            "pipeline = 5: dual_pipe_v makes 10 stages, .*num_hidden_layers = 8: expected at most 4",
        ),
        (["parallel.pipeline=10", "parallel.schedule=dual_pipe"], "makes 10 stages, .*: expected at most 8"),
        (["training.balance=batch", "training.balance_alpha=1"], "training.balance = 'batch' needs .* expected 'bias'"),
        (
            ["schedule.batch_size=6"],
            "batch_size = 6 gives each of 1 pipelines 6 micro-batches, and dual_pipe_v on 4 ranks takes 8 or more: expected a "
            "batch of 8 sequences, a smaller training.micro_batch_size, or parallel.schedule_below = 'one_f_one_b'",
        ),
        (
            ["schedule.batch_size=22", "parallel.data=2", "parallel.schedule=dual_pipe"],
            "11 micro-batches.*takes 10 or 12: .* of 20 or 24 seq",
        ),
        # Every size on the way up counts, not its ends alone.
        ([RAMP], "schedule.batch_size = 2 gives"),
        (
            [RAMP, "parallel.schedule=dual_pipe", "parallel.schedule_below=one_f_one_b"],
            "batch_size = 9 gives .* takes 8 or 10",
        ),
        (["parallel.schedule_below=zero_bubble"], "expected 'one_f_one_b'"),
    ],
)  # fmt: skip
def test_what_a_schedule_cannot_serve_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        Recipe.from_dict(CONTENT, [*PIPELINE, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.schedule=one_f_one_b", "parallel.pipeline=8", "schedule.batch_size=1"],
        ["parallel.schedule_below=one_f_one_b", RAMP],
        [
            RAMP, "parallel.schedule_below=one_f_one_b", "parallel.schedule=dual_pipe", "schedule.batch_size_multiple=2",
        ],
        ["parallel.pipeline=1", "parallel.schedule=dual_pipe", "schedule.batch_size=3"],
    ],
)  # fmt: skip
def test_what_it_can_serve_is_not(overrides):
    recipe = Recipe.from_dict(CONTENT, [*PIPELINE, *overrides])
    for size in Schedules.resolve(recipe).batch_sizes:
        parallel = recipe.parallel
        if parallel.pipeline > 1:
            make_schedule(parallel.schedule, parallel.pipeline, recipe.micro_batches(size), parallel.schedule_below)


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
