"""`dsv3`: finds the command, runs it, and turns what goes wrong into one paragraph and an exit code.

A command's file is imported when the command is called and not before, so that help and completion answer at once. Exit
codes: 0 done, 2 a mistake in the request, 1 a run that could not go on, 130 stopped by Ctrl-C.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from dsv3 import __version__
from dsv3.errors import RunError, UserError, nearest

COMMANDS = {
    "quickstart": ("dsv3.cli.quickstart:quickstart", "Everything, small, on this machine; writes a report."),
    "tokenizer": ("dsv3.cli.tokenizer:tokenizer", "Train byte-level BPE on your texts."),
    "data": ("dsv3.cli.data:data", "Documents to token shards."),
    "pretrain": ("dsv3.cli.pretrain:pretrain", "Train a recipe's model: tokenizer, shards, training."),
    "extend": ("dsv3.cli.pretrain:extend", "Train on at a greater length, from a run or published weights."),
    "eval": ("dsv3.cli.eval:evaluate", "Score a model: bits per byte, tasks, needles, loss by position, MTP drafts."),
    "generate": ("dsv3.cli.generate:generate", "Continue a prompt, or fill in the middle."),
    "chat": ("dsv3.cli.chat:chat", "Type, and see it continued."),
    "serve": ("dsv3.cli.serve:serve", "An OpenAI-compatible server, with a chat page."),
    "import": ("dsv3.cli.convert:import_command", "Published weights into a checkpoint."),
    "export": ("dsv3.cli.convert:export_command", "A checkpoint as a Hugging Face directory, FP8 if you like."),
    "report": ("dsv3.cli.report:report", "One HTML page about a run, finished or going."),
    "compare": ("dsv3.cli.compare:compare", "Runs side by side, and the report's signs."),
    "ablate": ("dsv3.cli.ablate:ablate", "Every recipe of a directory with several seeds, then `compare`."),
    "plan": ("dsv3.cli.plan:plan", "Memory, time, bubbles and traffic, before any GPU is rented."),
    "bench": ("dsv3.cli.bench:bench", "Speeds of this machine, each as a ratio to a peer's."),
    "info": ("dsv3.cli.info:info", "What a model is, a directory of weights holds, this machine uses."),
}
"""Every command: the function behind it, and its line in the help."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, freshly imported; `UserError` with the nearest name for an unknown one."""
        if cmd_name not in COMMANDS:
            raise UserError(f"unknown command {cmd_name!r}: {nearest(cmd_name, COMMANDS)}")
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), function)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help's list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="dsv3")
@click.option("--debug", is_flag=True, help="Show Python's traceback when something goes wrong; works anywhere.")
def dsv3(debug: bool) -> None:
    """The DeepSeek-V3 system: from text to a served model, from a laptop to a cluster."""


def main() -> None:
    """The entry point of the `dsv3` script and of `python -m dsv3`."""
    # Before torch is loaded: how long its threads spin for one another before they sleep. Where they sleep at once, decoding takes
    # three times as long; where they spin as long as OpenMP likes, a busy machine takes ten times as long (docs/log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; whatever went wrong has been printed to stderr."""
    try:
        result = dsv3.main([part for part in arguments if part != "--debug"], prog_name="dsv3", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, UserError, RunError, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        message, code = explain(error)
        click.echo(f"{click.style('dsv3:', fg='red', bold=True)} {message}", err=True)
        return code


def explain(error: Exception) -> tuple[str, int]:
    """What to print for an error, and the exit code."""
    if isinstance(error, click.Abort):
        return str(error.__cause__ or "") or "stopped", 130
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}", 1
    return str(error), 2 if isinstance(error, UserError) else 1
