import os
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.files import SkipReport
from dsv3.data.loader import Loader
from dsv3.data.token_shard_writer import ShardWriter
from dsv3.data.token_shards import ShardSet
from dsv3.errors import RunError, UserError
from dsv3.model.micro_batch import targets
from dsv3.ops.cross_entropy import IGNORE

PAD, ROW = 2, 17


def shard_set(directory, base: int, lengths: list[int]) -> ShardSet:
    """Documents whose tokens are all different: base, base + 1, ..."""
    writer = ShardWriter(directory, vocab_size=65536, tokenizer_hash="hash", shard_bytes=100, origin={})
    for number, length in enumerate(lengths):
        writer.add(f"{number}.txt", range(base, base + length), length)
        base += length
    writer.finish(SkipReport())
    return ShardSet.open(directory)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    random = np.random.default_rng(0)
    code = shard_set(tmp_path_factory.mktemp("code"), 100, random.integers(1, 60, 50).tolist())
    prose = shard_set(tmp_path_factory.mktemp("prose"), 20_000, random.integers(1, 20, 40).tolist())
    return [("code", code, 0.7), ("prose", prose, 0.3)]


def tensors(batch):
    return (batch.tokens, batch.valid, batch.segment_ids, batch.positions)


def test_rows_do_not_depend_on_how_they_are_asked_for(sources):
    whole = Loader(sources, ROW, 0, PAD).batch(40, 60)
    loader = Loader(sources, ROW, 0, PAD)
    # Backwards, by one and by three rows: other batches, other ranks, another start.
    parts = [loader.batch(97, 3)] + [loader.batch(row, 1) for row in range(96, 39, -1)]
    for name in ("tokens", "valid", "segment_ids", "positions"):
        joined = torch.cat([getattr(part, name) for part in [*parts[:0:-1], parts[0]]])
        assert torch.equal(joined, getattr(whole, name))
    assert [row for part in [*parts[:0:-1], parts[0]] for row in part.documents] == whole.documents


def test_in_order_every_row_but_the_last_is_full(sources):
    shards = sources[0][1]
    batch = Loader([sources[0]], ROW, 0, PAD, packing="in_order").batch(0, -(-shards.lengths.sum() // ROW))
    assert (~batch.valid).sum() == -shards.lengths.sum() % ROW
    assert sorted(batch.tokens[batch.valid].tolist()) == list(range(100, 100 + shards.lengths.sum()))


def test_each_epoch_holds_every_token_of_a_source_once(sources):
    _, shards, _ = sources[0]
    loader = Loader([sources[0]], ROW, 0, PAD)
    rows = loader.plans[0].rows
    orders = []
    for epoch in range(3):
        batch = loader.batch(epoch * rows, rows)
        tokens = batch.tokens[batch.valid]
        assert sorted(tokens.tolist()) == list(range(100, 100 + int(shards.lengths.sum())))
        assert {index for row in batch.documents for _, index in row} == set(range(len(shards)))
        orders.append(tokens.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_rows_hold_their_documents_tokens(sources):
    batch = Loader(sources, ROW, 3, PAD, document_mask=True).batch(0, 50)
    sets = {name: shards for name, shards, _ in sources}
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (50, ROW)
    for k, held in enumerate(batch.documents):
        for segment, (name, index) in enumerate(held):
            chosen = (batch.segment_ids[k] == segment) & batch.valid[k]
            piece, document = batch.tokens[k][chosen].tolist(), sets[name].document(index).tolist()
            start = document.index(piece[0])
            assert document[start : start + len(piece)] == piece
            assert start % ROW == 0
            assert batch.positions[k][chosen].tolist() == list(range(len(piece)))
        padding = ~batch.valid[k]
        assert (batch.tokens[k][padding] == PAD).all()
        assert (batch.segment_ids[k][padding] == len(held)).all()
        assert batch.valid[k].tolist() == sorted(batch.valid[k].tolist(), reverse=True)


def test_positions_run_through_the_row_without_a_document_mask(sources):
    plain, masked = (Loader(sources, ROW, 3, PAD, document_mask=mask).batch(0, 20) for mask in (False, True))
    assert torch.equal(plain.positions, torch.arange(ROW).expand(20, -1))
    assert torch.equal(plain.tokens, masked.tokens)
    assert torch.equal(plain.segment_ids, masked.segment_ids)


def test_targets_are_the_next_tokens_and_never_padding(sources):
    batch = Loader(sources, ROW, 3, PAD).batch(0, 50)
    assert not batch.valid.all()
    found = targets(batch.tokens, 1, batch.valid, None)
    for k in range(50):
        for t in range(ROW - 1):
            expected = batch.tokens[k, t + 1] if batch.valid[k, t + 1] else IGNORE
            assert found[k, t] == expected


def test_the_seed_decides_the_order(sources):
    first, again, other = (Loader(sources, ROW, seed, PAD).batch(0, 30) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    assert not torch.equal(first.tokens, other.tokens)


def test_sources_come_in_the_proportion_of_their_weights(sources):
    loader = Loader(sources, ROW, 0, PAD)
    drawn = Counter(row[0][0] for row in loader.batch(0, 100).documents)
    assert drawn == {"code": 70, "prose": 30}


class Steps:
    """Batches of a training that changes its ranks and batch size as it goes, each rank with a loader of its own."""

    def __init__(self, sources):
        self.sources, self.loaders, self.row = sources, [], 0

    def restart(self, ranks):
        self.loaders = [Loader(self.sources, ROW, 5, PAD, rank=rank, ranks=ranks) for rank in range(ranks)]

    def step(self, size):
        parts = [loader.batch(self.row, size) for loader in self.loaders]
        self.row += size
        return parts


@settings(max_examples=15, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 8]), st.lists(st.integers(1, 12), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    )
)
def test_changing_the_ranks_continues_the_same_rows_none_twice_none_lost(sources, runs):
    training, parts = Steps(sources), []
    for ranks, sizes in runs:
        training.restart(ranks)
        for size in sizes:
            step = training.step(size)
            assert max(len(part.tokens) for part in step) - min(len(part.tokens) for part in step) <= 1
            parts += step
    whole = Loader(sources, ROW, 5, PAD).rows(0, training.row)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert [row for part in parts for row in part.documents] == whole.documents


def test_the_next_batch_is_prepared_while_this_one_is_used(sources, monkeypatch):
    loader = Loader(sources, ROW, 5, PAD)
    made, threads = [], set()
    rows = loader.rows

    def watched(first, count):
        threads.add(threading.current_thread())
        batch = rows(first, count)
        made.append((first, count))
        return batch

    monkeypatch.setattr(loader, "rows", watched)
    loader.batch(0, 4)
    while len(made) < 2:
        time.sleep(0.001)
    assert made == [(0, 4), (4, 4)]
    assert threading.current_thread() not in threads
    # Another batch than the one that was prepared is made on the spot, and is right.
    assert torch.equal(loader.batch(4, 6).tokens, rows(4, 6).tokens)
    assert torch.equal(loader.batch(10, 6).tokens, rows(10, 6).tokens)


def test_what_goes_wrong_in_the_thread_is_raised_to_whoever_asks(sources, tmp_path):
    shards = shard_set(tmp_path, 100, [30] * 20)
    loader = Loader([("gone", shards, 1.0)], ROW, 0, PAD)
    os.truncate(tmp_path / "tokens-00003.bin", 10)
    with pytest.raises(RunError, match=r"tokens-00003.bin ended early.*build the shards again"):
        [loader.batch(step, 1) for step in range(40)]


def test_messages_name_the_documents(sources):
    loader = Loader(sources, ROW, 0, PAD)
    batch = loader.batch(5, 2)
    assert loader.describe(batch) == list(
        dict.fromkeys(f"{name}:{index}.txt" for row in batch.documents for name, index in row)
    )


def test_a_source_without_documents_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, vocab_size=300, tokenizer_hash="hash", origin={})
    writer.finish(SkipReport())
    with pytest.raises(UserError, match="source 'none' holds no documents"):
        Loader([("none", ShardSet.open(tmp_path), 1)], ROW, 0, PAD)
