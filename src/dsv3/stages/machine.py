"""Where, with what and by which command something ran: what goes beside the figures of every run and every measurement."""

import os
import platform
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dsv3 import __version__
from dsv3.training.device import device_name


def machine(device: torch.device) -> dict[str, str]:
    """The computer, and the device that computed."""
    return {
        "processor": processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True), "device": device_name(device),
    }  # fmt: skip


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of dsv3, Python and the libraries that are installed."""
    found = {"dsv3": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def command() -> str:
    """What the user typed."""
    return shlex.join(["dsv3", *sys.argv[1:]])
