"""Which tokens the next pass reads. There are no prefill and decode phases: some of a request's tokens are computed, others not yet."""

import time
from collections import deque

from dsv3.inference.blocks import BlockPool
from dsv3.inference.plan import Found, Plan, Work
from dsv3.inference.request import Request


class Scheduler:
    """A pass reads at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests.

    Requests that generate come first, then prompts, in chunks if the budget requires it. When blocks run out, the request
    admitted last is preempted: it frees its blocks and waits to be computed again.
    """

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, drafts: int, depth: int, reuse: bool
    ):
        self.pool, self.max_num_seqs, self.max_num_batched_tokens = pool, max_num_seqs, max_num_batched_tokens
        self.drafts, self.reuse = drafts, reuse
        self.ahead = min(drafts, depth)
        """How far the MTP modules in use look ahead."""
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        """By number, in the order in which they were admitted."""
        self.preemptions = self.queries = self.hits = 0

    def blocks_for(self, tokens: int) -> int:
        """Blocks for so many tokens of one sequence, with room for what drafting writes after them."""
        return -(-(tokens + max(self.drafts - 1, 0)) // self.pool.block_size)

    def plan(self) -> Plan | None:
        """The next pass; None when there is nothing to do."""
        budget, works = self.max_num_batched_tokens, list[Work]()
        planned: set[int] = set()
        for request in sorted(self.running.values(), key=prompt_last):
            if request.number not in self.running or not budget:
                continue
            count = min(len(request.tokens) - request.computed + len(request.drafts), budget)
            if self.reserve(request, count, planned):
                works.append(request.work(count, self.ahead))
                planned.add(request.number)
                budget -= count
        while budget and self.waiting and len(self.running) < self.max_num_seqs and self.admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running[request.number] = request
            count = min(len(request.tokens) - request.computed, budget)
            works.append(request.work(count, self.ahead))
            budget -= count
        return Plan(works, self.drafts) if works else None

    def reserve(self, request: Request, count: int, planned: set[int]) -> bool:
        """Allocates blocks for so many more tokens, preempting requests not in the plan if need be; False when blocks lack."""
        while (lacking := self.blocks_for(request.computed + count) - len(request.blocks)) > len(self.pool.free):
            others = [each for each in self.running.values() if each.number not in planned and each is not request]
            if not others:
                return False
            self.preempt(others[-1])
        if lacking > 0:
            request.blocks += [self.pool.take() for _ in range(lacking)]
        return True

    def preempt(self, request: Request) -> None:
        """Frees its blocks and puts it at the head of the queue."""
        self.remove(request)
        request.computed, request.drafts = 0, []
        self.waiting.appendleft(request)
        self.preemptions += 1

    def admit(self, request: Request) -> bool:
        """Allocates blocks for all tokens of a waiting request, cached ones included; False when blocks lack."""
        size, total = self.pool.block_size, len(request.tokens)
        # The last token is always read: its logits give the next one.
        reusable = 0 if not self.reuse or request.unscored else (total - 1) // size
        keys = [request.key(k, size) for k in range(reusable)]
        found = self.pool.find(keys, request.tokens)
        lacking = self.blocks_for(total) - len(found)
        if lacking > len(self.pool.free):
            self.pool.release(found)
            return False
        request.blocks = found + [self.pool.take() for _ in range(lacking)]
        request.computed = len(found) * size
        if request.cached is None:
            request.cached, request.admitted = request.computed, time.perf_counter()
            self.queries += total
            self.hits += request.computed
        return True

    def advance(self, request: Request, work: Work, found: Found) -> None:
        """Updates what is in the cache after a pass, when its tokens have joined the request's."""
        wrong = 0 if work.choice is None else work.choice.drafts + 1 - len(found.tokens)
        before, request.computed = request.computed, work.start + len(work.tokens) - wrong
        request.drafts = found.drafts
        size = self.pool.block_size
        # A continuation that has ended may lack the last tokens computed.
        full = min(request.computed, len(request.tokens)) // size
        for k in range(before // size, full if self.reuse else 0):
            self.pool.remember(request.blocks[k], request.key(k, size), request.tokens[k * size : (k + 1) * size])

    def remove(self, request: Request, spoilt: bool = False) -> None:
        """Removes a request, running or waiting. `spoilt`: blocks that it alone holds must not be reused."""
        if self.running.pop(request.number, None) is not None:
            for number in request.blocks:
                if spoilt and self.pool.blocks[number].users == 1:
                    self.pool.forget(number)
            self.pool.release(request.blocks)
            request.blocks = []
        elif request in self.waiting:
            self.waiting.remove(request)


def prompt_last(request: Request) -> bool:
    """Sorts requests that generate before those that still read known tokens."""
    return len(request.tokens) - request.computed > 1
