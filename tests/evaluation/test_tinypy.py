import pytest

from dsv3.data import tinypy as data
from dsv3.errors import RunError
from dsv3.evaluation.tinypy import cut, pass_at_1


def answers(split, seed, n, change=lambda task: task.solution):
    """A model that knows the tasks: its answer to a prompt is `change` of the task."""
    known = {data.prompt(task): change(task) for task in data.tasks(split, seed, n)}
    return lambda prompts: [known[prompt] for prompt in prompts]


def test_a_perfect_model_passes_all():
    examples = pass_at_1(answers("validation", 4, 60), 60, seed=4)
    assert [example.verdict.passed for example in examples] == [True] * 60
    assert {example.task.combination for example in examples} <= set(data.COMBINATIONS["validation"])


def test_each_way_to_fail_is_told():
    def change(task):
        return {
            "sum": task.solution.replace(task.function_name, "another_name"),
            "largest": task.solution.replace("return max", "return min"),
            "smallest": "Sure!\n" + task.solution,
            "first": task.solution.rstrip(")\n"),
            "list": task.solution.replace(" for ", " fro ", 1),
            "set": task.solution.replace("return", "return frozenset or"),
            "ascending": "import os\n" + task.solution,
            "descending": task.solution + "\nUser: Return 0.\nAssistant:\n",
        }[task.combination.aggregate]

    examples = pass_at_1(answers("validation", 0, 100, change), 100, seed=0)
    by_aggregate = {example.task.combination.aggregate: example for example in examples}
    kinds = {aggregate: example.verdict.kind for aggregate, example in by_aggregate.items()}
    assert kinds == {
        "sum": "passed",
        "largest": "wrong answer",
        "smallest": "syntax error",
        "first": "syntax error",
        "list": "syntax error",
        "set": "wrong answer",
        "ascending": "refused: import",
        "descending": "passed",
    }
    assert by_aggregate["descending"].source.rstrip() == by_aggregate["descending"].task.solution.rstrip()


def test_a_miscopied_constant_fails():
    """What the smallest models get wrong; on a few tasks two constants mean the same."""

    def change(task):
        head, line = task.solution.rsplit("return", 1)
        c = next(c for c in task.constants if c)
        return head + "return" + line.replace(str(c), str(c % 9 + 1))

    n = 200
    tasks = [task for task in data.tasks("validation", 1, n) if any(task.constants)]
    known = {data.prompt(task): change(task) for task in tasks}
    examples = pass_at_1(lambda prompts: [known.get(prompt, "") for prompt in prompts], n, seed=1)
    assert len(tasks) > 100
    assert sum(example.verdict.passed for example in examples) <= 3


@pytest.mark.parametrize(
    ("completion", "function"),
    [
        ("def f(xs):\n    return 0\n", "def f(xs):\n    return 0\n"),
        ("def f(xs):\n    return 0\nUser: more\n    x\n", "def f(xs):\n    return 0\n"),
        ("def f(xs):\n    return 0\n\n\ndef g(xs):\n    return 1\n", "def f(xs):\n    return 0\n\n\n"),
        ("def f(xs):\n    x = 0\n\n    return x\nx", "def f(xs):\n    x = 0\n\n    return x\n"),
        ("def f(xs):\n\treturn 0\n)", "def f(xs):\n\treturn 0\n"),
        ("def f(xs): return 0", "def f(xs): return 0"),
        ("def f(xs):\n    return", "def f(xs):\n    return"),
        ("\ndef f(xs):\n    return 0\n", "\n"),
        ("", ""),
    ],
)
def test_cut(completion, function):
    assert cut(completion) == function


def test_missing_completions():
    with pytest.raises(RunError, match="5 prompts gave 4 completions"):
        pass_at_1(lambda prompts: prompts[1:], 5)
