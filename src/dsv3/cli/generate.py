"""`dsv3 generate`: continue a prompt."""

import re
from pathlib import Path
from typing import Any

import click

from dsv3.cli.options import PATH, device_option, ema_option, several

sampling_options = several(
    click.option("--temperature", type=float, default=0.7, help="0 takes the most likely token."),
    click.option("--top-p", type=float, default=0.95),
    click.option("--max-tokens", type=click.IntRange(1), default=128),
    click.option("--stop", multiple=True, help="A text that ends the continuation; may be given several times."),
    click.option("--seed", type=int, help="Repeats a continuation."),
    ema_option,
    device_option,
)
"""What `generate` and `chat` share; what is left after `ema` and `device` are the fields of `SamplingParams`."""


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--prompt", required=True, help="The text to continue; \\n and \\t are read as in Python.")
@click.option("--suffix", help="What follows the gap: the model fills in the middle.")
@sampling_options
def generate(checkpoint: Path, prompt: str, suffix: str | None, ema: bool, device: str, **sampling: Any) -> None:
    """Streams a continuation of PROMPT by the model in CHECKPOINT: a run, a checkpoint or a Hugging Face directory."""
    from dsv3.data.fim import gap_prompt
    from dsv3.inference.llm import LLM
    from dsv3.inference.params import SamplingParams

    params = SamplingParams(**sampling)
    llm = LLM(checkpoint, device=device, ema=ema)
    prompt = unescape(prompt)
    ids: str | list[int] = prompt
    if suffix is not None:
        ids = gap_prompt(prompt, unescape(suffix), llm.tokenizer)
    click.echo(prompt, nl=False)
    for text in llm.stream(ids, params):
        click.echo(text, nl=False)
    click.echo(unescape(suffix) if suffix is not None else "")


def unescape(text: str) -> str:
    r"""`\n`, `\t` and `\\` as Python reads them, everything else as it is."""
    return re.sub(r"\\\\|\\n|\\t", lambda found: {"\\\\": "\\", "\\n": "\n", "\\t": "\t"}[found[0]], text)
