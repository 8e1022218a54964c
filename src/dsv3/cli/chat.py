"""`dsv3 chat`: a conversation, or one continuation a line."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv3.cli.generate import opened, sampling_options, texts, unescape
from dsv3.cli.options import PATH
from dsv3.errors import UserError

if TYPE_CHECKING:
    from dsv3.data.chat import Message
    from dsv3.inference.llm import LLM
    from dsv3.inference.params import SamplingParams


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--template", help="For a model that was not trained to converse: what each line is put into before it is continued "
              "by itself, such as '{}'.  [default: a conversation, in the checkpoint's chat template]")  # fmt: skip
@sampling_options
def chat(checkpoint: Path, template: str | None, **options: Any) -> None:
    """Talks with the model in CHECKPOINT. Ctrl-C stops an answer, which is forgotten, /new begins anew, /exit or Ctrl-D ends."""
    if template is not None and "{}" not in template:
        raise UserError(f"--template {template!r} has no place for the line: expected one {{}}")
    llm, params = opened(checkpoint, **options)
    click.echo(f"{checkpoint}: type a line, /new begins anew, /exit ends", err=True)
    turns: list[Message] = []
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        match line.strip():
            case "/exit":
                return
            case "/new":
                turns = []
                continue
        try:
            if template is not None:
                for text in texts(llm, unescape(template).replace("{}", line), params):
                    click.echo(text, nl=False)
            else:
                asked = [*turns, {"role": "user", "content": line}]
                turns = [*asked, {"role": "assistant", "content": answer(llm, asked, params)}]
        except UserError as error:
            click.echo(f"dsv3: {error}", err=True)
        except KeyboardInterrupt:
            pass
        click.echo()


def answer(llm: "LLM", turns: "list[Message]", params: "SamplingParams") -> str:
    """Streams the answer, its reasoning dimmed; returns what of it belongs to the conversation."""
    from dsv3.serving.parsing import Parser, merge

    prompt = llm.template.prompt(turns)
    parser, parts = Parser(prompt.thinking), []
    for text in chain(texts(llm, prompt.ids, params), [None]):
        new = parser.push(text or "", last=text is None)
        parts += new
        for part in new:
            for kind, piece in part.items():
                click.echo(click.style(piece, dim=kind == "reasoning_content"), nl=False)
    return str(merge(parts)["content"])
