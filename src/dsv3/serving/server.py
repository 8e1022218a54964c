"""Serves an app on a port until a signal stops it."""

import uvicorn
from fastapi import FastAPI

from dsv3.serving.settings import MAX_HEADER_BYTES

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections, so that none sends a request on one that is being closed."""


def run(app: FastAPI, host: str, port: int, drain_seconds: int) -> None:
    """Serves until SIGTERM or SIGINT; then accepts no connections, and open requests have `drain_seconds` to finish."""
    # h11 limits the size of headers; httptools does not.
    uvicorn.run(
        app, host=host, port=port, http="h11", h11_max_incomplete_event_size=MAX_HEADER_BYTES, ws="none",
        log_level="warning", server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip


def local_hosts(host: str) -> tuple[str, ...] | None:
    """The `Host` names to accept for a server bound to `host`: local names for a local one, else any (None)."""
    return LOOPBACK if host in ("127.0.0.1", "localhost", "::1") else None
