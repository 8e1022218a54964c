"""`builtin:needle`: documents that ask for something and get it far below, which teach a model to look far back.

A document is a tinypy task whose instruction is not followed at once: other tasks' functions stand before it, and between
it and the word that asks for the answer.

    def largest_cubes_odd(values):
        return max((x * x * x for x in values if x % 2 == 1), default=0)
    User: Return the sum of the squares of the even numbers in xs.
    def list_plus_all(data):
        return [v + 3 for v in data]
    Assistant:
    def sum_squares_even(xs):
        \"\"\"Return the sum of the squares of the even numbers in xs.\"\"\"
        return sum(n * n for n in xs if n % 2 == 0)

Whoever can write tinypy's functions can answer, given that the one instruction is found among the functions.
`dsv3.evaluation.needle` asks so for held-out combinations.
"""

import random
from collections.abc import Iterator
from itertools import count

from dsv3.data import tinypy
from dsv3.data.tinypy import Split, Task, pick

QUESTION = "Assistant:\n"
FUNCTIONS = (0, 1, 1, 2, 2, 3, 3, 4, 6, 8, 12, 20)
"""How many functions stand around an instruction, each as likely: 70 to 650 tokens of the quickstart's tokenizer. Most
documents are short: a model that looks two functions back learns from there to look four back, and not from zero."""
VALIDATION_DOCUMENTS = 256


def statement(task: Task) -> str:
    """The needle: a line that says what will be wanted."""
    return f"User: {task.instruction}\n"


def straw(task: Task) -> str:
    """What the needle is hidden among: a task's function without its docstring."""
    first, _, last = task.solution.splitlines(keepends=True)
    return first + last


def answer(task: Task) -> str:
    """What follows from the needle, token for token: name and docstring of the canonical solution.

    The line behind them has a variable whose name the instruction does not give.
    """
    return task.solution[: task.solution.rindex("    return ")]


def document(split: Split, seed: int, index: int) -> str:
    """Document number `index` (from 0) of a split's stream, a pure function of its arguments."""
    rng = random.Random(f"needle/{split}/{seed}/{index}")
    first = int(rng.random() * 10**6)
    task = tinypy.task(split, seed, first)
    functions = [straw(tinypy.task(split, seed, first + 1 + k)) for k in range(pick(rng, FUNCTIONS))]
    before = pick(rng, range(len(functions) + 1))
    return "".join([*functions[:before], statement(task), *functions[before:], QUESTION, task.solution])


def documents(split: Split, seed: int) -> Iterator[tuple[str, str]]:
    """(id, text) of a split's documents in order: endless for `train`, `VALIDATION_DOCUMENTS` for `validation`."""
    for index in count() if split == "train" else range(VALIDATION_DOCUMENTS):
        yield f"needle/{split}/{seed}/{index}", document(split, seed, index)
