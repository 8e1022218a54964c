"""`dsv3 generate`: continue a prompt."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv3.cli.options import PATH, device_option, drafts_option, ema_option, fp8_cache_option, several

if TYPE_CHECKING:
    from dsv3.inference.llm import LLM, Prompt
    from dsv3.inference.params import SamplingParams

sampling_options = several(
    click.option("--temperature", type=float, default=0.7, help="0 takes the most likely token."),
    click.option("--top-p", type=float, default=0.95),
    click.option("--max-tokens", type=click.IntRange(1), default=128),
    click.option("--stop", multiple=True, help="A text that ends the continuation; may be given several times."),
    click.option("--seed", type=int, help="Repeats a continuation."),
    drafts_option,
    fp8_cache_option,
    ema_option,
    device_option,
)
"""What `generate` and `chat` share: `opened` takes them."""


def opened(
    checkpoint: Path, ema: bool, device: str, num_speculative_tokens: int, fp8_cache: bool, **sampling: Any
) -> "tuple[LLM, SamplingParams]":
    """The model of a checkpoint, and how it continues."""
    from dsv3.inference.engine import EngineConfig
    from dsv3.inference.llm import LLM
    from dsv3.inference.params import SamplingParams

    params = SamplingParams(**sampling)
    config = EngineConfig(num_speculative_tokens=num_speculative_tokens, fp8_cache=fp8_cache)
    return LLM(checkpoint, device=device, ema=ema, config=config), params


def texts(llm: "LLM", prompt: "Prompt", params: "SamplingParams") -> Iterator[str]:
    """A continuation piece by piece; at its end, how many drafts of all so far were right goes to stderr."""
    for delta in llm.stream(prompt, params):
        yield delta.text
    if llm.config.num_speculative_tokens:
        stats = llm.engine.stats()
        share = stats.accepted_tokens / max(stats.draft_tokens, 1)
        positions = ", ".join(f"{each / max(stats.drafts, 1):.0%}" for each in stats.accepted_per_position)
        click.echo(
            f"\n{stats.accepted_tokens} of {stats.draft_tokens} drafts accepted ({share:.0%}; by position {positions})",
            err=True,
        )


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--prompt", required=True, help="The text to continue; \\n and \\t are read as in Python.")
@click.option("--suffix", help="What follows the gap: the model fills in the middle.")
@sampling_options
def generate(checkpoint: Path, prompt: str, suffix: str | None, **options: Any) -> None:
    """Streams a continuation of PROMPT by the model in CHECKPOINT: a run, a checkpoint or a Hugging Face directory."""
    from dsv3.data.fim import gap_prompt

    llm, params = opened(checkpoint, **options)
    prompt = unescape(prompt)
    ids: str | list[int] = prompt
    if suffix is not None:
        ids = gap_prompt(prompt, unescape(suffix), llm.tokenizer)
    click.echo(prompt, nl=False)
    for text in texts(llm, ids, params):
        click.echo(text, nl=False)
    click.echo(unescape(suffix) if suffix is not None else "")


def unescape(text: str) -> str:
    r"""`\n`, `\t` and `\\` as Python reads them, everything else as it is."""
    return re.sub(r"\\\\|\\n|\\t", lambda found: {"\\\\": "\\", "\\n": "\n", "\\t": "\t"}[found[0]], text)
