import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import RunError
from dsv3.evaluation import sandbox, sandbox_worker
from dsv3.evaluation.sandbox import Program, run_tests
from dsv3.evaluation.sandbox_worker import canonical

RIGHT = "def f(xs):\n    return sum(x for x in xs if x > 0)\n"
WORKER = sandbox_worker.__file__
TESTS = [(([],), 0), (([1, -2, 3],), 4)]


def kinds(*sources, tests=TESTS, **limits):
    return [verdict.kind for verdict in run_tests([Program(source, "f", tests) for source in sources], **limits)]


def body(*lines):
    return "\n".join(["def f(xs):", *(f"    {line}" for line in lines), ""])


def test_right_answers_pass():
    assert kinds(
        RIGHT,
        body("total = 0", "for x in xs:", "    if x > 0:", "        total += x", "return total"),
        body("n = 0", "while xs:", "    n, xs = n + max(xs[0], 0), xs[1:]", "return n"),
        "def g(x):\n    return x if x > 0 else 0\n\n\ndef f(xs: list[int]) -> int:\n    return sum(map(g, xs))\n",
        body("keep = lambda x: x > 0", "return sum(filter(keep, xs))"),
        body("return 0 if not xs else max(xs[0], 0) + f(xs[1:])"),
    ) == ["passed"] * 6  # fmt: skip


RIGHT_VALUES = [
    ("1", 1),
    ("{1, 2}", {2, 1}),
    ("(1, [2, None])", (1, [2, None])),
    ("{'b': 1.5, 'a': {3}}", {"a": {3}, "b": 1.5}),
    ("10 ** 5000", 10**5000),
    ("'é\\n'", "é\n"),
    ("float('nan')", float("nan")),
]


def test_values_of_every_plain_type_come_back():
    programs = [Program(body(f"return {answer}"), "f", [(([],), expected)]) for answer, expected in RIGHT_VALUES]
    assert [verdict.kind for verdict in run_tests(programs)] == ["passed"] * len(programs)


WRONG_VALUES = [
    ("True", 1),
    ("1.0", 1),
    ("(1, 2)", [1, 2]),
    ("[1, 2]", {1, 2}),
    ("[2, 1]", [1, 2]),
    ("'1'", 1),
    ("(x for x in xs)", []),
    ("'<generator>'", 0),
    ("range(3)", [0, 1, 2]),
    ("[[True]]", [[1]]),
    ("[1, '2']", ["1", 2]),
    ("['1,2']", ["1", "2"]),
    ("None", 0),
    ("[0] * 200000", [0] * 3),
]


def test_wrong_answers_fail():
    programs = [Program(body(f"return {answer}"), "f", [(([],), expected)]) for answer, expected in WRONG_VALUES]
    assert [verdict.kind for verdict in run_tests(programs)] == ["wrong answer"] * len(programs)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)  # fmt: skip


@given(PLAIN, PLAIN)
def test_canonical_text_tells_values_apart(a, b):
    assert (canonical(a) == canonical(b)) == same(a, b)


def same(a, b):
    """Equal, and of the same types throughout."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return repr(a) == repr(b)


FAILURES = [
    (body("return 1 +"), "syntax error"),
    (body("return " + "(" * 5000 + "1" + ")" * 5000), "syntax error"),
    (body("return " + "-" * 15000 + "1"), "syntax error"),
    ("def f(xs):\n    return '\0'\n", "syntax error"),
    ("def f(xs):\n    return '\ud800'\n", "syntax error"),
    ("", "no function"),
    ("def g(xs):\n    return 0\n", "no function"),
    (body("return sum(ys)"), "exception: NameError"),
    (body("return xs[99]"), "exception: IndexError"),
    (body("return 1 // 0"), "exception: ZeroDivisionError"),
    (body("return f(xs)"), "exception: RecursionError"),
    ("def sum(xs):\n    return sum(xs)\n\n\ndef f(xs):\n    return sum(xs)\n", "exception: RecursionError"),
    (body("xs = [xs]", "xs[0] = xs", "return xs"), "exception: RecursionError"),
    ("def f():\n    return 0\n", "exception: TypeError"),
    (body("return [0] * 10 ** 10"), "exception: MemoryError"),
    (body("xs = [0]", "while True:", "    xs += xs"), "exception: MemoryError"),
    (body("return '%1000000000000d' % 1"), "exception: MemoryError"),
    ("x" * 30_000, "refused: length"),
]


def test_failures_have_names():
    assert kinds(*(source for source, _ in FAILURES)) == [kind for _, kind in FAILURES]


REFUSED = [
    ("import os\n" + RIGHT, "import"),
    (body("import os", "return os"), "import"),
    (body("from os import system", "return 0"), "import"),
    (body("return __import__('os')"), "__import__"),
    (body("return ().__class__.__bases__[0].__subclasses__()"), "attribute"),
    (body("return '{0.__class__}'.format(xs)"), "attribute"),
    (body("return f'{xs.__class__}'"), "joinedstr"),
    (body("return (x for x in xs).gi_frame"), "attribute"),
    (body("xs.append(1)", "return xs"), "attribute"),
    (body("return open('/etc/passwd')"), "open"),
    (body("g = open", "return g('/etc/passwd')"), "open"),
    (body("return [open][0]"), "open"),
    (body("return list(map(eval, ['1']))"), "eval"),
    (body("return exec('1')"), "exec"),
    (body("return compile('1', '', 'eval')"), "compile"),
    (body("return getattr(xs, 'app' + 'end')"), "getattr"),
    (body("return vars()"), "vars"),
    (body("return globals()"), "globals"),
    (body("return type(xs)"), "type"),
    (body("return input()"), "input"),
    (body("return breakpoint()"), "breakpoint"),
    (body('print(\'{"end": "done", "answers": ["0x0", "0x4"]}\')', "return 0"), "print"),
    (body("raise SystemExit(0)"), "raise"),
    (body("try:", "    return 0", "finally:", "    return 4"), "try"),
    (body("with xs:", "    return 0"), "with"),
    (body("global f", "return 0"), "global"),
    (body("class A:", "    pass", "return A()"), "class"),
    ("class A:\n    def __eq__(self, other):\n        return True\n\n\ndef f(xs):\n    return A()\n", "class"),
    (body("return __builtins__['open']"), "__builtins__"),
    ("def f(__builtins__):\n    return 0\n", "__builtins__"),
    (body("__builtins__ = {}", "return 0"), "__builtins__"),
    (body("return (lambda: 0)()"), "call"),
    (body("return [sum][0](xs)"), "call"),
    ("x = 10 ** 10 ** 10\n" + RIGHT, "statement outside a function"),
    ("@sum\n" + RIGHT, "decorator"),
    ("async def f(xs):\n    return 0\n", "async"),
]


def test_what_is_not_on_the_whitelist_is_refused():
    assert kinds(*(source for source, _ in REFUSED)) == [f"refused: {what}" for _, what in REFUSED]


def test_a_program_may_use_a_builtins_name_for_its_own():
    assert kinds("def f(input):\n    open = input\n    return sum(x for x in open if x > 0)\n") == ["passed"]
    # A name bound elsewhere in the program gets past the whitelist, and then there is no such builtin.
    assert kinds("def g(open):\n    return open\n\n\ndef f(xs):\n    return open\n") == ["exception: NameError"]


def test_a_hanging_program_fails_alone():
    hanging = [
        body("while True:", "    pass"),
        body("return 10 ** 10 ** 10"),
        body("return sum(range(10 ** 12))"),
    ]
    verdicts = kinds(RIGHT, hanging[0], RIGHT, hanging[1], hanging[2], RIGHT, timeout=1)
    assert verdicts == ["passed", "timeout", "passed", "timeout", "timeout", "passed"]


def test_the_first_failure_counts_and_names_its_call():
    (verdict,) = run_tests([Program(body("return xs[0]"), "f", [(([5],), 5), (([7],), 8), (([],), 0)])])
    assert (verdict.kind, verdict.detail) == ("wrong answer", "f([7])")
    (verdict,) = run_tests([Program(body("return xs[0]"), "f", [(([5],), 5), (([],), 0), (([7],), 8)])])
    assert (verdict.kind, verdict.detail) == ("exception: IndexError", "f([])")


def test_calls_do_not_share_their_arguments():
    source = body("xs[0] = xs[0] + 1", "return xs[0]")
    shared = [1]
    assert kinds(source, tests=[((shared,), 2), ((shared,), 2)]) == ["passed"]
    assert shared == [1]


def test_programs_do_not_share_anything():
    assert kinds("def g(xs):\n    return 4\n" + RIGHT, body("return g(xs)")) == ["passed", "exception: NameError"]


def test_no_tests_is_no_pass():
    with pytest.raises(ValueError, match="without tests"):
        Program(RIGHT, "f", [])
    assert sandbox.judge(Program(RIGHT, "f", TESTS), "done", []).kind == "crash: no answer"


def test_no_programs():
    assert run_tests([]) == []


def test_a_dead_worker_is_said(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit('no memory')")
    monkeypatch.setattr(sandbox_worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(RunError, match=r"after 0 of 1 programs with status 1 \(no memory\)"):
        kinds(RIGHT)


def escaped(tmp_path, monkeypatch, *lines):
    """The verdict where a program got past the whitelist, runs these lines, and then claims the right answers."""
    script = [
        "import importlib.util, os, signal, socket, sys, time",
        f"spec = importlib.util.spec_from_file_location('worker', {WORKER!r})",
        "worker = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(worker)",
        "def attempt(request):",
        "    try:",
        *(f"        {line}" for line in lines),
        "    except (OSError, MemoryError) as error:",
        "        return {'end': type(error).__name__, 'answers': []}",
        "    return {'end': 'done', 'answers': ['0x0', '0x4']}",
        "worker.attempt = attempt",
        "worker.main()",
    ]
    (tmp_path / "worker.py").write_text("\n".join(script))
    monkeypatch.setattr(sandbox_worker, "__file__", str(tmp_path / "worker.py"))
    return kinds(RIGHT, timeout=1)[0]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("pass", "passed"),
        ("open('/dev/null')", "OSError"),
        ("socket.socket()", "OSError"),
        ("os.pipe()", "OSError"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("os._exit(0)", "crash: no answer"),
        ("raise ValueError", "crash: no answer"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crash: SIGSEGV"),
        ("time.sleep(60)", "timeout"),
        ("signal.signal(signal.SIGXCPU, signal.SIG_IGN); exec('while True: pass')", "timeout"),
        ('print(\'{"end": "done", "answers": ["0x0", "0x4"]}\', flush=True); os._exit(0)', "crash: no answer"),
        ("assert sys.stdin.buffer.raw.read() == b''", "passed"),
    ],
)
def test_limits_stand_behind_the_whitelist(tmp_path, monkeypatch, line, kind):
    assert escaped(tmp_path, monkeypatch, line) == kind


def test_the_worker_sees_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert escaped(tmp_path, monkeypatch, "assert 'TOKEN' not in os.environ and 'site' not in sys.modules") == "passed"
    assert escaped(tmp_path, monkeypatch, "assert 'PATH' in os.environ") == "crash: no answer"
