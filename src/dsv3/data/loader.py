"""Shard sets to batches. Everything is a function of the global row number: any rank and any resume point reads the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dsv3.data.packing import pack
from dsv3.data.shards import ShardSet
from dsv3.errors import UserError

CYCLE = 1000
"""Rows after which the order of the sources repeats: weights are kept to a thousandth."""
IGNORED = -100
"""The target of a position that has none."""


@dataclass(frozen=True)
class Batch:
    """B rows of T + 1 tokens, of which a model reads the first T and predicts the last T."""

    tokens: torch.Tensor
    """int64 [B, T + 1]; `pad_id` after a row's last token."""
    valid: torch.Tensor
    """bool [B, T + 1]; False where there is only padding."""
    segment_ids: torch.Tensor
    """int64 [B, T + 1]; counts the row's documents from 0, padding last. Attention may be masked by it; the report does not."""
    positions: torch.Tensor
    """int64 [B, T + 1], from 0 in each row, or with a document mask in each document (a later piece of one included)."""
    documents: list[list[tuple[str, int]]]
    """For each row the (source, document index) of what it holds."""

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [B, T]: what the model reads."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """int64 [B, T]: the token after each input, -100 where that is padding."""
        return self.tokens[:, 1:].masked_fill(~self.valid[:, 1:], IGNORED)


class Loader:
    """Packs each source (name, shards, weight) into rows of `row` tokens and mixes them.

    `row` is T + 1. A weight is the source's share of rows, relative to the other weights. Row by row the source furthest
    behind its share comes next; within a source, rows come in an order shuffled anew for each pass over it.
    With `document_mask`, positions start again in each document.
    Raises `UserError` for a source without documents, a weight that is not above 0, or a row below 2 tokens.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, ShardSet, float]],
        row: int,
        seed: int,
        pad_id: int,
        document_mask: bool = False,
    ) -> None:
        if row < 2:
            raise UserError(f"row = {row}: expected at least 2 tokens, one to read and one to predict")
        if not 0 < len(sources) <= CYCLE:
            raise UserError(f"the loader was given {len(sources)} sources; expected 1 to {CYCLE}")
        for name, shards, weight in sources:
            if not weight > 0:
                raise UserError(f"the weight of source {name!r} is {weight}: expected a number above 0")
            if not len(shards):
                raise UserError(f"source {name!r} holds no documents")
        self.names = [name for name, _, _ in sources]
        self.shards = [shards for _, shards, _ in sources]
        self.plans = [pack(shards.lengths, row) for shards in self.shards]
        self.row, self.seed, self.pad_id, self.document_mask = row, seed, pad_id, document_mask
        self._order, self._before = interleave([weight for _, _, weight in sources])
        self._shuffled: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def batch(self, first_row: int, size: int) -> Batch:
        """The global rows `first_row` to `first_row + size - 1`."""
        tokens = np.full((size, self.row), self.pad_id, dtype=np.int64)
        segments = np.zeros((size, self.row), dtype=np.int64)
        positions = np.tile(np.arange(self.row), (size, 1))
        valid = np.zeros((size, self.row), dtype=bool)
        documents = []
        for k in range(size):
            source, number = self.place(first_row + k)
            plan, shards = self.plans[source], self.shards[source]
            filled, held = 0, []
            for segment, piece in enumerate(range(plan.first[number], plan.first[number + 1])):
                document, start, length = int(plan.document[piece]), plan.start[piece], plan.length[piece]
                span = slice(filled, filled + length)
                tokens[k, span] = shards.document(document)[start : start + length]
                segments[k, span] = segment
                if self.document_mask:
                    positions[k, span] = np.arange(length)
                filled += length
                held.append((self.names[source], document))
            valid[k, :filled] = True
            segments[k, filled:] = len(held)
            documents.append(held)
        return Batch(
            tokens=torch.from_numpy(tokens),
            valid=torch.from_numpy(valid),
            segment_ids=torch.from_numpy(segments),
            positions=torch.from_numpy(positions),
            documents=documents,
        )

    def place(self, row: int) -> tuple[int, int]:
        """Where a global row comes from: (index of the source, row of its plan)."""
        cycle, step = divmod(row, CYCLE)
        source = int(self._order[step])
        drawn = cycle * int(self._before[-1, source]) + int(self._before[step, source])
        epoch, position = divmod(drawn, self.plans[source].rows)
        if self._shuffled.get(source, (-1,))[0] != epoch:
            shuffle = np.random.Generator(np.random.PCG64([self.seed, source, epoch]))
            self._shuffled[source] = (epoch, shuffle.permutation(self.plans[source].rows))
        return source, int(self._shuffled[source][1][position])

    def epochs(self, first_row: int) -> dict[str, float]:
        """Passes over each source that lie before a global row."""
        cycle, step = divmod(first_row, CYCLE)
        drawn = cycle * self._before[-1] + self._before[step]
        return {name: float(n / plan.rows) for name, n, plan in zip(self.names, drawn, self.plans, strict=True)}

    def describe(self, batch: Batch) -> list[str]:
        """The documents of a batch by name, `source:document`, for messages."""
        sets = dict(zip(self.names, self.shards, strict=True))
        named = {(source, index): None for row in batch.documents for source, index in row}
        return [f"{source}:{sets[source].name(index)}" for source, index in named]


def interleave(weights: Sequence[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The source of each row of a cycle, [CYCLE], and how many rows of each came before it, [CYCLE + 1, sources].

    Shares are rounded to whole rows of the cycle, at least one each; every next row goes to the source furthest
    behind its share.
    """
    exact = np.array(weights) / sum(weights) * CYCLE
    shares = np.maximum(np.floor(exact), 1)
    while shares.sum() != CYCLE:
        behind = exact - shares
        if shares.sum() < CYCLE:
            shares[np.argmax(behind)] += 1
        else:
            shares[np.argmax(np.where(shares > 1, -behind, -np.inf))] -= 1
    before = np.zeros((CYCLE + 1, len(weights)), dtype=np.int64)
    order = np.zeros(CYCLE, dtype=np.int64)
    for step in range(CYCLE):
        order[step] = np.argmax(shares * (step + 1) / CYCLE - before[step])
        before[step + 1] = before[step]
        before[step + 1, order[step]] += 1
    return order, before
