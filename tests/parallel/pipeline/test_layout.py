"""Which blocks are in which stage."""

from itertools import combinations

import pytest

from dsv3.errors import UserError
from dsv3.parallel.pipeline.layout import balanced_layout
from dsv3.parallel.pipeline.schedules import make_schedule


def test_no_other_division_is_better():
    costs, first, last = [1.0, 0.6, 2.0, 1.1, 0.9, 1.7, 1.0], 0.3, 1.4
    for stages in range(1, 8):

        def greatest(edges, stages=stages):
            sums = [sum(costs[a:b]) for a, b in zip((0, *edges), (*edges, 7), strict=True)]
            sums[0] += first
            sums[-1] += last
            assert len(sums) == stages
            return max(sums)

        layout = balanced_layout(costs, stages, first, last, 0)
        assert [name for stage in layout.stages for name in stage] == list("0123456")
        edges = tuple(int(stage[0]) for stage in layout.stages[1:])
        assert greatest(edges) == min(greatest(each) for each in combinations(range(1, 7), stages - 1))


def test_the_report_s_network_in_sixteen_stages():
    """A lighter first and last stage, MTP in the last."""
    layout = balanced_layout([0.8] * 3 + [1.0] * 58, 16, 0.0, 2.0, 1)
    assert layout.stages[-1][-1] == "mtp.0"
    sizes = [len(stage) for stage in layout.stages]
    assert sum(sizes) == 62
    assert set(sizes[1:-1]) <= {3, 4}
    assert sizes[-1] <= 3


def test_parts_and_who_holds_them():
    layout = balanced_layout([1.0] * 4, 4, 0.0, 0.0, 1)
    assert layout.parts(0) == {"layers.0", "embed_tokens"}
    assert layout.parts(3) == {"layers.3", "mtp.0", "norm", "lm_head", "embed_tokens"}
    assert layout.holders(make_schedule("one_f_one_b", 4, 4))["embed_tokens"] == (0, 3)
    assert layout.holders(make_schedule("dual_pipe_v", 2, 4))["embed_tokens"] == (0,)
    assert set(layout.holders(make_schedule("dual_pipe", 4, 8)).values()) == {(0, 3), (1, 2)}


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(UserError, match="5 pipeline stages for 4 blocks: expected 1 to 4"):
        balanced_layout([1.0] * 4, 5, 0.0, 0.0, 0)
