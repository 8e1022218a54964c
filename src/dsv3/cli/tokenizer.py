"""`dsv3 tokenizer train`: byte-level BPE on the user's own texts."""

from pathlib import Path

import click

from dsv3.cli.options import PATH, QUANTITY
from dsv3.errors import UserError


@click.group()
def tokenizer() -> None:
    """Byte-level BPE with DeepSeek-V3's pre-tokenizer."""


@tokenizer.command()
@click.argument("corpora", nargs=-1, required=True, metavar="CORPUS...")
@click.option("--out", type=PATH, required=True, help="The directory to write.")
@click.option("--vocab-size", type=click.IntRange(1), default=32_768, help="Ids, special tokens included.")
@click.option("--digits", type=click.IntRange(1, 3), default=3, help="Most digits that one token joins.")
@click.option("--training-bytes", type=QUANTITY, default="100M", help="Text to learn from, the same of each corpus.")
def train(corpora: tuple[str, ...], out: Path, vocab_size: int, digits: int, training_bytes: int) -> None:
    """Trains a tokenizer on an even sample of each CORPUS: a file, a directory, a glob, a URL, hf:NAME or a builtin.

    A recipe uses it with tokenizer.path=OUT.
    """
    from dsv3.data.sources import VALIDATION_FRACTION, to_learn_from
    from dsv3.data.tokenizer import train_tokenizer

    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} holds a tokenizer already; name another directory with --out")
    share = training_bytes // len(corpora)
    texts = [text for uri in corpora for text in to_learn_from(uri, 0, VALIDATION_FRACTION, share)]
    made = train_tokenizer(texts, vocab_size, digits)
    made.save(out)
    size, tokens = sum(len(text.encode()) for text in texts), sum(map(len, made.encode_batch(texts)))
    click.echo(f"{made.vocab_size:,} entries from {size / 1e6:.1f} MB of text, {size / tokens:.2f} bytes a token")
    click.echo(f"The tokenizer is in {out}; a recipe uses it with tokenizer.path={out}")
