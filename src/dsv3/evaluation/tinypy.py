"""pass@1 on `builtin:tinypy`: how many functions that a model writes for combinations it never saw pass their tests?"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dsv3.data import tinypy
from dsv3.data.tinypy import Task
from dsv3.errors import RunError
from dsv3.evaluation.sandbox import Program, Verdict, run_tests

DEFINITION = re.compile(r"def (\w+)\(")


@dataclass(frozen=True)
class Example:
    """One task, the function cut from the model's completion, and the verdict on it."""

    task: Task
    source: str
    verdict: Verdict


def pass_at_1(generate: Callable[[list[str]], list[str]], n_tasks: int, seed: int = 0) -> list[Example]:
    """Asks for one completion a task of the held-out combinations, and runs it.

    `generate` turns prompts into completions (the text after the prompt, end-of-document token removed), in order. Any
    function name passes. Raises `RunError` when completions are missing.
    """
    asked = tinypy.tasks("validation", seed, n_tasks)
    completions = generate([tinypy.prompt(task) for task in asked])
    if len(completions) != len(asked):
        raise RunError(f"{len(asked)} prompts gave {len(completions)} completions; expected one each")
    sources = [cut(completion) for completion in completions]
    verdicts = run_tests([program(task, source) for task, source in zip(asked, sources, strict=True)])
    return list(map(Example, asked, sources, verdicts))


def cut(completion: str) -> str:
    """The function at the start of a completion: its first line, and the lines up to the next one that is not indented.

    Blank lines do not end it.
    """
    lines = completion.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if i > 0 and line.strip() and line[0] not in " \t"), len(lines))
    return "".join(lines[:end])


def program(task: Task, source: str) -> Program:
    """A task's tests on the function that `source` starts with, whatever its name."""
    definition = DEFINITION.match(source)
    return Program(source, definition[1] if definition else task.function_name, task.tests)
