"""Options that several commands share, and values that are written in a form of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dsv3.errors import UserError

PATH = click.Path(path_type=Path)


class WholeNumbers(click.ParamType):
    """`1,8` -> [1, 8]."""

    name = "N,N"

    def __init__(self, least: int = 1):
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Raises `UserError` for anything but whole numbers with commas between."""
        parts = value.split(",")
        if not all(part.strip().isdecimal() and int(part) >= self.least for part in parts):
            raise UserError(
                f"{name_of(param)} {value!r}: expected whole numbers from {self.least} on with commas between, such as 1,8"
            )
        return [int(part) for part in parts]


class Quantity(click.ParamType):
    """`200K` -> 200000."""

    name = "quantity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises `UserError` for what is no count."""
        from dsv3.recipe.quantity import parse_quantity

        try:
            return parse_quantity(value)
        except ValueError as error:
            raise UserError(f"{name_of(param)} {value!r}: {error}") from None


def name_of(param: click.Parameter | None) -> str:
    """The option as the user wrote it."""
    return param.opts[0] if param else ""


device_option = click.option("--device", default="auto", help="cpu, cuda, cuda:1 or auto.")
ema_option = click.option("--ema", is_flag=True, help="With the average of the weights that the run kept.")
drafts_option = click.option("--num-speculative-tokens", type=click.IntRange(0, 8), default=0,
                             help="Drafts of the MTP modules a step; they change no token.")  # fmt: skip
fp8_cache_option = click.option("--fp8-cache", is_flag=True,
                                help="Latents in E4M3: 656 bytes a token and layer instead of 1152. For GPUs.")  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
json_file_option = click.option("--json", "json_path", type=PATH, help="Also write everything measured to this file.")


def several(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Options that go together, as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def write_json(path: Path, content: object) -> None:
    """The file that was asked for, with its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    click.echo(f"written: {path}")
