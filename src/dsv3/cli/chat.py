"""`dsv3 chat`: continue what is typed, line by line."""

from pathlib import Path
from typing import Any

import click

from dsv3.cli.generate import sampling_options, unescape
from dsv3.cli.options import PATH


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--template", default="{}", help="What a line is put into before it is continued.")
@sampling_options
def chat(checkpoint: Path, template: str, ema: bool, device: str, **sampling: Any) -> None:
    """Plain continuation with the model in CHECKPOINT. Ctrl-C stops an answer, /exit or Ctrl-D ends."""
    from dsv3.errors import UserError
    from dsv3.inference.llm import LLM
    from dsv3.inference.params import SamplingParams

    if "{}" not in template:
        raise UserError(f"--template {template!r} has no place for the line: expected one {{}}")
    params = SamplingParams(**sampling)
    llm = LLM(checkpoint, device=device, ema=ema)
    click.echo(f"{checkpoint}: type a line, /exit ends", err=True)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if line.strip() == "/exit":
            return
        try:
            for text in llm.stream(unescape(template).replace("{}", line), params):
                click.echo(text, nl=False)
        except UserError as error:
            click.echo(f"dsv3: {error}", err=True)
        except KeyboardInterrupt:
            pass
        click.echo()
