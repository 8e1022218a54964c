"""Checks before any route: the API key, the host name and the size of the body."""

import asyncio
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3.serving.errors import ApiError, response_of
from dsv3.serving.settings import Settings

OPEN = ("/health", "/")
"""Routes that need no key: they reveal nothing."""


class Guard:
    """ASGI middleware. Passes a request on with its whole body read, and its tenant in `scope["tenant"]`."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 400 for a foreign host, 401 without a key, 408 for a slow body, 413 for a long one."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        try:
            headers = Headers(scope=scope)
            self._check_host(headers.get("host", ""))
            scope["tenant"] = "" if scope["path"] in OPEN else self._tenant(headers.get("authorization", ""))
            async with asyncio.timeout(self.settings.body_seconds):
                body = await self._body(headers, receive)
        except TimeoutError:
            error = ApiError(f"the body did not arrive within {self.settings.body_seconds:g} seconds", 408)
            return await response_of(error)(scope, receive, send)
        except ApiError as error:
            return await response_of(error)(scope, receive, send)
        return await self.app(scope, replay(body, receive), send)

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.settings.hosts is not None and name not in self.settings.hosts:
            raise ApiError(f"this server answers for the hosts {', '.join(self.settings.hosts)}")

    def _tenant(self, authorization: str) -> str:
        """The digest of the given key; it is compared with every known key, in constant time."""
        if not self._keys:
            return ""
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        known = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                "expected the header `Authorization: Bearer KEY` with this server's key", 401, "invalid_api_key"
            )
        return digest.hex()

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        declared = headers.get("content-length", "")
        too_long = declared.isdecimal() and (len(declared) > 18 or int(declared) > limit)
        size, parts, more = 0, list[bytes](), not too_long
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message["type"] == "http.request" and message.get("more_body", False) and size <= limit
        if too_long or size > limit:
            raise ApiError(f"the body is longer than {limit} bytes", 413)
        return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """Returns the body first, and then what else is received: the disconnect."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
