"""`builtin:tinypy`: small function-writing tasks, made from a seed, whose answers can be executed.

A task is one choice from each of three tables: an aggregate of a transform of the numbers that pass a filter. 8 x 8 x 8
makes 512 combinations; with constants, eight phrasings, six argument names and five loop names there are 1,693,440
distinct training documents and 241,920 validation ones. Validation consists of the 64 combinations whose three table
positions sum to a multiple of 8. That is a Latin square: every two choices meet in training (with seven of the eight
third choices), no validation triple ever does. A document is

    User: Write a function that returns the sum of the squares of the even numbers in xs.
    Assistant:
    def sum_squares_even(xs):
        \"\"\"Return the sum of the squares of the even numbers in xs.\"\"\"
        return sum(n * n for n in xs if n % 2 == 0)

Each combination has one canonical solution. Its function is named after the three choices, never after a builtin: a
function called `max` would call itself. The instruction does not give that name, so a model's own choice is as good.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from dsv3.errors import UserError, nearest

Split = Literal["train", "validation"]
T = TypeVar("T")


class Combination(NamedTuple):
    """What a task asks for, as keys of `AGGREGATES`, `TRANSFORMS` and `FILTERS`."""

    aggregate: str
    transform: str
    filter: str


class Choice(NamedTuple):
    """One entry of a table: words for the instruction, code for the solution, and a function that states the same anew.

    `apply` takes the numbers of an aggregate; one number and the constant `c` of a transform or filter, which has
    `constants` where it needs one.
    """

    phrase: str
    code: str
    apply: Callable[..., Any]
    constants: Sequence[int] = ()


AGGREGATES = {
    "sum": Choice("the sum of {items}", "sum({value} {loop})", sum),
    "largest": Choice(
        "the largest of {items}, or 0 if there are none",
        "max(({value} {loop}), default=0)",
        lambda values: max(values, default=0),
    ),
    "smallest": Choice(
        "the smallest of {items}, or 0 if there are none",
        "min(({value} {loop}), default=0)",
        lambda values: min(values, default=0),
    ),
    "first": Choice(
        "the first of {items}, or 0 if there are none",
        "next(({value} {loop}), 0)",
        lambda values: values[0] if values else 0,
    ),
    "list": Choice("the list of {items}", "[{value} {loop}]", list),
    "set": Choice("the set of {items}", "{{{value} {loop}}}", set),
    "ascending": Choice("the sorted list of {items}", "sorted({value} {loop})", sorted),
    "descending": Choice(
        "the list, largest first, of {items}",
        "sorted(({value} {loop}), reverse=True)",
        lambda values: sorted(values)[::-1],
    ),
}
TRANSFORMS = {
    "numbers": Choice("{items}", "{n}", lambda n, c: n),
    "squares": Choice("the squares of {items}", "{n} * {n}", lambda n, c: n**2),
    "cubes": Choice("the cubes of {items}", "{n} * {n} * {n}", lambda n, c: n**3),
    "opposites": Choice("the opposites of {items}", "-{n}", lambda n, c: 0 - n),
    "plus": Choice("{items}, each plus {c}", "{n} + {c}", lambda n, c: n + c, range(2, 10)),
    "minus": Choice("{items}, each minus {c}", "{n} - {c}", lambda n, c: n - c, range(2, 10)),
    "times": Choice("{items}, each times {c}", "{n} * {c}", lambda n, c: n * c, range(2, 10)),
    "quotients": Choice(
        "{items}, each divided by {c} and rounded down",
        "{n} // {c}",
        lambda n, c: (n - n % c) // c,
        range(2, 10),
    ),
}
FILTERS = {
    "all": Choice("the numbers in {xs}", "", lambda n, c: True),
    "odd": Choice("the odd numbers in {xs}", " if {n} % 2 == 1", lambda n, c: n & 1 == 1),
    "positive": Choice("the positive numbers in {xs}", " if {n} > 0", lambda n, c: n >= 1),
    "negative": Choice("the negative numbers in {xs}", " if {n} < 0", lambda n, c: n <= -1),
    "above": Choice("the numbers in {xs} greater than {c}", " if {n} > {c}", lambda n, c: n >= c + 1, range(2, 10)),
    "below": Choice("the numbers in {xs} less than {c}", " if {n} < {c}", lambda n, c: n <= c - 1, range(2, 10)),
    # From 3: the multiples of 2 are the even numbers.
    "multiples": Choice(
        "the multiples of {c} in {xs}", " if {n} % {c} == 0", lambda n, c: n // c * c == n, range(3, 10)
    ),
    "even": Choice("the even numbers in {xs}", " if {n} % 2 == 0", lambda n, c: n & 1 == 0),
}
PHRASINGS = (
    "Write a function that returns {what}.",
    "Write a Python function that returns {what}.",
    "Write a function for {what}.",
    "Implement a function that computes {what}.",
    "Define a function that gives {what}.",
    "I need a function that returns {what}.",
    "Given a list {xs}, return {what}.",
    "Return {what}.",
)
ARGUMENTS = ("xs", "data", "values", "items", "nums", "seq")
LOOP_NAMES = ("n", "x", "v", "m", "k")

COMBINATIONS: dict[Split, tuple[Combination, ...]] = {
    split: tuple(
        Combination(aggregate, transform, keep)
        for a, aggregate in enumerate(AGGREGATES)
        for t, transform in enumerate(TRANSFORMS)
        for f, keep in enumerate(FILTERS)
        if ((a + t + f) % 8 == 0) == (split == "validation")
    )
    for split in get_args(Split)
}
VALIDATION_DOCUMENTS = 2048

# Single numbers tell transforms, filters and constants apart; long lists tell aggregates apart.
TEST_INPUTS: tuple[list[int], ...] = (
    [],
    [11, -4, 36, 9, -27, 2, 54, 18, -6, 36, 7, -4],
    [-8, 63, 5, 40, -21, 12, 3, 63, -8, 16, 0, 72, 45],
    [1, -35, 56, 24, -9, 30, 56, 10, -40, 8, 27],
    [-1, -7, -2, -18, -2],
    *([n] for n in range(-12, 41)),
)


@dataclass(frozen=True)
class Task:
    """One instruction, its canonical `solution` (a function's source, ending with a newline), and its tests.

    `constants` are those of transform and filter, 0 where there is none.
    """

    id: str
    instruction: str
    function_name: str
    solution: str
    combination: Combination
    constants: tuple[int, int]

    @property
    def tests(self) -> tuple[tuple[tuple[list[int]], object], ...]:
        """(arguments, expected value) pairs, fresh at each access, computed without the solution.

        Another choice from any table, or another constant, fails at least one, unless it means the same on every list
        of integers.
        """
        return tuple(((list(xs),), expected(self.combination, self.constants, xs)) for xs in TEST_INPUTS)


def expected(combination: Combination, constants: tuple[int, int], xs: list[int]) -> object:
    """What a right answer returns for `xs`."""
    transform, keep = TRANSFORMS[combination.transform], FILTERS[combination.filter]
    values = [transform.apply(n, constants[0]) for n in xs if keep.apply(n, constants[1])]
    return AGGREGATES[combination.aggregate].apply(values)


def write(
    combination: Combination, constants: tuple[int, int], *, phrasing: str, argument: str, loop_name: str, id: str = ""
) -> Task:
    """The task with these choices."""
    aggregate = AGGREGATES[combination.aggregate]
    transform, keep = TRANSFORMS[combination.transform], FILTERS[combination.filter]
    numbers = keep.phrase.format(xs=argument, c=constants[1])
    what = aggregate.phrase.format(items=transform.phrase.format(items=numbers, c=constants[0]))
    condition = keep.code.format(n=loop_name, c=constants[1])
    result = aggregate.code.format(
        value=transform.code.format(n=loop_name, c=constants[0]), loop=f"for {loop_name} in {argument}{condition}"
    )
    name = "_".join(combination)
    return Task(
        id=id,
        instruction=phrasing.format(what=what, xs=argument),
        function_name=name,
        solution=f'def {name}({argument}):\n    """Return {what}."""\n    return {result}\n',
        combination=combination,
        constants=constants,
    )


def task(split: Split, seed: int, index: int) -> Task:
    """Task number `index` (from 0) of a split's stream, a pure function of its arguments on every Python version.

    Combinations are drawn uniformly. Raises `UserError` for an unknown split.
    """
    if split not in COMBINATIONS:
        raise UserError(f"unknown tinypy split {split!r}: {nearest(split, COMBINATIONS)}")
    id = f"tinypy/{split}/{seed}/{index}"
    rng = random.Random(id)
    combination = pick(rng, COMBINATIONS[split])
    constants = (
        pick(rng, TRANSFORMS[combination.transform].constants or (0,)),
        pick(rng, FILTERS[combination.filter].constants or (0,)),
    )
    return write(
        combination,
        constants,
        phrasing=pick(rng, PHRASINGS),
        argument=pick(rng, ARGUMENTS),
        loop_name=pick(rng, LOOP_NAMES),
        id=id,
    )


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """One of `choices`, uniformly. Python promises the sequence of `random()` across versions, of `choice()` not."""
    return choices[int(rng.random() * len(choices))]


def tasks(split: Split, seed: int, n: int) -> list[Task]:
    """The first `n` tasks of a split's stream."""
    return [task(split, seed, index) for index in range(n)]


def prompt(task: Task) -> str:
    """What a model is given. It ends with a newline, where tokens end too, and the answer starts with `def`."""
    return f"User: {task.instruction}\nAssistant:\n"


def document(task: Task) -> str:
    """Prompt and solution: what a model is trained on. The shard builder sets the end-of-document token behind it."""
    return prompt(task) + task.solution


def documents(split: Split, seed: int) -> Iterator[tuple[str, str]]:
    """(id, text) of a split's documents in order: endless for `train`, `VALIDATION_DOCUMENTS` for `validation`."""
    for index in count() if split == "train" else range(VALIDATION_DOCUMENTS):
        drawn = task(split, seed, index)
        yield drawn.id, document(drawn)
