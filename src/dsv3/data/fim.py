"""Fill-in-the-middle: some documents are rearranged so that the model learns to write what is missing.

Prefix-suffix-middle at the level of the document, before packing (report, section 4.1):
`<｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle <eos>`.
"""

import re
from collections.abc import Sequence
from random import Random
from typing import Literal, NamedTuple

from dsv3.data.tokenizer import Tokenizer

FimUnit = Literal["character", "line"]


class Parts(NamedTuple):
    """A document cut in three; `prefix + middle + suffix` is the document."""

    prefix: str
    middle: str
    suffix: str


def fim_document(text: str, rng: Random, rate: float, unit: FimUnit = "character") -> Parts | None:
    """Chooses a document with probability `rate` (the report: 0.1) and cuts it; None leaves it as it is.

    The report does not say where documents are cut. Here both cuts are uniform over the positions between characters or
    lines (behind each `\n`), the ends included, so any part may be empty. The parts are encoded one by one: no token
    straddles a cut.
    """
    if rng.random() >= rate:
        return None
    places = range(len(text) + 1) if unit == "character" else line_ends(text)
    # random() alone is the same in every Python version.
    first, second = sorted(places[int(rng.random() * len(places))] for _ in range(2))
    return Parts(text[:first], text[first:second], text[second:])


def line_ends(text: str) -> Sequence[int]:
    """Where lines begin and end, ascending, each once."""
    return sorted({0, *(found.end() for found in re.finditer("\n", text)), len(text)})


def fim_prompt(prefix: Sequence[int], suffix: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The prompt that a model completes with the missing middle, from the ids before and after it; no bos."""
    return [tokenizer.fim_begin_id, *prefix, tokenizer.fim_hole_id, *suffix, tokenizer.fim_end_id]


def gap_prompt(prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """The same from texts, with the bos that documents begin with."""
    return [tokenizer.bos_id, *fim_prompt(tokenizer.encode(prefix), tokenizer.encode(suffix), tokenizer)]
