"""What the commands of `dsv3 bench` share."""

from pathlib import Path

import click

json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write everything measured to this file."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of both sides; what torch takes when not given."
)


def write_json(path: Path, content: object) -> None:
    """The file that was asked for, with its directory."""
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    click.echo(f"written: {path}")
