"""Schedules as data: complete, without deadlock, and with the bubbles and activations that the report gives."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from dsv3.errors import RunError, UserError
from dsv3.parallel.pipeline.instructions import (
    Backward,
    Forward,
    InputGradient,
    Message,
    Overlapped,
    Receive,
    Send,
    WeightGradient,
    chunks,
)
from dsv3.parallel.pipeline.messages import grouped
from dsv3.parallel.pipeline.schedules import SCHEDULES, make_schedule
from dsv3.parallel.pipeline.simulator import Costs, inputs, made, peak_activations, simulate

LAYOUTS = [
    (name, ranks) for name in SCHEDULES for ranks in (2, 3, 4, 7, 8, 12, 32) if name != "dual_pipe" or ranks % 2 == 0
]


def sizes(ranks):
    return [2 * ranks, 2 * ranks + 2, 5 * ranks + ranks % 2] if ranks < 32 else [66]


def exchanged(schedule, kind):
    """(from, to) -> what travels there, in order, as the ranks that send or those that receive see it."""
    found = {}
    for rank, program in enumerate(schedule.programs):
        for each in program:
            if isinstance(each, kind):
                ends = (rank, each.peer) if kind is Send else (each.peer, rank)
                found.setdefault(ends, []).append((each.what, each.stage, each.micro_batch))
    return found


def run_patiently(schedule):
    """Runs the programs on ranks that wait for every message of a group, sends too, before they go on."""
    groups = [grouped(program) for program in schedule.programs]
    at, there = [0] * schedule.ranks, [set() for _ in groups]

    def met(rank, message):
        peer = message.peer
        kind = Receive if isinstance(message, Send) else Send
        other = kind(message.what, message.stage, message.micro_batch, rank)
        return any(other in group for group in groups[peer][: at[peer] + 1])

    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(groups):
            while at[rank] < len(mine):
                group = mine[at[rank]]
                if isinstance(group[0], Message):
                    if not all(met(rank, message) for message in group):
                        break
                    for message in group:
                        if isinstance(message, Receive):
                            kind = Forward if message.what == "activation" else InputGradient
                            step = -1 if message.what == "activation" else 1
                            there[rank].add(kind(message.stage + step, message.micro_batch))
                else:
                    for each in chunks(group[0]):
                        needs = inputs(each, schedule.stages - 1)
                        assert all(need in there[rank] for need in needs), f"rank {rank} lacks {needs} for {each}"
                    there[rank] |= {made(each) for each in chunks(group[0])}
                at[rank], moved = at[rank] + 1, True
    assert at == [len(mine) for mine in groups], "deadlock"


@pytest.mark.parametrize(("name", "ranks"), LAYOUTS)
def test_every_pass_once_and_no_deadlock(name, ranks):
    for number, micro_batches in enumerate(sizes(ranks)):
        schedule = make_schedule(name, ranks, micro_batches)
        passes = [each for program in schedule.programs for entry in program for each in chunks(entry)]
        for kinds in ((Forward,), (Backward, InputGradient), (Backward, WeightGradient)):
            found = [(each.stage, each.micro_batch) for each in passes if isinstance(each, kinds)]
            assert sorted(found) == [(s, m) for s in range(schedule.stages) for m in range(micro_batches)]
        if ranks < 32 and number < 2:
            run_patiently(schedule)
        assert exchanged(schedule, Send) == exchanged(schedule, Receive)


@pytest.mark.parametrize(
    ("name", "bubbles", "extra"),
    [
        ("one_f_one_b", {4: 9, 8: 21, 16: 45}, 0),
        ("zero_bubble", {4: 3, 8: 7, 16: 15}, 0),
        ("dual_pipe", {4: 2, 8: 6, 16: 14}, 1),
        ("dual_pipe_v", {2: 2, 4: 6, 8: 14}, 1),
    ],
)
def test_bubbles_and_activations_of_the_report(name, bubbles, extra):
    for ranks, bubble in bubbles.items():
        for micro_batches in sizes(ranks):
            schedule = make_schedule(name, ranks, micro_batches)
            timeline = simulate(schedule.programs, Costs())
            assert [timeline.idle(rank) for rank in range(ranks)] == [bubble] * ranks
            peaks = [peak_activations(program) for program in schedule.programs]
            assert max(peaks) == schedule.stages + extra
            assert name == "one_f_one_b" or min(peaks) == max(peaks)


def test_formulas_with_other_costs():
    f, b, w = 1.25, 2.5, 1.25
    costs = Costs(f, b, w, pair=3.1)
    bubble = {name: simulate(make_schedule(name, 8, 24).programs, costs).bubble for name in SCHEDULES}
    assert bubble["one_f_one_b"] == pytest.approx(7 * (f + b))
    assert bubble["zero_bubble"] == pytest.approx(7 * (f + b - 2 * w))
    assert bubble["dual_pipe"] == pytest.approx(3 * (3.1 + b - 3 * w))
    assert bubble["dual_pipe_v"] == pytest.approx(7 * (3.1 + b - 3 * w))


def test_messages_take_time():
    """A lone micro-batch travels down the ranks and up again."""
    lone = simulate(make_schedule("one_f_one_b", 4, 1).programs, Costs(message=0.5))
    assert lone.total == 4 * (1 + 2) + 2 * 3 * 0.5


def test_a_program_that_cannot_go_on_names_who_waits():
    first, second = [Forward(0, 0), Backward(0, 0)], [Backward(1, 0), Forward(1, 0)]
    with pytest.raises(
        RunError, match=r"rank 0 waits with Backward\(stage=0, micro_batch=0\); rank 1 waits with Backward"
    ):
        simulate([first, second], Costs())


@pytest.mark.parametrize("name", ["dual_pipe", "dual_pipe_v"])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_too_few_micro_batches_run_one_f_one_b_on_the_same_layout(name, ranks):
    """Whoever holds a stage keeps it; each pass runs once, on one of its holders, micro-batches all in one direction."""
    usual = make_schedule(name, ranks, 2 * ranks, "one_f_one_b")
    assert usual == make_schedule(name, ranks, 2 * ranks)
    for micro_batches in {1, ranks // 2, 2 * ranks - 1}:
        schedule = make_schedule(name, ranks, micro_batches, "one_f_one_b")
        assert (schedule.name, schedule.placement) == ("one_f_one_b", usual.placement)
        for kind in (Forward, Backward):
            passes = [each for program in schedule.programs for each in program if isinstance(each, kind)]
            assert sorted((each.stage, each.micro_batch) for each in passes) == [
                (stage, i) for stage in range(usual.stages) for i in range(micro_batches)
            ]
        for rank, program in enumerate(schedule.programs):
            assert {each.stage for each in program if isinstance(each, Forward)} <= set(usual.placement[rank])
        if ranks < 16:
            run_patiently(schedule)
        timeline = simulate(schedule.programs, Costs())
        peak = max(map(peak_activations, schedule.programs))
        if name == "dual_pipe":
            alone = make_schedule("one_f_one_b", ranks, micro_batches)
            assert schedule.programs == alone.programs
        elif micro_batches >= ranks:
            assert timeline.bubble == (ranks - 1) * 5
            assert peak <= 2 * ranks + 1


def test_one_f_one_b_through_a_v_waits_as_its_formula_says():
    schedule = make_schedule("dual_pipe_v", 8, 15, "one_f_one_b")
    assert simulate(schedule.programs, Costs(1.25, 2.5, 1.25)).bubble == pytest.approx(7 * (1.25 + 2 * 2.5))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 4), (2, 7), (4, 8), (4, 13), (8, 20)])
def test_dual_pipe_v_is_that_of_torch(ranks, micro_batches):
    schedule = make_schedule("dual_pipe_v", ranks, micro_batches)
    for rank, program in enumerate(schedule.programs):
        settings = SimpleNamespace(pp_group_size=ranks, _n_microbatches=micro_batches, _num_stages=2 * ranks)
        theirs = torch_schedules.ScheduleDualPipeV._calculate_single_rank_operations(settings, rank)
        expected = [each for action in theirs if action is not None for each in from_torch(action)]
        assert [each for each in program if not isinstance(each, Message)] == expected


def from_torch(action):
    kinds = {
        "FORWARD": Forward, "FULL_BACKWARD": Backward, "BACKWARD_INPUT": InputGradient, "BACKWARD_WEIGHT": WeightGradient,
    }  # fmt: skip
    if action.sub_actions is None:
        return [kinds[action.computation_type.name](action.stage_index, action.microbatch_index)]
    forward, backward = action.sub_actions
    return [Overlapped(*from_torch(forward), *from_torch(backward))]


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "said"),
    [
        ("dual_pipe", 3, 12, "dual_pipe on 3 ranks .parallel.pipeline.: expected an even number, such as 2 or 4"),
        ("dual_pipe", 1, 12, "dual_pipe on 1 ranks .*: expected an even number, such as 2$"),
        ("dual_pipe", 4, 6, "dual_pipe on 4 ranks with 6 micro-batches: expected 8, or one_f_one_b"),
        ("dual_pipe", 4, 9, "expected 8 or 10, or one_f_one_b"),
        ("dual_pipe_v", 4, 7, "expected 8"),
        ("one_f_one_b", 0, 7, "one_f_one_b on 0 ranks .*: expected at least 1"),
        ("zero_bubble", 2, 0, "zero_bubble on 2 ranks with 0 micro-batches: expected 1"),
        ("dualpipe", 2, 4, "unknown schedule 'dualpipe': did you mean 'dual_pipe'"),
    ],
)
def test_refusals(name, ranks, micro_batches, said):
    with pytest.raises(UserError, match=said):
        make_schedule(name, ranks, micro_batches)
