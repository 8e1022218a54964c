"""Which rank keeps the others waiting: every rank notes its instruction in the job's store, and the first warns when one hangs.

Notes go through the rendezvous store (TCP, at the first node), not through the operations that may hang.
"""

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from dsv3.parallel.mesh import Mesh

log = logging.getLogger(__name__)
EVERY = 1.0
"""Seconds between notes."""


@contextmanager
def watching(mesh: Mesh, timeout: timedelta, store: dist.Store) -> Iterator[None]:
    """Within it a thread of each rank notes its instruction. The first rank warns when it has been at one for half the timeout,
    and names every rank's. So does one of those that `torchrun` ends because another has ended.

    Signals reach the thread through a socket: the main thread may be in an operation that does not return.
    """
    written, read = socket.socketpair()
    written.setblocking(False)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(
        target=watch, args=(mesh, timeout.total_seconds() / 2, store, read), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        written.close()
        thread.join()
        read.close()


def watch(mesh: Mesh, limit: float, store: dist.Store, signals: socket.socket) -> None:
    """The thread's loop, until the socket is closed or the job ends."""
    warned = False
    while True:
        ready, _, _ = select.select([signals], [], [], min(EVERY, limit / 2))
        arrived = signals.recv(64) if ready else None
        if arrived == b"":
            return
        try:
            if arrived is not None and signal.SIGTERM in arrived:
                if speaks(store):
                    log.error("dsv3: the job ends, because a rank has ended. %s", whereabouts(store, mesh.world.size))
                os._exit(128 + signal.SIGTERM)
            seconds = time.monotonic() - mesh.activity.since
            note(mesh, store)
            if mesh.first and not warned and seconds > limit:
                warned = True
                log.warning("no progress for %.0f s. %s", seconds, whereabouts(store, mesh.world.size))
        except RuntimeError:
            return  # the store is gone, and the job with it


def note(mesh: Mesh, store: dist.Store) -> None:
    """Tells the others this rank's instruction."""
    store.set(f"at/{mesh.world.rank}", mesh.activity.instruction)


def speaks(store: dist.Store) -> bool:
    """Whether this rank is the first with a message at the end of a job: one is enough."""
    try:
        return store.add("said", 1) == 1
    except RuntimeError:
        return True  # nobody is left to ask


def whereabouts(store: dist.Store, ranks: int) -> str:
    """Every rank's instruction, as of the last second at which it could note it; ranks at the same one together."""
    at: dict[str, list[str]] = {}
    for rank in range(ranks):
        instruction = store.get(f"at/{rank}").decode() if store.check([f"at/{rank}"]) else "unknown"
        at.setdefault(instruction, []).append(str(rank))
    return "; ".join(f"rank{'s' * (len(who) > 1)} {', '.join(who)}: {what}" for what, who in at.items())
