"""`builtin:needle`: documents that state codes and ask for them further down, which teach a model to look far back.

A document is a number of tinypy documents of the same split with lines between them such as

    # the code of amber is 7391

Each of its codes is stated once, anywhere, and asked for once, at the end: the asking line is the stating one again, so
that all it takes is to find the name and to copy what followed it. Codes are drawn anew for each document. `dsv3.evaluation.needle` asks for one code in a haystack of the validation split.
"""

import random
from collections.abc import Iterator

from dsv3.data import tinypy
from dsv3.data.tinypy import Split, pick

NAMES = (
    "alpha", "amber", "arrow", "basil", "birch", "cedar", "cobalt", "copper", "coral", "delta", "ember", "falcon", "garnet",
    "hazel", "indigo", "ivory", "jasper", "lemon", "maple", "marble", "nickel", "olive", "onyx", "pearl", "quartz", "raven",
    "saffron", "silver", "topaz", "velvet", "willow", "zinc",
)  # fmt: skip
DIGITS = 4
LONGEST = 16
"""Most tinypy documents in one document: about 1,150 tokens of the quickstart's tokenizer."""
MOST_NAMES = 4
VALIDATION_DOCUMENTS = 256


def question(name: str) -> str:
    """What asks for a code. It ends with the space before the digits, where the pre-tokenizer always cuts."""
    return f"# the code of {name} is "


def draw_code(rng: random.Random) -> str:
    """Four digits."""
    return "".join(pick(rng, "0123456789") for _ in range(DIGITS))


def document(split: Split, seed: int, index: int) -> str:
    """Document number `index` (from 0) of a split's stream, a pure function of its arguments."""
    rng = random.Random(f"needle/{split}/{seed}/{index}")
    names = list(NAMES)
    codes = {
        names.pop(int(rng.random() * len(names))): draw_code(rng) for _ in range(pick(rng, range(1, MOST_NAMES + 1)))
    }
    first = int(rng.random() * 10**6)
    haystack = [tinypy.document(tinypy.task(split, seed, first + k)) for k in range(pick(rng, range(LONGEST + 1)))]
    stated_before = {name: pick(rng, range(len(haystack) + 1)) for name in codes}
    lines = {name: question(name) + code + "\n" for name, code in codes.items()}
    parts = []
    for number in range(len(haystack) + 1):
        parts += [lines[name] for name, before in stated_before.items() if before == number]
        parts += haystack[number : number + 1]
    # Names were drawn in random order, and where they are stated is drawn apart: the order of the questions says nothing.
    return "".join([*parts, *lines.values()])


def documents(split: Split, seed: int) -> Iterator[tuple[str, str]]:
    """(id, text) of a split's documents in order: endless for `train`, `VALIDATION_DOCUMENTS` for `validation`."""
    index = 0
    while split != "validation" or index < VALIDATION_DOCUMENTS:
        yield f"needle/{split}/{seed}/{index}", document(split, seed, index)
        index += 1
