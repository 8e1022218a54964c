"""Runs the engine in a thread of its own, which is the only one to touch it.

The event loop sends commands (add, abort) through a queue; results wait in another until the loop takes them, a while after the
last ones when many streams are open: each piece that is sent costs the engine its interpreter. When the thread ends other than by
`stop`, every open request fails.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

from dsv3.errors import UserError
from dsv3.inference.engine import Delta, Engine, EngineStats
from dsv3.inference.params import SamplingParams
from dsv3.serving.errors import Lost, Overloaded, Unavailable
from dsv3.serving.metrics import Metrics

DELIVERY_SECONDS = 2.5e-4
"""Between two deliveries, times the open prompts: 32 ms for 128, in which small models make several tokens, and large ones none."""


class Worker:
    """Runs `engine` in a thread of its own. `capacity`: sequences that may be open."""

    def __init__(self, engine: Engine, capacity: int, metrics: Metrics):
        self.engine, self.capacity, self.metrics = engine, capacity, metrics
        self.open_sequences = 0
        self.alive = False
        self._streams: dict[str, Stream] = {}
        self._results: deque[tuple[list[Delta], EngineStats]] = deque()
        self._delivering, self._delivered = False, 0.0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; results go to the running event loop."""
        self._loop, self.alive = asyncio.get_running_loop(), True
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its present step."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def check_alive(self) -> None:
        """Raises `Unavailable` when the engine has ended."""
        if not self.alive:
            raise Unavailable("the engine has ended: this server has to be started again")

    @contextmanager
    def open(self, request_id: str, sequences: int) -> "Iterator[Stream]":
        """Reserves places for a request's sequences; at the end frees them, and aborts what has not finished.

        Raises `UserError` for more sequences than there are places, `Overloaded` when too few are free, `Unavailable` when
        the engine has ended.
        """
        self.check_alive()
        if sequences > self.capacity:
            raise UserError(
                f"{sequences} continuations in one request: this server holds {self.capacity} at a time in all"
            )
        if self.open_sequences + sequences > self.capacity:
            self.metrics.rejected.inc()
            raise Overloaded(f"{self.open_sequences} continuations are under way, which is all that fits: try again")
        self.open_sequences += sequences
        stream = Stream(request_id, sequences)
        try:
            yield stream
        finally:
            self.open_sequences -= sequences
            for name in stream.ids:
                del self._streams[name]
            if stream.left and stream.ids:
                self._commands.put(lambda: self._abort(stream.ids))

    async def submit(
        self, stream: "Stream", prompts: Sequence[list[int]], params: SamplingParams, salt: str, return_routing: bool
    ) -> None:
        """Adds all prompts of a request to the engine, or none: raises its `UserError` for one that it refuses.

        `salt` separates tenants' cached prefixes.
        """

        def add() -> None:
            if not stream.accepted.set_running_or_notify_cancel():
                return
            try:
                for name, prompt in zip(stream.ids, prompts, strict=True):
                    self.engine.add(name, prompt, params, salt=salt, return_routing=return_routing)
            except UserError as error:
                self._abort(stream.ids)
                stream.accepted.set_exception(error)
            else:
                stream.accepted.set_result(None)

        stream.ids = {f"{stream.request_id}-{number}": number for number in range(len(prompts))}
        self._streams.update(dict.fromkeys(stream.ids, stream))
        self.check_alive()
        self._commands.put(add)
        await asyncio.wrap_future(stream.accepted)

    def _abort(self, names: Iterable[str]) -> None:
        for name in names:
            self.engine.abort(name)
        # There may be no step after the last request.
        self._publish([])

    def _run(self) -> None:
        try:
            while True:
                try:
                    while (command := self._commands.get(block=not self.engine.has_work)) is not None:
                        command()
                    return
                except queue.Empty:
                    self._publish(self.engine.step())
        finally:
            self._tell(self._end)

    def _publish(self, deltas: list[Delta]) -> None:
        self._results.append((deltas, self.engine.stats()))
        if not self._delivering:
            self._delivering = True
            self._tell(self._deliver_soon)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(what, *arguments)

    def _deliver_soon(self) -> None:
        self._loop.call_at(self._delivered + DELIVERY_SECONDS * len(self._streams), self._deliver)

    def _deliver(self) -> None:
        # Before results are taken: those that come later ask for another delivery.
        self._delivering, self._delivered = False, self._loop.time()
        while self._results:
            deltas, stats = self._results.popleft()
            for delta in deltas:
                if (stream := self._streams.get(delta.request_id)) is not None:
                    stream.put(delta)
            self.metrics.step(stats)

    def _end(self) -> None:
        self.alive = False
        self._deliver()
        for stream in self._streams.values():
            stream.fail(Lost("the engine ended before the answer was complete"))


class Stream:
    """The engine's deltas for the prompts of one HTTP request."""

    def __init__(self, request_id: str, sequences: int):
        self.request_id, self.left = request_id, sequences
        self.began = time.perf_counter()
        self.ids: dict[str, int] = {}
        """From the engine's request ids to the numbers of the prompts."""
        self.accepted: Future[None] = Future()
        self._deltas: dict[tuple[int, int], Delta] = {}
        self._news = asyncio.Event()
        self._error: Exception | None = None

    async def next(self) -> list[tuple[int, Delta]]:
        """Waits for news and returns it, one delta a continuation, as (number of the prompt, delta); [] at the end. Raises `Lost` if
        the engine ended."""
        if not self._deltas and self.left == 0:
            return []
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error
        deltas, self._deltas = self._deltas, {}
        return [(number, delta) for (number, _), delta in deltas.items()]

    def put(self, delta: Delta) -> None:
        """Adds one delta."""
        key = (self.ids[delta.request_id], delta.index)
        earlier = self._deltas.get(key)
        self._deltas[key] = delta if earlier is None else joined(earlier, delta)
        self.left -= delta.finish_reason is not None
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error."""
        self._error = error
        self._news.set()
        if not self.accepted.done():
            self.accepted.set_exception(error)


def joined(first: Delta, second: Delta) -> Delta:
    """Two deltas of one continuation as one."""
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=None if second.logprobs is None else [*(first.logprobs or []), *second.logprobs],
        routing=None if second.routing is None else [*(first.routing or []), *second.routing],
        prompt_logprobs=first.prompt_logprobs,
    )
