import os
import resource
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from dsv3.cli import main
from dsv3.errors import RunError, UserError


def failing(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.fixture
def run_failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(error: BaseException, *arguments: str) -> int:
        monkeypatch.setitem(main.COMMANDS, "fail", ("tests:fail", "Fails."))
        monkeypatch.setattr(main.LazyGroup, "get_command", lambda group, ctx, name: failing(error))
        return main.run([*arguments, "fail"])

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("found this, expected that"), 2, "dsv3: found this, expected that\n"),
        (RunError("the loss is not finite"), 1, "dsv3: the loss is not finite\n"),
        (OSError(28, "No space left on device", "runs/x"), 1, "dsv3: No space left on device: runs/x\n"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "dsv3: Permission denied: /root/x\n"),
        (KeyboardInterrupt(), 130, "\ndsv3: stopped\n"),
    ],
)
def test_errors_become_a_paragraph_and_an_exit_code(
    run_failing: Callable[..., int], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert run_failing(error) == code
    assert capsys.readouterr().err == said


def test_debug_shows_the_traceback(run_failing: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_failing(UserError("wrong"), "--debug") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("dsv3: wrong\n")


def test_a_bug_is_not_disguised(run_failing: Callable[..., int]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_failing(ZeroDivisionError())


def test_unknown_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["inof"]) == 2
    assert capsys.readouterr().err == "dsv3: unknown command 'inof': did you mean 'info'?\n"
    assert main.run(["info", "model", "tiny", "--jsno"]) == 2
    assert "--json" in capsys.readouterr().err


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_exists_and_helps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([name, "--help"]) == 0
    assert f"Usage: dsv3 {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info", "model", "deepseek-v3"]])
def test_answers_at_once_and_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from dsv3.cli.main import run; code = run(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'numpy', 'pydantic', 'matplotlib')))"
    )
    best = float("inf")
    for _ in range(3):
        started = children_seconds()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        best = min(best, children_seconds() - started)
        assert done.returncode == 0, done.stderr
    assert best < 0.7


def children_seconds() -> float:
    """The processor's time of ended child processes, whatever else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_python_m_dsv3() -> None:
    done = subprocess.run([sys.executable, "-m", "dsv3", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "dsv3,")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)],
    ids=str,
)
def test_threads_spin_a_little_unless_the_environment_says_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "whatever was there comes back afterwards")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main.sys, "argv", ["dsv3", "--version"])
    with pytest.raises(SystemExit):
        main.main()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
