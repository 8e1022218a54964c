"""Encoding in several processes: batches in, their ids out, in the order of the batches whatever the number of processes."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dsv3.data.encoding import DocumentEncoder, Encoding
from dsv3.data.files import Document
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import RunError

T = TypeVar("T")
Ids = list[npt.NDArray[np.uint32]]

ALONE = 32 << 20
"""Characters that are encoded before other processes are started, which takes longer than most small corpora."""


def cores() -> int:
    """How many processes this one may keep busy."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    batches: Iterable[T],
    documents: Callable[[T], Sequence[Document]],
    tokenizer: Tokenizer,
    encoding: Encoding,
    workers: int,
) -> Generator[tuple[T, Ids]]:
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
        size += sum(len(document.text) for document in documents(batch))
        yield batch, encoder.encode(documents(batch))
    with Workers(tokenizer, encoding, workers) as pool:
        pending: deque[tuple[T, Future[Ids]]] = deque()
        for batch in batches:
            pending.append((batch, pool.submit(documents(batch))))
            if len(pending) > 2 * workers:
                done, ids = pending.popleft()
                yield done, ids.result()
        for done, ids in pending:
            yield done, ids.result()


class Workers:
    """Processes that encode. One thread here for each of them hands it a batch and waits for what comes back."""

    def __init__(self, tokenizer: Tokenizer, encoding: Encoding, count: int) -> None:
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._ends: list[Connection] = []
        self._threads = ThreadPoolExecutor(count)
        # Spawned, not forked: a fork beside the threads of tokenizers and torch may hang.
        context = multiprocessing.get_context("spawn")
        for _ in range(count):
            here, there = context.Pipe()
            context.Process(target=serve, args=(there, tokenizer.json, encoding), daemon=True).start()
            there.close()
            self._ends.append(here)
            self._idle.put(here)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for end in self._ends:
            end.close()

    def submit(self, batch: Sequence[Document]) -> "Future[Ids]":
        """Has a batch encoded by the next process that is free."""
        return self._threads.submit(self._encode, batch)

    def _encode(self, batch: Sequence[Document]) -> Ids:
        worker = self._idle.get()
        try:
            worker.send(batch)
            found: Ids = worker.recv()
        except (EOFError, OSError) as error:
            raise RunError(
                "a process that encodes documents has ended; what it said is above, and where it said nothing, the system "
                "may have killed it for its memory. Complete shards are kept: run again, with fewer workers"
            ) from error
        finally:
            self._idle.put(worker)
        return found


def serve(connection: Connection, tokenizer_json: str, encoding: Encoding) -> None:
    """A worker: encodes what comes until nobody is left to send. Ctrl-C is for the process that reads and writes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread a process: there is a process for every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = DocumentEncoder(Tokenizer(tokenizer_json), encoding)
    try:
        while True:
            connection.send(encoder.encode(connection.recv()))
    except (EOFError, BrokenPipeError):
        return
