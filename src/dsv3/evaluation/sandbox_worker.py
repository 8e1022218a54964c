"""The far side of `sandbox.py`: a script for `python -I -S` that checks and runs one program after the other.

It reads lines of JSON `{"source", "function", "arguments": [[argument, ...], ...], "seconds", "bytes"}` and answers
each with a line `{"end", "answers"}`: how the program ended (`"done"`, or a failure as in `sandbox.Verdict.kind`) and,
in canonical text, what the function returned for the calls before that. What was expected is not sent here, so a
program cannot know what to claim. Each program gets a process of its own, forked from this one: that takes
milliseconds, and whatever a program does to its interpreter ends with it. Only the standard library is imported.
"""

import ast
import builtins
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

SAFE_BUILTINS = (
    "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int", "isinstance",
    "iter", "len", "list", "map", "max", "min", "next", "pow", "range", "reversed", "round", "set", "sorted", "str", "sum",
    "tuple", "zip",
)  # fmt: skip
"""None of them imports, opens, compiles, prints or reaches an attribute by name."""

SAFE_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For,
    ast.While, ast.If, ast.Expr, ast.Pass, ast.Break, ast.Continue,
    ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Lambda, ast.Call, ast.keyword, ast.Starred,
    ast.Subscript, ast.Slice, ast.Constant, ast.Name, ast.List, ast.Tuple, ast.Set, ast.Dict,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension,
    ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip
WORDS = {ast.Import: "import", ast.ImportFrom: "import", ast.ClassDef: "class", ast.AsyncFunctionDef: "async"}

LONGEST_SOURCE = 20_000
LONGEST_ANSWER = 100_000


def refusal(tree: ast.Module) -> str | None:
    """What in a program is not on the whitelist, in one word; None when all of it is.

    Module level holds function definitions only. No attribute is read or set anywhere, no name starts with two
    underscores, and what is called is called by name: a builtin of `SAFE_BUILTINS` or what the program binds itself.
    """
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if not isinstance(statement, ast.FunctionDef):
            return WORDS.get(type(statement), "statement outside a function")
    nodes = list(ast.walk(tree))
    bound = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if not isinstance(node, SAFE_NODES):
            return WORDS.get(type(node), type(node).__name__.lower())
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            return "decorator"
        # A call of an attribute is refused as an attribute, when its turn comes.
        if isinstance(node, ast.Call) and not isinstance(node.func, (ast.Name, ast.Attribute)):
            return "call"
        if (
            isinstance(node, ast.Name)
            and node.id not in bound
            and node.id not in SAFE_BUILTINS
            and hasattr(builtins, node.id)
        ):
            return node.id
    named = bound | {node.id for node in nodes if isinstance(node, ast.Name)}
    return next((name for name in sorted(named) if name.startswith("__")), None)


def canonical(value: object) -> str:
    """A text that two values share if and only if they are equal, types included (1, 1.0 and True differ).

    Floats are told apart by their repr; sets and dictionaries are ordered by text; a value of any other type, such as a
    generator, is its type's name in angle brackets. Raises `RecursionError` for a value that contains itself.
    """
    kind = type(value)
    if value is None or isinstance(value, (bool, float, str)):
        return repr(value)
    if isinstance(value, int):
        # repr refuses integers above 4300 digits.
        return hex(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [canonical(item) for item in value]
        return f"{kind.__name__}({','.join(items if isinstance(value, (list, tuple)) else sorted(items))})"
    if isinstance(value, dict):
        return f"dict({','.join(sorted(f'{canonical(key)}:{canonical(item)}' for key, item in value.items()))})"
    return f"<{kind.__name__}>"


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one program to its end in this process, which is not to be used afterwards."""
    answers: list[str] = []

    def ended(end: str) -> dict[str, Any]:
        return {"end": end, "answers": answers}

    if len(request["source"]) > LONGEST_SOURCE:
        return ended("refused: length")
    try:
        tree = ast.parse(request["source"])
        if word := refusal(tree):
            return ended(f"refused: {word}")
        code = compile(tree, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ended("syntax error")
    names: dict[str, Any] = {"__builtins__": {name: getattr(builtins, name) for name in SAFE_BUILTINS}}
    # Whatever untrusted code raises is its own failure, so everything is caught here.
    try:
        exec(code, names)
        if request["function"] not in names:
            return ended("no function")
        for arguments in request["arguments"]:
            answer = canonical(names[request["function"]](*arguments))
            answers.append(answer if len(answer) <= LONGEST_ANSWER else "<too long>")
    except BaseException as error:
        return ended(f"exception: {type(error).__name__}")
    return ended("done")


def limit(seconds: int, address_space: int) -> None:
    """Lowers this process's limits for good: CPU seconds, bytes of memory, and nothing to write, open, or start."""
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_NOFILE: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
    }
    # macOS refuses to limit the address space.
    if sys.platform != "darwin":
        limits[resource.RLIMIT_AS] = (address_space, address_space)
    for kind, values in limits.items():
        resource.setrlimit(kind, values)


def run_alone(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one program in a forked process; waits four times its CPU seconds, and one more, for its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        # The answer leaves through `writer` alone: neither the requests to come nor the answers' pipe are in reach.
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        limit(request["seconds"], request["bytes"])
        reply = json.dumps(attempt(request)).encode()
        while reply:
            reply = reply[os.write(writer, reply) :]
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + 4 * request["seconds"] + 1
    received = b""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        received += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        timed_out = number in (signal.SIGXCPU, signal.SIGKILL)
        return {"end": "timeout" if timed_out else f"crash: {signal.Signals(number).name}", "answers": []}
    if not received:
        return {"end": "crash: no answer", "answers": []}
    return dict(json.loads(received))


def main() -> None:
    """Answers every line of standard input with a line of standard output."""
    for line in sys.stdin:
        print(json.dumps(run_alone(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
