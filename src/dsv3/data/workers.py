"""Encoding in several processes: batches in, their ids out, in the order of the batches whatever the number of processes."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dsv3.data.encoding import DocumentEncoder, Encoding
from dsv3.data.files import Document
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import RunError

Batch = TypeVar("Batch", bound=Sequence[Document])
Ids = list[npt.NDArray[np.uint32]]

ALONE = 32 << 20
"""Characters encoded in this process before workers are started, which takes longer than encoding a small corpus."""


def cores() -> int:
    """How many processes this one may keep busy."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    batches: Iterable[Batch], tokenizer: Tokenizer, encoding: Encoding, workers: int
) -> Generator[tuple[Batch, Ids]]:
    """Each batch with the ids of its documents (see `DocumentEncoder.encode`), in order, by up to `workers` processes.

    Reads at most 2 batches a worker ahead. Raises `RunError` when a process dies.
    """
    batches = iter(batches)
    encoder = DocumentEncoder(tokenizer, encoding)
    size = 0
    while workers == 1 or size < ALONE:
        batch = next(batches, None)
        if batch is None:
            return
        size += sum(len(document.text) for document in batch)
        yield batch, encoder.encode(batch)
    with processes(tokenizer, encoding, workers) as submit:
        pending: deque[tuple[Batch, Future[Ids]]] = deque()
        for batch in batches:
            pending.append((batch, submit(batch)))
            if len(pending) > 2 * workers:
                done, ids = pending.popleft()
                yield done, ids.result()
        for done, ids in pending:
            yield done, ids.result()


@contextmanager
def processes(
    tokenizer: Tokenizer, encoding: Encoding, count: int
) -> Iterator[Callable[[Sequence[Document]], "Future[Ids]"]]:
    """Starts worker processes; yields a function that submits a batch to the next idle one. A thread here waits for each."""
    # Spawned, not forked: a fork beside the threads of tokenizers and torch may hang.
    context = multiprocessing.get_context("spawn")
    idle: SimpleQueue[Connection] = SimpleQueue()
    connections = []
    for _ in range(count):
        here, there = context.Pipe()
        context.Process(target=serve, args=(there, tokenizer.json, encoding), daemon=True).start()
        there.close()
        connections.append(here)
        idle.put(here)

    def encode(batch: Sequence[Document]) -> Ids:
        worker = idle.get()
        try:
            worker.send(batch)
            found: Ids = worker.recv()
        except (EOFError, OSError) as error:
            raise RunError(
                "a process that encodes documents has ended; what it said is above, and where it said nothing, the system "
                "may have killed it for its memory. Complete shards are kept: run again, with fewer workers"
            ) from error
        finally:
            idle.put(worker)
        return found

    threads = ThreadPoolExecutor(count)
    try:
        yield lambda batch: threads.submit(encode, batch)
    finally:
        threads.shutdown(cancel_futures=True)
        for connection in connections:
            connection.close()


def serve(connection: Connection, tokenizer_json: str, encoding: Encoding) -> None:
    """A worker: encodes batches until the connection is closed. Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread a process: there is a process for every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = DocumentEncoder(Tokenizer(tokenizer_json), encoding)
    try:
        while True:
            connection.send(encoder.encode(connection.recv()))
    except (EOFError, BrokenPipeError):
        return
