"""`dsv3 generate`: continue a prompt."""

import re
from pathlib import Path

import click


def sampling_options(command: click.decorators.FC) -> click.decorators.FC:
    """The options that `generate` and `chat` share."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto."),
        click.option("--ema", is_flag=True, help="With the average of the weights that the run kept."),
        click.option("--seed", type=int, help="Repeats a continuation."),
        click.option("--stop", multiple=True, help="A text that ends the continuation; may be given several times."),
        click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True),
        click.option("--top-p", type=float, default=0.95, show_default=True),
        click.option(
            "--temperature", type=float, default=0.7, show_default=True, help="0 takes the most likely token."
        ),
    ):
        command = option(command)
    return command


@click.command(short_help="Continue a prompt, or fill in the middle.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue; \\n and \\t are read as in Python.")
@click.option("--suffix", help="What follows the gap: the model fills in the middle.")
@sampling_options
def generate(
    checkpoint: Path, prompt: str, suffix: str | None, temperature: float, top_p: float, max_tokens: int,
    stop: tuple[str, ...], seed: int | None, ema: bool, device: str,
) -> None:  # fmt: skip
    """Streams a continuation of PROMPT by the model in CHECKPOINT: a run, a checkpoint or a Hugging Face directory."""
    from dsv3.data.fim import fim_prompt
    from dsv3.inference.llm import LLM
    from dsv3.inference.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop, seed=seed)
    llm = LLM(checkpoint, device=device, ema=ema)
    prompt = unescape(prompt)
    ids: str | list[int] = prompt
    if suffix is not None:
        encode = llm.tokenizer.encode
        ids = [llm.tokenizer.bos_id, *fim_prompt(encode(prompt), encode(unescape(suffix)), llm.tokenizer)]
    click.echo(prompt, nl=False)
    for text in llm.stream(ids, params):
        click.echo(text, nl=False)
    click.echo(unescape(suffix) if suffix is not None else "")


def unescape(text: str) -> str:
    r"""`\n`, `\t` and `\\` as Python reads them, everything else as it is."""
    return re.sub(r"\\\\|\\n|\\t", lambda found: {"\\\\": "\\", "\\n": "\n", "\\t": "\t"}[found[0]], text)
