"""An app on a port, until it is told to stop."""

import sys

import uvicorn
from fastapi import FastAPI

from dsv3.serving.settings import MAX_HEADER_BYTES

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SWITCH_SECONDS = 1e-4
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection, so that none sends a request into one that is being closed."""


def run(app: FastAPI, host: str, port: int, drain_seconds: int) -> None:
    """Serves until SIGTERM or SIGINT; then no connection is taken, and what is open may end within `drain_seconds`."""
    # The engine's thread gives way to the loop after this time: by default it is 5 ms, for each piece that is sent.
    sys.setswitchinterval(SWITCH_SECONDS)
    # h11 bounds what it holds of a request's headers; httptools does not.
    uvicorn.run(
        app, host=host, port=port, http="h11", h11_max_incomplete_event_size=MAX_HEADER_BYTES, ws="none",
        log_level="warning", server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip


def local_hosts(host: str) -> tuple[str, ...] | None:
    """The names by which a server bound to `host` is asked for: a local one by local names, another by any."""
    return LOOPBACK if host in ("127.0.0.1", "localhost", "::1") else None
