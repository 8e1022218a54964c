"""Packing: documents into rows of equal length.

By best fit as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling", which the report follows (section 4.1): only
documents longer than a row are cut, and the pieces are then packed best-fit-decreasing. Or in order: documents are
concatenated and cut where a row ends.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

Packing = Literal["best_fit", "in_order"]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackPlan:
    """Which piece of which document lies in which row. All arrays int64.

    Pieces are sorted by row, and within a row by document; row r holds the pieces `first[r]` to `first[r + 1]`.
    """

    document: Ints
    """[pieces] index of the piece's document."""
    start: Ints
    """[pieces] first token within the document."""
    length: Ints
    """[pieces] tokens."""
    first: Ints
    """[rows + 1] the row's first piece."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.first) - 1


def pack(lengths: npt.ArrayLike, row: int, packing: Packing = "best_fit") -> PackPlan:
    """Packs documents of the given lengths (tokens, int [documents]) into rows of `row` tokens.

    Every token lies in exactly one row. `best_fit` cuts a longer document every `row` tokens and places pieces from the
    longest to the shortest, each into the fullest row with room for it; its time grows with the number of pieces plus the
    number of different lengths. `in_order` leaves padding in the last row only.
    """
    documents = np.asarray(lengths, dtype=np.int64)
    if packing == "in_order":
        document, start, length, where = in_order(documents, row)
    else:
        document, start, length = cut(documents, row)
        where = best_fit_decreasing(length, row)
    order = np.argsort(where, kind="stable")
    rows = int(where.max()) + 1 if len(where) else 0
    first = np.searchsorted(where[order], np.arange(rows + 1))
    return PackPlan(document[order], start[order], length[order], first.astype(np.int64))


def cut(lengths: Ints, row: int) -> tuple[Ints, Ints, Ints]:
    """Documents to pieces of at most `row` tokens: (document, start, length), each [pieces], in document order."""
    counts = -(-lengths // row)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * row
    return document, start, np.minimum(lengths[document] - start, row)


def in_order(lengths: Ints, row: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Documents one after the other: (document, start, length, row) of each piece, each [pieces]."""
    ends = np.cumsum(lengths)
    starts, total = ends - lengths, int(lengths.sum())
    borders = np.union1d(starts[lengths > 0], np.arange(0, total, row))
    document = np.searchsorted(ends, borders, side="right")
    return document, borders - starts[document], np.diff(borders, append=total), borders // row


def best_fit_decreasing(length: Ints, row: int) -> Ints:
    """The row of each piece, [pieces].

    Rows with the same room left are interchangeable and lie in one bucket, and pieces of the same length are placed together:
    a row that takes one of them stays the best fit until it has no room for another, so each row taken from a bucket takes
    as many as fit. A bit mask finds the next bucket that holds rows.
    """
    where = np.empty(len(length), dtype=np.int64)
    by_length = np.argsort(-length, kind="stable")
    buckets: list[list[Ints]] = [[] for _ in range(row + 1)]
    occupied = 0
    rows = 0

    def put(room: int, members: Ints) -> None:
        nonlocal occupied
        if len(members) and room:
            buckets[room].append(members)
            occupied |= 1 << room

    sizes, firsts = np.unique(-length[by_length], return_index=True)
    ends = pairwise([*firsts.tolist(), len(length)])
    for size, (begin, end) in zip((-sizes).tolist(), ends, strict=True):
        pieces = by_length[begin:end]
        while len(pieces):
            candidates = occupied >> size
            if candidates:
                room = size + (candidates & -candidates).bit_length() - 1
                members = buckets[room].pop()
                if not buckets[room]:
                    occupied ^= 1 << room
            else:
                room = row
                needed = -(-len(pieces) // (row // size))
                members = np.arange(rows, rows + needed)
                rows += needed
            each = room // size
            full = min(len(pieces) // each, len(members))
            where[pieces[: full * each]] = np.repeat(members[:full], each)
            put(room - each * size, members[:full])
            pieces, members = pieces[full * each :], members[full:]
            if len(pieces) and len(members):
                where[pieces] = members[0]
                put(room - len(pieces) * size, members[:1])
                pieces, members = pieces[:0], members[1:]
            put(room, members)
    return where
