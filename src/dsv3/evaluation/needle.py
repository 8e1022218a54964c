"""Needle in a haystack: is an instruction that was given once, somewhere in a long text, known at its end?

One trial is a text of exactly so many tokens: functions of tinypy's held-out split, one instruction (see
`dsv3.data.needle`) at a given depth among them, and at the end the word that asks for the answer, and the answer. A trial
is passed when greedy decoding would write the answer exactly. That is so if and only if the most likely token at each place
of the answer is the right one, given the right ones before it, so one forward pass decides it and nothing is generated.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch

from dsv3.data import tinypy
from dsv3.data.needle import QUESTION, answer, statement, straw
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.mode import evaluating
from dsv3.model.transformer import DeepSeekV3

TOKENS_A_PASS = 1 << 14
"""Trials of one length are read together up to so many tokens."""


@dataclass(frozen=True)
class Trial:
    """`ids` is the whole text, `bos` and answer included, and its last `answer` tokens are what has to be known."""

    ids: list[int]
    answer: int


@dataclass(frozen=True)
class Haystack:
    """How many of `samples` trials passed, `[length][depth]`. A depth is a share of the text before the needle, 0 to 1."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    passed: tuple[tuple[int, ...], ...]


@torch.inference_mode()
def needle(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Haystack:
    """`samples` trials of every length (in tokens) and depth; the same at each call with the same seed.

    `progress(done, total)` counts lengths. Raises `UserError` for a length that does not hold needle, question and answer.
    """
    rows = []
    with evaluating(model) as device:
        for done, length in enumerate(lengths):
            progress(done, len(lengths))
            trials = [
                trial(tokenizer, length, depth, f"{seed}/{length}/{depth}/{k}")
                for depth in depths
                for k in range(samples)
            ]
            passed = known(model, trials, device)
            rows.append(tuple(sum(passed[k : k + samples]) for k in range(0, len(passed), samples)))
    progress(len(lengths), len(lengths))
    return Haystack(tuple(lengths), tuple(depths), samples, tuple(rows))


def trial(tokenizer: Tokenizer, length: int, depth: float, seed: str) -> Trial:
    """One text of `length` tokens, a pure function of its arguments."""
    first = int(random.Random(f"needle/{seed}").random() * tinypy.VALIDATION_DOCUMENTS)

    def task(number: int) -> tinypy.Task:
        return tinypy.task("validation", 0, (first + number) % tinypy.VALIDATION_DOCUMENTS)

    wanted = task(0)
    needle, asked, told = (tokenizer.encode(text) for text in (statement(wanted), QUESTION, answer(wanted)))
    room = length - 1 - len(needle) - len(asked) - len(told)
    if room < 0:
        raise UserError(
            f"a needle in {length} tokens: expected at least {length - room} for the needle, the question and the answer"
        )
    # A function of the same combination would be half an answer.
    others = (task(number) for number in count(1))
    straws = (straw(other) for other in others if other.combination != wanted.combination)
    functions: list[list[int]] = []
    held = 0
    while held < room:
        functions.append(tokenizer.encode(next(straws)))
        held += len(functions[-1])
    # What is too much is cut off at the beginning, so that the question follows a whole function.
    while held > room:
        cut = min(held - room, len(functions[0]))
        functions[0], held = functions[0][cut:], held - cut
        functions = [function for function in functions if function]
    # The needle stands between two functions, at the border nearest to its depth.
    borders = [sum(map(len, functions[:k])) for k in range(len(functions) + 1)]
    at = min(range(len(borders)), key=lambda k: abs(borders[k] - depth * room))
    before, after = (list(chain.from_iterable(part)) for part in (functions[:at], functions[at:]))
    return Trial([tokenizer.bos_id, *before, *needle, *after, *asked, *told], len(told))


def known(model: DeepSeekV3, trials: Sequence[Trial], device: torch.device) -> list[bool]:
    """Whether the model would answer each of the trials, which are equally long."""
    found: list[bool] = []
    together = max(TOKENS_A_PASS // len(trials[0].ids), 1)
    for ids in torch.tensor([trial.ids for trial in trials]).to(device).split(together):
        hidden = model(ids).hidden
        for row, trial in enumerate(trials[len(found) : len(found) + len(ids)]):
            chosen = model.head(hidden[row, -trial.answer - 1 : -1]).argmax(-1)
            found.append(bool((chosen == ids[row, -trial.answer :]).all()))
    return found
