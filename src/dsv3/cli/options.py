"""Options that several commands share, and values that are written in a form of their own."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from dsv3.errors import UserError, nearest

PATH = click.Path(path_type=Path)


class Parsed(click.ParamType):
    """A value in a form of its own, which `parse` reads; its `ValueError` says what it expected."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Raises `UserError` with the option as the user wrote it, and what was expected."""
        try:
            return self.parse(value)
        except ValueError as error:
            raise UserError(f"{param.opts[0] if param else self.name} {value!r}: {error}") from None


def whole_numbers(text: str, least: int = 1) -> list[int]:
    """`1,8` -> [1, 8]."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise ValueError(f"expected whole numbers from {least} on with commas between, such as 1,8")
    return [int(part) for part in parts]


def quantity(text: str) -> int:
    """`200K` -> 200000."""
    from dsv3.recipe.quantity import parse_quantity

    return parse_quantity(text)


def chosen_of(option: str, text: str, legal: Collection[str]) -> list[str]:
    """`a,b` -> ["a", "b"]; `UserError` for a name that is not legal, and for none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in legal:
            raise UserError(f"{option} {name!r}: {nearest(name, legal)}")
    return names


WHOLE_NUMBERS = Parsed("N,N", whole_numbers)
QUANTITY = Parsed("quantity", quantity)
device_option = click.option("--device", default="auto", help="cpu, cuda, cuda:1 or auto.")
ema_option = click.option("--ema", is_flag=True, help="With the average of the weights that the run kept.")
drafts_option = click.option("--num-speculative-tokens", type=click.IntRange(0, 8), default=0,
                             help="Drafts of the MTP modules a step; they change no token.")  # fmt: skip
fp8_cache_option = click.option("--fp8-cache", is_flag=True,
                                help="Latents in E4M3: 656 bytes a token and layer instead of 1152. For GPUs.")  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
json_file_option = click.option("--json", "json_path", type=PATH, help="Also write everything measured to this file.")


def at_option(what: str) -> Callable[[Any], Any]:
    """Token counts, as many as one likes."""
    return click.option("--at", type=QUANTITY, multiple=True, metavar="TOKENS", help=what)


def several(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Options that go together, as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def write_json(path: Path | None, content: object) -> None:
    """Writes the file that was asked for, if one was, and makes its directory."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    click.echo(f"written: {path}")
