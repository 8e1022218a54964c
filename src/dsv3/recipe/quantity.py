"""Counts as people write them: `"14.3T"`, `"2K"`, `"469B"`. Suffixes are powers of ten and the result is an exact int.

Lengths (of a sequence, of a micro-batch) are a different thing: they are written out, because 4K would be read
as 4096 by one person and as 4000 by the next.
"""

import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, Field

POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)")


def parse_quantity(value: object) -> int:
    """The int that `value` (an int, or text such as `"1.9M"`) stands for; `ValueError` for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = WRITTEN.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected a whole number, or text such as '2K', '1.9M', '469B' or '14.3T' (powers of ten)")
    exact = Decimal(match[1]).scaleb(POWERS[match[2]])
    if exact != exact.to_integral_value():
        raise ValueError(f"expected a whole number, and {value} is {exact}")
    return int(exact)


def format_quantity(value: int) -> str:
    """The shortest exact text for a count: 14_300_000_000_000 is `"14.3T"`, 1234 is `"1234"`."""
    for suffix in "TBMK":
        digits = Decimal(value).scaleb(-POWERS[suffix]).normalize()
        if digits >= 1 and len(text := f"{digits:f}{suffix}") <= 5:
            return text
    return str(value)


def parse_length(value: object) -> int:
    """`value` if it is an int; `ValueError` otherwise, with a word on suffixes where one was written."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    written = " (a length takes no suffix, because 4K could be 4000 or 4096)" if isinstance(value, str) else ""
    raise ValueError(f"expected a whole number written out, such as 4096{written}")


Quantity = Annotated[int, BeforeValidator(parse_quantity), Field(gt=0)]
"""A count above 0: of tokens, steps or bytes."""

Length = Annotated[int, BeforeValidator(parse_length), Field(gt=0)]
"""A length above 0, written out."""
