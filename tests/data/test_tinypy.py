import builtins
import hashlib
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import tinypy
from dsv3.data.tinypy import AGGREGATES, COMBINATIONS, FILTERS, TRANSFORMS, Combination
from dsv3.errors import UserError

EVERY = [Combination(*choice) for choice in itertools.product(AGGREGATES, TRANSFORMS, FILTERS)]


def write(combination, constants, n=0):
    return tinypy.write(
        combination,
        constants,
        phrasing=tinypy.PHRASINGS[n % 8],
        argument=tinypy.ARGUMENTS[n % 6],
        loop_name=tinypy.LOOP_NAMES[n % 5],
    )


def function(task):
    names = {}
    exec(task.solution, names)
    return names[task.function_name]


def constants_of(combination):
    return list(
        itertools.product(
            TRANSFORMS[combination.transform].constants or (0,), FILTERS[combination.filter].constants or (0,)
        )
    )


def test_every_solution_passes_its_tests():
    for n, combination in enumerate(EVERY):
        legal = constants_of(combination)
        for constants in {legal[0], legal[-1], legal[n % len(legal)]}:
            task = write(combination, constants, n)
            answer = function(task)
            for arguments, expected in task.tests:
                got = answer(*arguments)
                assert got == expected, (task.solution, arguments)
                assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("combination", "constants", "instruction", "result"),
    [
        (("sum", "squares", "even"), (0, 0), "Return the sum of the squares of the even numbers in xs.", 4 + 16 + 4),
        (
            ("largest", "plus", "above"),
            (3, 4),
            "Return the largest of the numbers in xs greater than 4, each plus 3, or 0 if there are none.",
            8,
        ),
        (
            ("smallest", "opposites", "odd"),
            (0, 0),
            "Return the smallest of the opposites of the odd numbers in xs, or 0 if there are none.",
            -5,
        ),
        (
            ("first", "times", "negative"),
            (7, 0),
            "Return the first of the negative numbers in xs, each times 7, or 0 if there are none.",
            -14,
        ),
        (
            ("list", "minus", "below"),
            (2, 3),
            "Return the list of the numbers in xs less than 3, each minus 2.",
            [-4, -5, 0],
        ),
        (
            ("set", "cubes", "positive"),
            (0, 0),
            "Return the set of the cubes of the positive numbers in xs.",
            {125, 64, 8},
        ),
        (
            ("ascending", "quotients", "multiples"),
            (4, 5),
            "Return the sorted list of the multiples of 5 in xs, each divided by 4 and rounded down.",
            [1],
        ),
        (
            ("descending", "numbers", "all"),
            (0, 0),
            "Return the list, largest first, of the numbers in xs.",
            [5, 4, 2, -2, -3],
        ),
    ],
)  # fmt: skip
def test_the_instruction_means_what_is_tested(combination, constants, instruction, result):
    task = tinypy.write(
        Combination(*combination), constants, phrasing=tinypy.PHRASINGS[-1], argument="xs", loop_name="n"
    )
    assert task.instruction == instruction
    assert tinypy.expected(task.combination, task.constants, [-2, 5, -3, 4, 2]) == result
    assert function(task)([-2, 5, -3, 4, 2]) == result


def test_a_wrong_choice_fails_the_tests():
    """Another constant, aggregate, transform or filter fails, unless 751 other inputs show no difference either."""
    rng = random.Random(0)
    probes = [[n] for n in range(-300, 301)]
    probes += [[rng.randrange(-90, 90) for _ in range(rng.randrange(2, 20))] for _ in range(150)]
    caught, same = 0, Counter()
    for combination in EVERY:
        constants = rng.choice(constants_of(combination))
        task = write(combination, constants)
        aggregate, transform, keep = combination
        mutants = [Combination(other, transform, keep) for other in AGGREGATES if other != aggregate]
        mutants += [Combination(aggregate, other, keep) for other in TRANSFORMS if other != transform]
        mutants += [Combination(aggregate, transform, other) for other in FILTERS if other != keep]
        wrong = [(mutant, rng.choice(constants_of(mutant))) for mutant in mutants]
        wrong += [(combination, other) for other in constants_of(combination) if other != constants]
        for mutant, values in rng.sample(wrong, 12):
            # Constants that the mutant shares with the task stay.
            values = (
                values[0] if mutant.transform != transform or mutant == combination else constants[0],
                values[1] if mutant.filter != keep or mutant == combination else constants[1],
            )
            if any(
                distinct(tinypy.expected(mutant, values, *arguments), expected) for arguments, expected in task.tests
            ):
                caught += 1
            else:
                assert not any(
                    distinct(tinypy.expected(mutant, values, xs), tinypy.expected(combination, constants, xs))
                    for xs in probes
                ), (task.solution, mutant, values)
                same[mutant == combination] += 1
    assert caught > 6000
    # "each minus 6" of the numbers above 5 and above 6: the sums are equal whatever the list. Such pairs are rare.
    assert sum(same.values()) < 40


def distinct(a, b):
    return a != b or type(a) is not type(b)


def test_held_out_combinations():
    train, validation = map(set, (COMBINATIONS["train"], COMBINATIONS["validation"]))
    assert (len(train), len(validation)) == (448, 64)
    assert train | validation == set(EVERY)
    assert Combination("sum", "squares", "even") in validation
    for first, second in itertools.combinations(range(3), 2):
        pairs = Counter((c[first], c[second]) for c in validation)
        assert set(pairs.values()) == {1}
        assert len(pairs) == 64
        assert set(Counter((c[first], c[second]) for c in train).values()) == {7}


def test_training_never_meets_a_held_out_combination():
    drawn = Counter(task.combination for task in tinypy.tasks("train", 3, 6000))
    assert set(drawn) == set(COMBINATIONS["train"])
    assert {task.combination for task in tinypy.tasks("validation", 3, 1000)} == set(COMBINATIONS["validation"])
    prompts = {tinypy.prompt(task) for task in tinypy.tasks("train", 3, 6000)}
    assert not prompts & {tinypy.prompt(task) for task in tinypy.tasks("validation", 3, 1000)}


def test_the_docstring_counts_documents_right():
    ways = len(tinypy.PHRASINGS) * len(tinypy.ARGUMENTS) * len(tinypy.LOOP_NAMES)
    text = " ".join(tinypy.__doc__.split())
    for split, combinations in COMBINATIONS.items():
        count = ways * sum(len(constants_of(combination)) for combination in combinations)
        assert f"{count:,} distinct training" in text if split == "train" else f"{count:,} validation" in text, count


def test_distinct_choices_give_distinct_documents():
    choices = itertools.product(
        [("list", "plus", "above"), ("sum", "numbers", "all")],
        [(2, 3), (3, 2)],
        tinypy.PHRASINGS,
        tinypy.ARGUMENTS,
        tinypy.LOOP_NAMES,
    )
    texts = {
        tinypy.document(tinypy.write(Combination(*c), constants, phrasing=p, argument=a, loop_name=n))
        for c, constants, p, a, n in choices
    }
    # The second combination has no constants.
    assert len(texts) == 3 * 8 * 6 * 5


def test_names_shadow_nothing():
    names = {task.function_name for task in tinypy.tasks("train", 0, 3000)}
    assert not {*names, *tinypy.ARGUMENTS, *tinypy.LOOP_NAMES} & set(dir(builtins))
    assert not set(tinypy.ARGUMENTS) & set(tinypy.LOOP_NAMES)


def test_the_stream_is_the_same_on_every_python():
    text = "".join(text for _, text in itertools.islice(tinypy.documents("train", 7), 500))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "dd34830e055939d572db0ced6231e7d88e2214ecfb8b8b6f318a3e741cd2555a"
    )


@given(st.sampled_from(["train", "validation"]), st.integers(-5, 2**63), st.integers(0, 2**40))
def test_a_task_depends_on_its_arguments_alone(split, seed, index):
    task = tinypy.task(split, seed, index)
    assert task == tinypy.task(split, seed, index)
    assert task.combination in COMBINATIONS[split]
    text = tinypy.document(task)
    assert text.startswith(tinypy.prompt(task) + "def ")
    assert text.endswith("\n")
    assert text.isascii()


def test_seeds_and_splits_are_different_streams():
    streams = [
        [tinypy.document(task) for task in tinypy.tasks(split, seed, 50)]
        for split in ("train", "validation")
        for seed in (0, 1)
    ]
    for one, other in itertools.combinations(streams, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) <= 1


def test_documents():
    train = list(itertools.islice(tinypy.documents("train", 5), 3000))
    assert train == [(task.id, tinypy.document(task)) for task in tinypy.tasks("train", 5, 3000)]
    assert len({id for id, _ in train}) == 3000
    assert len(list(tinypy.documents("validation", 5))) == tinypy.VALIDATION_DOCUMENTS


def test_tests_are_fresh_at_each_access():
    task = tinypy.task("train", 0, 0)
    task.tests[1][0][0].clear()
    assert task.tests[1][0][0]


def test_unknown_split():
    with pytest.raises(UserError, match="did you mean 'validation'"):
        tinypy.task("valid", 0, 0)
