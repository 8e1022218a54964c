"""Runs plans: a plan goes in, what it found comes out. All that it keeps is the model and the cache.

Legend: F tokens of the pass, D hidden, N rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv3.inference.batch import Batch, lay_out
from dsv3.inference.cache import PagedCache
from dsv3.inference.plan import Found, Plan, Work
from dsv3.inference.sampler import Place, choose, logprobs
from dsv3.model.block import Pass
from dsv3.model.feed_forward import Routing
from dsv3.model.rope import Rope
from dsv3.model.transformer import DeepSeekV3


class Runner:
    """One model over one cache."""

    def __init__(self, model: DeepSeekV3, cache: PagedCache):
        self.model, self.cache, self.device = model, cache, model.lm_head.weight.device

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Found]:
        """What each work of the plan found, in an order of its own."""
        batch = lay_out(plan.works, self.model.config, self.device)
        hidden_FD, routing = self.read(batch)
        found = self.chosen(batch, hidden_FD, routing)
        if plan.drafts and self.model.mtp:
            self.draft(batch, hidden_FD, found, plan.drafts)
        return found

    def read(self, batch: Batch) -> tuple[Tensor, dict[str, Routing]]:
        """The main model on one batch: (hidden [F, D], the routing of each MoE block)."""
        self.cache.begin(batch.parts, batch.slot_F)
        output = self.model(batch.token_F[None], positions=batch.position_F[None], cache=self.cache)
        return output.hidden[0], output.routing

    def chosen(self, batch: Batch, hidden_FD: Tensor, routing: dict[str, Routing]) -> list[Found]:
        """Chooses tokens, checks drafts and scores prompts."""
        rows, places = list[int](), list[Place]()
        scored, targets, wanted = list[int](), list[int](), list[int]()
        for work, first in zip(batch.works, batch.first, strict=True):
            end = first + len(work.tokens)
            if work.scored is not None:
                known = [*work.tokens[1:], *work.following[:1]]
                scored += range(first, first + len(known))
                targets, wanted = targets + known, wanted + [work.scored] * len(known)
            if work.choice is not None:
                drafts = work.tokens[len(work.tokens) - work.choice.drafts :]
                rows += range(end - 1 - len(drafts), end)
                places += [(work.choice, k, drafts) for k in range(len(drafts) + 1)]
        logits_NV = self.logits(hidden_FD, rows)
        tokens = choose(logits_NV, places) if rows else []
        scores = iter(logprobs(self.logits(hidden_FD, scored), targets, wanted))
        found, row = [], 0
        for work, first in zip(batch.works, batch.first, strict=True):
            each = Found(work.sequence)
            if work.scored is not None:
                each.scores = [next(scores) for _ in range(len(work.tokens) - 1 + len(work.following[:1]))]
            if work.choice is not None:
                count = work.choice.drafts + 1
                accept(each, work, tokens[row : row + count])
                if work.choice.logprobs is not None:
                    own = logits_NV[row : row + len(each.tokens)]
                    each.logprobs = logprobs(own, each.tokens, [work.choice.logprobs] * len(each.tokens))
                if work.routing:
                    start = first + len(work.tokens) - count
                    experts = [one.expert[start : start + len(each.tokens)].tolist() for one in routing.values()]
                    each.routing = [list(of_token) for of_token in zip(*experts, strict=True)]
                row += count
            found.append(each)
        return found

    def logits(self, hidden_FD: Tensor, rows: Sequence[int]) -> Tensor:
        """[N, V] of these rows."""
        if len(rows) == 0:
            return hidden_FD.new_empty(0, self.model.config.vocab_size)
        return self.model.head(hidden_FD[torch.tensor(rows, device=self.device)])

    def draft(self, batch: Batch, hidden_FD: Tensor, found: Sequence[Found], count: int) -> None:
        """Guesses `count` tokens behind each that was chosen.

        MTP module k reads the tokens of the pass with those k + 1 further on, so that its part of the cache covers what the
        main model's does; tokens that are not known yet are the drafts so far. From the last module on, the last is taken
        again, one position further each time, for the sequences alone that go on.
        """
        modules = list(self.model.mtp)[:count]
        going = [k for k, each in enumerate(found) if each.tokens]
        rows = [batch.first[k] + kept(batch.works[k], found[k]) - 1 for k in going]
        shared = Pass(Rope.at(self.model.config, batch.position_F[None]), None, self.cache)
        self.cache.begin(batch.parts, batch.slot_F)
        for module in modules:
            following = [further(work, each, module.depth + 1) for work, each in zip(batch.works, found, strict=True)]
            tokens = [token for each in following for token in each]
            tokens += [0] * (len(batch.token_F) - len(tokens))
            embedded = self.model.embed(torch.tensor(tokens, device=self.device)[None])
            hidden_FD = module(hidden_FD[None], embedded, shared)[0][0]
            self.guess([found[k] for k in going], hidden_FD, rows)
        if not going or count <= len(modules):
            return
        hidden_ND = hidden_FD[torch.tensor(rows, device=self.device)]
        works = [batch.works[k] for k in going]
        starts = [batch.works[k].start + kept(batch.works[k], found[k]) - 1 for k in going]
        for step in range(1, count - len(modules) + 1):
            single = [
                replace(work, tokens=[found[k].drafts[-1]], start=start + step)
                for work, k, start in zip(works, going, starts, strict=True)
            ]
            again = lay_out(single, self.model.config, self.device)
            self.cache.begin(again.parts, again.slot_F)
            padded = hidden_ND.new_zeros(len(again.token_F), hidden_ND.shape[1])
            padded[: len(hidden_ND)] = hidden_ND
            shared = Pass(Rope.at(self.model.config, again.position_F[None]), None, self.cache)
            out_FD = modules[-1](padded[None], self.model.embed(again.token_F[None]), shared)[0][0]
            self.guess([found[k] for k in going], out_FD, range(len(going)))
            hidden_ND = out_FD[: len(going)]

    def guess(self, found: Sequence[Found], hidden_FD: Tensor, rows: Sequence[int]) -> None:
        """One more draft each: the most likely token behind its row."""
        for each, token in zip(found, self.logits(hidden_FD, rows).argmax(-1).tolist() if found else [], strict=True):
            each.drafts.append(token)


def accept(found: Found, work: Work, tokens: Sequence[int | None]) -> None:
    """Takes tokens as long as the draft before them was right."""
    assert work.choice is not None
    drafts = work.tokens[len(work.tokens) - work.choice.drafts :]
    for token, draft in zip(tokens, [*drafts, None], strict=True):
        if token is None:
            found.failed = True
            return
        found.tokens.append(token)
        if token != draft:
            return


def kept(work: Work, found: Found) -> int:
    """How many of the tokens of a work were right."""
    return len(work.tokens) if work.choice is None else len(work.tokens) - work.choice.drafts - 1 + len(found.tokens)


def further(work: Work, found: Found, distance: int) -> list[int]:
    """Behind each token of a work, the one so far further on, where it is known or guessed; else 0."""
    sure = kept(work, found)
    tokens = [*work.tokens[:sure], *(found.tokens[-1:] or work.following), *found.drafts]
    tokens = tokens[distance : distance + len(work.tokens)]
    return tokens + [0] * (len(work.tokens) - len(tokens))
