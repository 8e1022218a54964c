"""Runs plans. The only state is the model and the cache.

Legend: F tokens of the pass, D hidden, N rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.inference.batch import Batch, lay_out
from dsv3.inference.cache import PagedCache
from dsv3.inference.passes import Passes
from dsv3.inference.plan import Found, Plan, Work
from dsv3.inference.sampler import Place, choose, logprobs
from dsv3.model.transformer import DeepSeekV3

SCORED = 256
"""Prompt tokens scored at a time: the logits of one take half a megabyte."""


class Runner:
    """One model over one cache."""

    def __init__(self, model: DeepSeekV3, cache: PagedCache, graphs: bool = False):
        self.model, self.cache, self.device = model, cache, model.lm_head.weight.device
        self.passes = Passes(model, cache, graphs)

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Found]:
        """The results of each work, in any order."""
        batch = lay_out(plan.works, self.model.config, self.device)
        rows, places = list[int](), list[Place]()
        for work, first in zip(batch.works, batch.first, strict=True):
            if work.choice is not None:
                end, drafts = first + len(work.tokens), drafts_of(work)
                rows += range(end - 1 - len(drafts), end)
                places += [(work.choice, k, drafts) for k in range(len(drafts) + 1)]
        hidden_FD, logits_NV, experts = self.passes.main(batch, self.numbers(rows))
        token_N = choose(logits_NV, places) if rows else self.numbers([])
        count = plan.drafts if self.model.mtp else 0
        # Asked for before the host reads what was chosen: it waits once, not twice.
        ahead = self.first_draft(batch, hidden_FD, token_N) if count else None
        tokens = (token_N if ahead is None else torch.cat((token_N, ahead[1]))).tolist()
        found = self.chosen(batch, logits_NV, tokens[: len(rows)], experts)
        self.score(batch, hidden_FD, found)
        if count:
            self.draft(batch, hidden_FD if ahead is None else ahead[0], found, count, tokens[len(rows) :])
        return found

    def numbers(self, values: Sequence[int]) -> Tensor:
        """int64, on the device."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def chosen(self, batch: Batch, logits_NV: Tensor, tokens: Sequence[int], experts: Sequence[Tensor]) -> list[Found]:
        """Accepts chosen tokens as far as drafts were right."""
        found, row = [], 0
        for work, first in zip(batch.works, batch.first, strict=True):
            each = Found(work.sequence)
            found.append(each)
            if work.choice is None:
                continue
            count = work.choice.drafts + 1
            accept(each, work, tokens[row : row + count])
            if (wanted := work.choice.sampling.logprobs) is not None:
                each.logprobs = logprobs(logits_NV[row : row + len(each.tokens)], each.tokens, wanted)
            if work.routing:
                start = first + len(work.tokens) - count
                by_block = [one[start : start + len(each.tokens)].tolist() for one in experts]
                each.routing = [list(of_token) for of_token in zip(*by_block, strict=True)]
            row += count
        return found

    def score(self, batch: Batch, hidden_FD: Tensor, found: Sequence[Found]) -> None:
        """Adds the logprobs of prompts' tokens, where asked for."""
        for work, first, each in zip(batch.works, batch.first, found, strict=True):
            if work.scored is not None:
                targets = [*work.tokens[1:], *work.following[:1]]
                for start in range(0, len(targets), SCORED):
                    part = targets[start : start + SCORED]
                    logits_NV = self.model.head(hidden_FD[first + start : first + start + len(part)])
                    each.scores += logprobs(logits_NV, part, work.scored)

    def first_draft(self, batch: Batch, hidden_FD: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor] | None:
        """(hidden states, guesses [N]) of the first MTP module after a pass where a token is chosen after every one: as long as drafts
        are right, the token chosen is the next one, and what is read after a wrong one is read again. None for other passes."""
        if not batch.uniform or len(token_N) != len(batch.works) * batch.uniform:
            return None
        draft_BC = batch.token_F[: len(token_N)].view(-1, batch.uniform)[:, 1:]
        right_B = (token_N.view(-1, batch.uniform)[:, :-1] == draft_BC).long().cumprod(1).sum(1)
        row_N = torch.arange(0, len(token_N), batch.uniform, device=self.device) + right_B
        next_F = F.pad(token_N.clamp(min=0), (0, len(batch.token_F) - len(token_N)))
        return self.passes.draft(self.model.mtp[0], batch, hidden_FD, next_F, row_N)

    def draft(
        self, batch: Batch, hidden_FD: Tensor, found: Sequence[Found], count: int, guesses: Sequence[int]
    ) -> None:
        """Guesses the next `count` tokens after each chosen one, from `first_draft`'s where there are `guesses`.

        MTP module k reads the pass's tokens together with those k + 1 positions ahead, so that its layer of the cache covers
        the same positions as the main model's; tokens not known yet are the drafts so far. After the last module, it drafts
        again one position further at a time, only for sequences that have drafts.
        """
        modules = list(self.model.mtp)[:count]
        going = [k for k, each in enumerate(found) if each.tokens]
        if guesses:
            for k in going:
                found[k].drafts.append(guesses[k])
            if count == 1:
                return
        row_N = self.numbers([batch.first[k] + kept(batch.works[k], found[k]) - 1 for k in going])
        for module in modules[1 if guesses else 0 :]:
            following = [further(work, each, module.depth + 1) for work, each in zip(batch.works, found, strict=True)]
            tokens = [token for each in following for token in each]
            tokens += [0] * (len(batch.token_F) - len(tokens))
            hidden_FD, guess_N = self.passes.draft(module, batch, hidden_FD, self.numbers(tokens), row_N)
            for k, token in zip(going, guess_N.tolist(), strict=True):
                found[k].drafts.append(token)
        if not going or count <= len(modules):
            return
        hidden_ND = hidden_FD[row_N]
        starts = [batch.works[k].start + kept(batch.works[k], found[k]) - 1 for k in going]
        for step in range(1, count - len(modules) + 1):
            single = [
                replace(batch.works[k], tokens=[found[k].drafts[-1]], start=start + step, choice=None)
                for k, start in zip(going, starts, strict=True)
            ]
            again = lay_out(single, self.model.config, self.device)
            padded = F.pad(hidden_ND, (0, 0, 0, len(again.token_F) - len(hidden_ND)))
            first_N = self.numbers(range(len(going)))
            out_FD, guess_N = self.passes.draft(modules[-1], again, padded, again.token_F, first_N)
            for k, token in zip(going, guess_N.tolist(), strict=True):
                found[k].drafts.append(token)
            hidden_ND = out_FD[: len(going)].clone()


def drafts_of(work: Work) -> list[int]:
    """The drafts among its tokens."""
    return [] if work.choice is None else work.tokens[len(work.tokens) - work.choice.drafts :]


def accept(found: Found, work: Work, tokens: Sequence[int]) -> None:
    """Accepts tokens as long as the draft before them was right; -1 is none."""
    for token, draft in zip(tokens, [*drafts_of(work), None], strict=True):
        if token < 0:
            found.failed = True
            return
        found.tokens.append(token)
        if token != draft:
            return


def kept(work: Work, found: Found) -> int:
    """How many of a work's tokens stay, rejected drafts excluded."""
    return len(work.tokens) if work.choice is None else len(work.tokens) - work.choice.drafts - 1 + len(found.tokens)


def further(work: Work, found: Found, distance: int) -> list[int]:
    """For each token of a work, the one `distance` positions ahead where it is known or guessed; else 0."""
    sure = kept(work, found)
    tokens = [*work.tokens[:sure], *(found.tokens[-1:] or work.following), *found.drafts]
    tokens = tokens[distance : distance + len(work.tokens)]
    return tokens + [0] * (len(work.tokens) - len(tokens))
