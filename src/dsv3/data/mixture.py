"""Which source each row comes from: after any number of rows, every source is within one row of its share.

Each source's m-th row has a window: it comes neither before the source's share reaches m - 1 rows nor after it reaches m.
Going by the earliest end of a window always works (Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress").
The order repeats once the weights come out even, so any row is found without going through those before it.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

LONGEST_CYCLE = 100_000
"""The most rows before the order repeats."""


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportion of the weights, read as the decimals they are written as.

    Where their sum would pass `LONGEST_CYCLE` they are rounded to that sum, at least 1 each, those furthest from their
    exact share first.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(each.denominator for each in exact))
    whole = [int(each * scale) for each in exact]
    divisor = reduce(gcd, whole)
    if sum(whole) <= LONGEST_CYCLE * divisor:
        return [each // divisor for each in whole]
    wanted = [each * LONGEST_CYCLE / sum(exact) for each in exact]
    rounded = [max(int(each), 1) for each in wanted]
    while (missing := LONGEST_CYCLE - sum(rounded)) != 0:
        step = 1 if missing > 0 else -1
        movable = [i for i, share in enumerate(rounded) if share + step >= 1]
        furthest = heapq.nlargest(abs(missing), movable, key=lambda i: step * (wanted[i] - rounded[i]))
        for i in furthest:
            rounded[i] += step
    return rounded


def interleave(weights: Sequence[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """One cycle: the source of each row, and how many rows of the same source came before it; both int64 [cycle]."""
    shares = whole_shares(weights)
    cycle = sum(shares)
    order, before = np.empty((2, cycle), dtype=np.int64)
    drawn = [0] * len(shares)
    begins, ends = np.zeros(len(shares), dtype=np.int64), np.array([-(-cycle // share) for share in shares])
    for row in range(cycle):
        source = int(np.where(begins <= row, ends, cycle + 1).argmin())
        order[row], before[row] = source, drawn[source]
        drawn[source] = count = drawn[source] + 1
        begins[source], ends[source] = count * cycle // shares[source], -(-(count + 1) * cycle // shares[source])
    return order, before
