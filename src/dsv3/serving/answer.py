"""The way of an answer to its client: whole, or as server-sent events. When the client leaves, the engine is told.

A `Reply` turns what the engine yields into OpenAI's JSON; `Answer` sends it.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv3.errors import RunError
from dsv3.inference.engine import Delta
from dsv3.serving.errors import Lost, body_of, encode
from dsv3.serving.metrics import Meter
from dsv3.serving.protocol import Sampling
from dsv3.serving.settings import Settings
from dsv3.serving.worker import Stream

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Choices(Protocol):
    """One endpoint's form of the choices."""

    kinds: tuple[str, str]
    """`object` of a whole answer and of a chunk."""

    def opening(self) -> list[Json]:
        """Choices of the first chunks."""

    def take(self, number: int, delta: Delta) -> Json:
        """The choice of a chunk, from a delta of the prompt with that number; what it says is kept for `whole`."""

    def whole(self) -> list[Json]:
        """The choices of a whole answer."""


class Usage:
    """Tokens counted while they come."""

    def __init__(self, prompts: list[list[int]]):
        self._prompt = sum(map(len, prompts))
        self._cached: dict[int, int] = {}
        """Of each prompt, when its first continuation began: the others find all that this one has read."""
        self._generated = self._reasoning = 0

    def take(self, number: int, delta: Delta, reasoning: bool = False) -> None:
        """Counts a delta."""
        if delta.index == 0:
            self._cached[number] = delta.num_cached_tokens
        self._generated += len(delta.token_ids)
        self._reasoning += len(delta.token_ids) if reasoning else 0

    def content(self) -> Json:
        """OpenAI's fields and DeepSeek's."""
        cached = sum(self._cached.values())
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._generated,
            "total_tokens": self._prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": self._reasoning},
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": self._prompt - cached,
        }


class Answer(Response):
    """Sends what `stream` yields, and gives its place back when this is over."""

    def __init__(
        self, stream: Stream, choices: Choices, usage: Usage, meter: Meter, request: Sampling, settings: Settings
    ):
        self._stream, self._choices, self._usage, self._meter = stream, choices, usage, meter
        self._request, self._settings = request, settings
        self._fixed = {"id": stream.request_id, "created": int(time.time()), "model": settings.name}
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI asks; ends early when the client has gone."""
        with self._stream:
            tasks = [
                asyncio.ensure_future(self._events(send) if self._request.stream else self._all(send)),
                asyncio.ensure_future(until_disconnect(receive)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    async def _all(self, send: Send) -> None:
        status = 200
        try:
            while deltas := await self._stream.next():
                for number, delta in deltas:
                    self._take(number, delta)
            content = self._fixed | {
                "object": self._choices.kinds[0],
                "choices": self._choices.whole(),
                "usage": self._usage.content(),
            }
        except RunError as error:
            status, content = body_of(error)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send(send, encode(content), more=False)

    async def _events(self, send: Send) -> None:
        options = self._request.stream_options
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            await self._send(send, b"".join(self._event([choice]) for choice in self._choices.opening()))
            while True:
                try:
                    async with asyncio.timeout(self._settings.keep_alive_seconds):
                        deltas = await self._stream.next()
                except TimeoutError:
                    await self._send(send, KEEP_ALIVE)
                    continue
                if not deltas:
                    break
                await self._send(send, b"".join(self._event([self._take(*each)]) for each in deltas))
            last = self._event([], {"usage": self._usage.content()}) if options and options.include_usage else b""
            await self._send(send, last + DONE, more=False)
        except RunError as error:
            await self._send(send, b"data: " + encode(body_of(error)[1]) + b"\n\n", more=False)

    def _take(self, number: int, delta: Delta) -> Json:
        if delta.finish_reason == "abort":
            raise Lost(f"the engine gave this request up: {delta.stop_reason}")
        self._meter.observe(number, delta)
        return self._choices.take(number, delta)

    def _event(self, choices: list[Json], extra: Mapping[str, Any] = {}) -> bytes:
        options = self._request.stream_options
        content = self._fixed | {"object": self._choices.kinds[1], "choices": choices}
        if options is not None and options.continuous_usage_stats:
            content["usage"] = self._usage.content()
        elif options is not None and options.include_usage:
            content["usage"] = None
        return b"data: " + encode(content | dict(extra)) + b"\n\n"

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        """Raises `TimeoutError` for a client that does not read."""
        async with asyncio.timeout(self._settings.send_seconds):
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
