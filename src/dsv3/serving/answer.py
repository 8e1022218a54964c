"""Sends an answer to its client: whole, or as server-sent events. When the client disconnects, the request is aborted."""

import asyncio
import time
from contextlib import AbstractContextManager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv3.errors import RunError
from dsv3.inference.engine import Delta
from dsv3.serving.choices import Choices, Json
from dsv3.serving.errors import Lost, body_of, encode
from dsv3.serving.metrics import Meter
from dsv3.serving.protocol import StreamOptions
from dsv3.serving.settings import Settings
from dsv3.serving.worker import Stream

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Answer(Response):
    """Sends what `stream` yields in the form of `choices`, and closes its `place` at the end."""

    def __init__(
        self, place: AbstractContextManager[Any], stream: Stream, choices: Choices, meter: Meter, settings: Settings
    ):
        self._place, self._stream, self._choices, self._meter = place, stream, choices, meter
        self._settings, self._options = settings, choices.request.stream_options or StreamOptions()
        self._fixed = {"id": stream.request_id, "created": int(time.time()), "model": settings.name}
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call; ends early when the client disconnects."""
        with self._place:
            tasks = [
                asyncio.ensure_future(self._events(send) if self._choices.request.stream else self._all(send)),
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
                "usage": self._choices.usage(),
            }
        except RunError as error:
            status, content = body_of(error)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send(send, encode(content), more=False)

    async def _events(self, send: Send) -> None:
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
            last = self._event([], counted=True) if self._options.include_usage else b""
            await self._send(send, last + DONE, more=False)
        except RunError as error:
            await self._send(send, b"data: " + encode(body_of(error)[1]) + b"\n\n", more=False)

    def _take(self, number: int, delta: Delta) -> Json:
        if delta.finish_reason == "abort":
            raise Lost(f"the engine gave this request up: {delta.stop_reason}")
        self._meter.observe(number, delta)
        return self._choices.take(number, delta)

    def _event(self, choices: list[Json], counted: bool = False) -> bytes:
        content = self._fixed | {"object": self._choices.kinds[1], "choices": choices}
        if counted or self._options.continuous_usage_stats:
            content["usage"] = self._choices.usage()
        elif self._options.include_usage:
            content["usage"] = None
        return b"data: " + encode(content) + b"\n\n"

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        """Raises `TimeoutError` when the client does not read."""
        async with asyncio.timeout(self._settings.send_seconds):
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
