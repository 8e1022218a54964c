"""Shard sets to batches. Everything is a function of the global row number: any rank and any resume point reads the same rows."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dsv3.data.mixture import interleave
from dsv3.data.packing import Packing, pack
from dsv3.data.token_shards import ShardSet
from dsv3.errors import UserError


@dataclass(frozen=True)
class Batch:
    """B rows of T + 1 tokens, of which a model reads the first T and predicts the last T."""

    tokens: torch.Tensor
    """int64 [B, T + 1]; `pad_id` after a row's last token."""
    valid: torch.Tensor
    """bool [B, T + 1]; False where there is only padding."""
    segment_ids: torch.Tensor
    """int64 [B, T + 1]; numbers the row's documents from 0, padding last. For a document mask, which the report does not use."""
    positions: torch.Tensor
    """int64 [B, T + 1], from 0 in each row, or with a document mask in each document (a later piece of one included)."""
    documents: list[list[tuple[str, int]]]
    """For each row the (source, document index) of what it holds."""


class Loader:
    """Packs each source (name, shards, weight) into rows of `row` tokens and mixes them.

    `row` is T + 1. A weight is the source's share of rows, and so of tokens, relative to the other weights: after any number
    of rows each source is within one row of it (`mixture.py`). Within a source, rows come in an order shuffled anew for
    each pass over it. With `document_mask`, positions start again in each document.

    The position in the data is the number of global rows before it, and nothing else. A data-parallel rank (`rank` of
    `ranks`) reads its slice of each batch; the number of ranks may change between any two batches.
    Raises `UserError` for a source without documents.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, ShardSet, float]],
        row: int,
        seed: int,
        pad_id: int,
        document_mask: bool = False,
        packing: Packing = "best_fit",
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        for name, shards, _ in sources:
            if not len(shards):
                raise UserError(f"source {name!r} holds no documents")
        self.names = [name for name, _, _ in sources]
        self.shards = [shards for _, shards, _ in sources]
        self.plans = [pack(shards.lengths, row, packing) for shards in self.shards]
        self.row, self.seed, self.pad_id, self.document_mask = row, seed, pad_id, document_mask
        self.rank, self.ranks = rank, ranks
        self._order, self._before = interleave([weight for _, _, weight in sources])
        self._shares = np.bincount(self._order, minlength=len(sources))
        self._shuffled: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, first_row: int, size: int) -> Batch:
        """This rank's slice of the global rows `first_row` to `first_row + size - 1`.

        The slices of all ranks, one after another, are these rows. A thread prefetches the next batch of the same size;
        what is returned does not depend on that.
        """
        asked = (first_row, size)
        ready = self._ahead[1] if self._ahead is not None and self._ahead[0] == asked else self._prepare(*asked)
        batch = ready.result()
        following = (first_row + size, size)
        self._ahead = (following, self._prepare(*following))
        return batch

    def _prepare(self, first_row: int, size: int) -> Future[Batch]:
        begin, end = (first_row + size * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return self._thread.submit(self.rows, begin, end - begin)

    def rows(self, first: int, count: int) -> Batch:
        """The global rows `first` to `first + count - 1`, whatever this rank's slice."""
        tokens = np.full((count, self.row), self.pad_id, dtype=np.int64)
        segments = np.zeros((count, self.row), dtype=np.int64)
        positions = np.tile(np.arange(self.row), (count, 1))
        valid = np.zeros((count, self.row), dtype=bool)
        documents = []
        for k in range(count):
            source, number = self.place(first + k)
            plan, shards = self.plans[source], self.shards[source]
            filled, held = 0, []
            for segment, piece in enumerate(range(plan.first[number], plan.first[number + 1])):
                document, start, length = int(plan.document[piece]), plan.start[piece], plan.length[piece]
                span = slice(filled, filled + length)
                tokens[k, span] = shards.document(document, int(start), int(length))
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
        cycle, step = divmod(row, len(self._order))
        source = int(self._order[step])
        drawn = cycle * int(self._shares[source]) + int(self._before[step])
        epoch, position = divmod(drawn, self.plans[source].rows)
        known, shuffled = self._shuffled.get(source, (-1, None))
        if known != epoch or shuffled is None:
            shuffle = np.random.Generator(np.random.PCG64([self.seed, source, epoch]))
            shuffled = shuffle.permutation(self.plans[source].rows)
            self._shuffled[source] = (epoch, shuffled)
        return source, int(shuffled[position])

    def describe(self, batch: Batch) -> list[str]:
        """The documents of a batch by name, `source:document`, for messages."""
        sets = dict(zip(self.names, self.shards, strict=True))
        named = {(source, index): None for row in batch.documents for source, index in row}
        return [f"{source}:{sets[source].name(index)}" for source, index in named]
