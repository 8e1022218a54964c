"""The engine's thread: one thread steps the engine, and the event loop hears of it through queues.

The engine belongs to the thread. What the loop wants of it (add, abort) is a command in a queue, and what it yields comes
back by `call_soon_threadsafe`. When the thread ends other than by `stop`, every open request is told.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from dsv3.errors import UserError
from dsv3.inference.engine import Delta, Engine, EngineStats
from dsv3.inference.params import SamplingParams
from dsv3.serving.errors import Lost, Overloaded, Unavailable


@dataclass(frozen=True)
class Job:
    """One prompt and how to continue it; `salt` separates tenants' cached prefixes."""

    prompt: list[int]
    params: SamplingParams
    salt: str = ""
    return_routing: bool = False


class Worker:
    """Runs `engine` in a thread of its own. `capacity`: sequences that may be open. `on_step` hears of every step, on the loop."""

    def __init__(
        self, engine: Engine, capacity: int, on_step: Callable[[EngineStats, EngineStats], None] | None = None
    ):
        self.engine, self.capacity, self.on_step = engine, capacity, on_step
        self.stats = engine.stats()
        """As of the last step."""
        self.open_sequences = 0
        self.rejected = 0
        self.alive = False
        self._streams: dict[str, Stream] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; the running loop is the one that is told."""
        self._loop, self.alive = asyncio.get_running_loop(), True
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step that it is in."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def open(self, request_id: str, sequences: int) -> "Stream":
        """A place for a request of so many sequences; use it as a context manager, which gives the place back.

        Raises `UserError` for more sequences than there are places, `Overloaded` when they are taken, `Unavailable` when
        the engine has ended.
        """
        if not self.alive:
            raise Unavailable("the engine has ended: this server has to be started again")
        if sequences > self.capacity:
            raise UserError(
                f"{sequences} continuations in one request: this server holds {self.capacity} at a time in all"
            )
        if self.open_sequences + sequences > self.capacity:
            self.rejected += 1
            raise Overloaded(f"{self.open_sequences} continuations are under way, which is all that fits: try again")
        self.open_sequences += sequences
        return Stream(self, request_id, sequences)

    def _run(self) -> None:
        try:
            while True:
                try:
                    while (command := self._commands.get(block=not self.engine.has_work)) is not None:
                        command()
                    return
                except queue.Empty:
                    self._tell(self._deliver, self.engine.step(), self.engine.stats())
        finally:
            self._tell(self._end)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(what, *arguments)

    def _deliver(self, deltas: Sequence[Delta], stats: EngineStats) -> None:
        before, self.stats = self.stats, stats
        for delta in deltas:
            if (stream := self._streams.get(delta.request_id)) is not None:
                stream.put(delta)
        if self.on_step is not None:
            self.on_step(before, stats)

    def _end(self) -> None:
        self.alive = False
        for stream in self._streams.values():
            stream.fail(Lost("the engine ended before the answer was complete"))


class Stream:
    """What the engine yields for the prompts of one HTTP request."""

    def __init__(self, worker: Worker, request_id: str, sequences: int):
        self.request_id, self._worker, self._left, self._sequences = request_id, worker, sequences, sequences
        self.began = time.perf_counter()
        self._ids: dict[str, int] = {}
        """Prompts by the engine's name for them."""
        self._deltas: list[tuple[int, Delta]] = []
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._accepted: asyncio.Future[None] | None = None
        self._handed_over = False

    def __enter__(self) -> Self:
        return self

    def hand_over(self) -> Self:
        """Leaves the place to another `with`: the one under way does not give it back."""
        self._handed_over = True
        return self

    def __exit__(self, *_: object) -> None:
        """Aborts what is not finished."""
        if self._handed_over:
            self._handed_over = False
            return
        worker = self._worker
        worker.open_sequences -= self._sequences
        for name in self._ids:
            del worker._streams[name]
        if self._left and self._ids:
            worker._commands.put(lambda: self._abort(self._ids))

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Hands all prompts to the engine; raises what it refuses one with, and then none is begun."""
        self._ids = {f"{self.request_id}-{number}": number for number in range(len(jobs))}
        self._worker._streams.update(dict.fromkeys(self._ids, self))
        if not self._worker.alive:
            raise Unavailable("the engine has ended: this server has to be started again")
        accepted: asyncio.Future[None] = self._worker._loop.create_future()
        self._worker._commands.put(lambda: self._add(jobs, accepted))
        self._accepted = accepted
        await accepted

    async def next(self) -> list[tuple[int, Delta]]:
        """All that came since the last call, as (number of the prompt, delta), at least one; [] at the end.

        Raises `Lost` when nothing more will come.
        """
        if not self._deltas and self._left == 0:
            return []
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error
        deltas, self._deltas = self._deltas, []
        return deltas

    def put(self, delta: Delta) -> None:
        """Adds what one step yielded."""
        self._deltas.append((self._ids[delta.request_id], delta))
        self._left -= delta.finish_reason is not None
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._error = error
        self._news.set()
        if self._accepted is not None:
            settle(self._accepted, error)

    def _add(self, jobs: Sequence[Job], accepted: "asyncio.Future[None]") -> None:
        """In the engine's thread."""
        added: list[str] = []
        try:
            for name, job in zip(self._ids, jobs, strict=True):
                self._worker.engine.add(name, job.prompt, job.params, salt=job.salt, return_routing=job.return_routing)
                added.append(name)
        except UserError as error:
            self._abort(added)
            self._worker._tell(settle, accepted, error)
        else:
            self._worker._tell(settle, accepted, None)

    def _abort(self, names: Sequence[str] | dict[str, int]) -> None:
        """In the engine's thread."""
        for name in names:
            self._worker.engine.abort(name)


def settle(future: "asyncio.Future[None]", error: Exception | None) -> None:
    """Ends a wait, unless whoever waited has gone."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
