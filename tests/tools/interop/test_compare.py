import math

import pytest
import torch

from tools.interop.compare import compare, expected_drafts, smallest_lead
from tools.interop.network import Continuation
from tools.interop.server import Reply

LOGPROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]]).log()
OURS = Continuation([2], [0, 1, 2], LOGPROBS, [1, 0], [1, 0])


def reply(tokens=(0, 1, 2), shift=0.0, at=0):
    """Ours, with other tokens, or with one logprob moved."""
    steps = [dict(enumerate(row)) for row in LOGPROBS.tolist()]
    steps[at][1] += shift
    return Reply(list(tokens), steps)


def test_equal_answers_have_no_problems():
    row = compare("vLLM", [OURS, OURS], [reply(), reply(shift=5e-5, at=2)], (2, 1), (2, 1))
    assert (row.equal, row.total) == (6, 6)
    assert row.logprob_difference == pytest.approx(5e-5, rel=0.01)
    assert row.problems == []


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (reply(shift=2e-4, at=2), "a logprob differs by 0.0002"),
        (reply(shift=math.nan, at=1), "a logprob differs by nan"),
        (reply(tokens=(0, 2, 2)), "4 of 6 greedy tokens are ours"),
        (Reply([0, 1], reply().logprobs[:2]), "5 of 6 greedy tokens are ours"),
    ],
)
def test_a_difference_is_a_problem(changed, problem):
    (found,) = compare("vLLM", [OURS, OURS], [reply(), changed]).problems
    assert found.startswith("vLLM: ")
    assert problem in found


def test_what_follows_the_first_different_token_is_not_compared():
    other = reply(tokens=(0, 2, 2), shift=1.0, at=2)
    assert compare("vLLM", [OURS], [other]).logprob_difference == 0
    assert compare("vLLM", [OURS], [reply(tokens=(0, 2, 2), shift=1.0, at=1)]).logprob_difference == pytest.approx(1)


def test_another_number_of_accepted_drafts_is_a_problem():
    (problem,) = compare("vLLM", [OURS], [reply()], (2, 0), (2, 1)).problems
    assert problem == "vLLM: 0 of 2 drafts were accepted, and our MTP module says 1 of 2"


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        # One letter for each token after the first: is the draft of it right?
        ("nnnn", (4, 0)),
        # Each right one brings a second token, whose own draft is never made.
        ("yyyy", (2, 2)),
        ("ynyn", (2, 2)),
        ("ynnn", (3, 1)),
        ("nyny", (3, 2)),
        ("yyny", (3, 2)),
        ("nnny", (4, 1)),
        ("", (0, 0)),
    ],
)
def test_drafts_are_counted_as_steps_verify_them(right, expected):
    tokens = list(range(10, 11 + len(right)))
    drafts = [token if letter == "y" else -1 for token, letter in zip(tokens[1:], right, strict=True)]
    assert expected_drafts(tokens, drafts) == expected


def test_the_smallest_lead_is_over_all_steps():
    assert smallest_lead([OURS]) == pytest.approx(math.log(0.5 / 0.3))
