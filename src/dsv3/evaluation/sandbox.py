"""Runs functions that a model wrote, and says of each whether it passes its tests.

What holds the line is a whitelist over the syntax tree (`sandbox_worker.refusal`): no import, no attribute, no class,
no name that starts with two underscores, no builtin that opens, compiles, prints or looks up attributes. Files, the
network and other processes cannot be named from what is left. Resource limits stand behind it, in a process of its own
for each program: CPU seconds, memory, no byte written to files, no new descriptor (thus no file and no socket), no new
process; and a limit by the clock. These bound what a program uses up, but they are not a jail: a hole in the
interpreter itself would give a program the rights of the user who runs this, and root is not bound by the limit on
processes. macOS does not limit memory. Programs that need more of Python than the whitelist has want a jail of the
operating system instead.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import RunError
from dsv3.evaluation import sandbox_worker
from dsv3.evaluation.sandbox_worker import canonical

Tests = Sequence[tuple[Sequence[Any], object]]


@dataclass(frozen=True)
class Program:
    """Source that defines `function`, and (arguments, expected value) pairs, at least one. Arguments travel as JSON."""

    source: str
    function: str
    tests: Tests

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError(f"a program without tests would pass them all: {self.function}")


@dataclass(frozen=True)
class Verdict:
    """How a program did. `kind` is one of

    `"passed"`, `"wrong answer"`, `"timeout"`, `"syntax error"`, `"no function"`, `"refused: WHAT"` (such as `import` or
    `open`), `"exception: NAME"` (such as `MemoryError`), `"crash: SIGNAL"`: the first failure in the order of the
    tests, but for timeouts and crashes, which take a program's earlier answers with them. `detail` is the call that failed,
    where one did.
    """

    kind: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether every test gave the expected value."""
        return self.kind == "passed"


def run_tests(programs: Sequence[Program], timeout: int = 2, memory: int = 256 << 20) -> list[Verdict]:
    """One verdict per program, in order; a program that hangs or crashes fails alone.

    `timeout` is CPU seconds a program for all its tests, so that a busy machine gives the same verdicts; four times
    that and one second more by the clock end it too. `memory` is bytes of address space. A value passes if it equals
    the expected one and has its types throughout (`True` is not 1). Raises `RunError` when the worker itself dies.
    """
    requests = [
        json.dumps(
            {
                "source": program.source,
                "function": program.function,
                "arguments": [list(arguments) for arguments, _ in program.tests],
                "seconds": timeout,
                "bytes": memory,
            }
        )
        for program in programs
    ]
    # -I -S: neither the user's environment nor site-packages. The group is its own, so that nothing outlives this call.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-W", "ignore", str(Path(sandbox_worker.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
        text=True,
        encoding="utf-8",
    ) as worker:
        try:
            output, errors = worker.communicate("".join(f"{request}\n" for request in requests))
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
    replies = [json.loads(line) for line in output.splitlines()]
    if worker.returncode != 0 or len(replies) != len(programs):
        last = errors.strip().splitlines()[-1:] or ["it said nothing"]
        raise RunError(
            f"the sandbox ended after {len(replies)} of {len(programs)} programs with status {worker.returncode} "
            f"({last[0]}); expected it to answer for each: is the machine out of memory or processes?"
        )
    return [judge(program, reply["end"], reply["answers"]) for program, reply in zip(programs, replies, strict=True)]


def judge(program: Program, end: str, answers: Sequence[str]) -> Verdict:
    """The verdict on a program that ended so and answered its first calls so. A missing answer is a failure."""
    for (arguments, expected), answer in zip(program.tests, answers, strict=False):
        if answer != canonical(expected):
            return Verdict("wrong answer", call(program, arguments))
    if end != "done":
        return Verdict(end, call(program, program.tests[len(answers)][0]) if end.startswith("exception") else "")
    return Verdict("passed") if len(answers) == len(program.tests) else Verdict("crash: no answer")


def call(program: Program, arguments: Sequence[Any]) -> str:
    """A test's call as Python would write it."""
    return f"{program.function}({', '.join(map(repr, arguments))})"
