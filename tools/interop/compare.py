"""What is compared, and what was promised of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tools.interop.network import Continuation
from tools.interop.server import Reply

LOGPROB_TOLERANCE = 1e-4
"""Nats; FP32 on both sides."""


@dataclass(frozen=True)
class Row:
    """One engine beside ours."""

    engine: str
    equal: int
    """New tokens that are ours; after the first difference of a sequence none counts."""
    total: int
    logprob_difference: float
    """The largest, in nats, over all tokens compared at every step where both have read the same."""
    drafted: int = 0
    accepted: int = 0
    expected_drafted: int = 0
    expected_accepted: int = 0
    """What our MTP module drafts and gets right on the same tokens."""

    @property
    def problems(self) -> list[str]:
        """The promises that do not hold."""
        found = []
        if self.equal != self.total:
            found.append(f"{self.engine}: {self.equal} of {self.total} greedy tokens are ours")
        if not self.logprob_difference <= LOGPROB_TOLERANCE:
            found.append(
                f"{self.engine}: a logprob differs by {self.logprob_difference:.2g}, more than {LOGPROB_TOLERANCE:g}"
            )
        if (self.drafted, self.accepted) != (self.expected_drafted, self.expected_accepted):
            found.append(
                f"{self.engine}: {self.accepted} of {self.drafted} drafts were accepted, and our MTP module says "
                f"{self.expected_accepted} of {self.expected_drafted}"
            )
        return found


def compare(
    engine: str,
    ours: Sequence[Continuation],
    theirs: Sequence[Reply],
    counted: tuple[int, int] = (0, 0),
    expected: tuple[int, int] = (0, 0),
) -> Row:
    """`counted` and `expected`: (drafted, accepted) tokens."""
    equal, differences = 0, []
    for mine, reply in zip(ours, theirs, strict=True):
        common = common_prefix(mine.tokens, reply.tokens)
        equal += common
        # The step that first differs was computed from equal tokens, and is the one to look at.
        for step, logprobs in enumerate(reply.logprobs[: common + 1]):
            differences.append(mine.logprobs[step, list(logprobs)] - torch.tensor(list(logprobs.values())))
    largest = float(torch.cat(differences).abs().max())
    return Row(engine, equal, sum(len(each.tokens) for each in ours), largest, *counted, *expected)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def expected_drafts(tokens: Sequence[int], drafts: Sequence[int]) -> tuple[int, int]:
    """(drafted, accepted) while `tokens` are generated with one draft a step; `drafts[i]` stands for `tokens[i + 1]`.

    A step verifies the draft of the next token: it yields one token, or two when the draft is right.
    """
    drafted, accepted, known = 0, 0, 1
    while known < len(tokens):
        right = drafts[known - 1] == tokens[known]
        drafted, accepted, known = drafted + 1, accepted + right, known + 1 + right
    return drafted, accepted


def smallest_lead(ours: Sequence[Continuation]) -> float:
    """Nats between the best and the second token where they are closest: how much error a greedy choice can bear."""
    best = torch.cat([each.logprobs.topk(2).values for each in ours])
    return float((best[:, 0] - best[:, 1]).min())
