"""Servers on this machine's loopback, vLLM's from its own environment and ours: started, asked, and always stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import RunError, UserError

START_SECONDS = 600.0
STOP_SECONDS = 30.0
ANSWER_SECONDS = 300.0
TOP = 5
"""Most likely tokens whose logprobs are asked for, at every step."""
MODEL = "dsv3"

SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
LEFT_OUT = ("PYTHONPATH", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Of our environment: each server decides itself how its threads wait."""
ATTENTION = "CPU_MLA"
"""By name: where the processor has AMX, vLLM would take AMX_MLA, which refuses FP32, for the model and for its drafts."""
OPTIONS = ("--dtype", "float32", "--attention-backend", ATTENTION, "--max-num-seqs", "16", "--served-model-name", MODEL)
DRAFTS = {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": ATTENTION}

# A proxy that the environment names is not for the loopback.
loopback = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Reply:
    """vLLM's continuation of one prompt."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    """At every step those of the `TOP` most likely tokens, by token id."""


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, seconds: float = START_SECONDS) -> Iterator[str]:
    """Runs a server that answers `/health` on `port` when it is ready; gives its address, and ends it with all its children.

    What it prints goes to `log`. Raises `RunError` when it ends, or is not ready after so many seconds.
    """
    url = f"http://127.0.0.1:{port}"
    environment = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    with log.open("wb") as stream:
        # A session of its own, so that one signal reaches the engine's processes too.
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**environment, **SETTINGS}, start_new_session=True
        )
        try:
            wait_until_ready(process, url, log, seconds)
            yield url
        finally:
            stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    """Returns when `/health` answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"the server ended with code {process.returncode} before it was ready: {why(log)}")
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            loopback.open(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise RunError(f"the server was not ready after {seconds:g} seconds; see {log}")


def why(log: Path) -> str:
    """The first error in the server's output, which later ones follow from, and where to read on."""
    lines = log.read_text(errors="replace").splitlines()
    raised = (line for line in lines if re.search(r"\w(Error|Exception): ", line) and "WARNING" not in line)
    first = next(raised, lines[-1] if lines else "")
    return f"{first.strip()!r}; all of it is in {log}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the process group to end, and ends it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def check_vllm(environment: Path) -> None:
    """`UserError` where vLLM is not there."""
    if not (environment / "bin" / "vllm").is_file():
        raise UserError(f"{environment} has no vLLM: run `make interop`, which installs it there")


def run(main: Callable[[], None], name: str) -> None:
    """A program that starts servers: SIGTERM is an end like any other, so that they are stopped, and its errors are one line."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except (UserError, RunError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


@contextmanager
def vllm(
    environment: Path, export: Path, length: int, log: Path, *, speculate: bool = False, compiled: bool = False
) -> Iterator[str]:
    """`vllm serve` of a Hugging Face directory, for sequences of up to `length` tokens, with or without MTP's drafts, its operations
    compiled by torch.compile or called one by one."""
    port = free_port()
    where = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(length)]
    program = [str(environment / "bin" / "vllm"), "serve", str(export)]
    more = ["--speculative-config", json.dumps(DRAFTS)] if speculate else []
    more += [] if compiled else ["--enforce-eager"]
    with serving([*program, *OPTIONS, *where, *more], port, log) as url:
        yield url


@contextmanager
def dsv3(export: Path, length: int, log: Path) -> Iterator[str]:
    """`dsv3 serve` of the same, in FP32 too."""
    port = free_port()
    where = ["--port", str(port), "--max-model-len", str(length), "--name", MODEL]
    program = [sys.executable, "-m", "dsv3", "serve", str(export), "--device", "cpu", "--dtype", "fp32"]
    with serving([*program, *where], port, log) as url:
        yield url


def complete(url: str, prompts: Sequence[Sequence[int]], count: int) -> list[Reply]:
    """`count` greedy tokens after each prompt, asked for in one request to the completions endpoint."""
    asked = {
        "model": MODEL, "prompt": prompts, "max_tokens": count, "temperature": 0, "logprobs": TOP, "ignore_eos": True,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    answer = ask(f"{url}/v1/completions", asked)
    return [read_reply(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


def read_reply(choice: Mapping[str, Any]) -> Reply:
    """One choice of the answer; with `return_tokens_as_token_ids`, tokens are named `token_id:17`."""
    steps = choice["logprobs"]["top_logprobs"]
    return Reply(
        choice["token_ids"],
        [{int(name.removeprefix("token_id:")): value for name, value in step.items()} for step in steps],
    )


def ask(url: str, content: Mapping[str, Any] | None = None) -> Any:
    """The JSON that a GET, or with `content` a POST, brings."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with loopback.open(request, timeout=ANSWER_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RunError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:1000]}") from None


def draft_counts(url: str) -> tuple[int, int]:
    """(drafted, accepted) tokens so far, from the server's metrics; zeros where it does not speculate."""
    with loopback.open(f"{url}/metrics", timeout=ANSWER_SECONDS) as response:
        text = response.read().decode()
    drafted, accepted = (
        sum(int(float(value)) for value in re.findall(rf"^vllm:spec_decode_num_{name}_total{{.*}} (\S+)$", text, re.M))
        for name in ("draft_tokens", "accepted_tokens")
    )
    return drafted, accepted
