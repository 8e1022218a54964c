"""From a TOML file and `key=value` overrides to a `Recipe`, and from whatever is wrong with them to one paragraph."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from dsv3.errors import UserError, nearest
from dsv3.recipe.schema import Recipe
from dsv3.recipe.section import Section

Key = tuple[str | int, ...]
MOVED = {"initializer_range": "initialization"}
"""Keys of a `config.json` that have another name in a recipe."""
UNION_TAGS = ("number", "segments")
HEADER = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.-]+)\s*\]\]?")
ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*=")
LEADING_KEY = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a TOML file; `UserError` as in `Recipe.load`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        near = recipes_near(path)
        hint = nearest(str(path), near) if near else "expected a .toml file"
        raise UserError(f"there is no recipe {path}: {hint}") from None
    except IsADirectoryError:
        inside = ", ".join(str(found) for found in sorted(path.rglob("*.toml"))) or "a .toml file"
        raise UserError(f"{path} is a directory: expected a recipe, such as {inside}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): expected TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    return read_recipe(values, overrides, str(path), find_lines(text))


def recipes_near(path: Path) -> list[str]:
    """The recipes beside the place where `path` should have been, as the user would write them."""
    home = path.parent
    found = list(home.glob("*.toml")) or list(home.parent.glob("*/*.toml"))
    return sorted(str(recipe) for recipe in found)


def read_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), file: str = "", lines: Mapping[Key, int] | None = None
) -> Recipe:
    """Validates nested mappings after applying overrides; `file` and `lines` say where each key was written."""
    changed = deepcopy(dict(values))
    places: dict[Key, str] = {key: f"{file}:{line}" for key, line in (lines or {}).items()}
    for override in overrides:
        places[apply_override(changed, override)] = f"override {override}"
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        raise UserError(explain(error, places, file)) from None


def apply_override(values: dict[str, Any], override: str) -> Key:
    """Sets one dotted key and returns it. A number between dots counts the entries of a list, from 0."""
    dotted, separator, written = override.partition("=")
    parts = dotted.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"override {override!r}: expected KEY=VALUE, such as optimizer.weight_decay=0.05")
    key: list[str | int] = []
    place: Any = values
    for depth, part in enumerate(parts):
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise UserError(
                    f"override {override!r}: {'.'.join(parts[:depth])} has the entries 0 to {len(place) - 1}"
                )
            key.append(int(part))
        elif isinstance(place, dict):
            key.append(part)
        else:
            raise UserError(f"override {override!r}: {'.'.join(parts[:depth])} is {place!r}, which has no parts")
        if depth < len(parts) - 1:
            place = place.setdefault(part, {}) if isinstance(place, dict) else place[key[-1]]
    place[key[-1]] = parse_value(written.strip())
    return tuple(key)


def parse_value(written: str) -> Any:
    """A TOML value, or the text itself where it is none, so that strings need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {written}")
    except tomllib.TOMLDecodeError:
        return written
    return parsed["value"] if len(parsed) == 1 else written


def find_lines(text: str) -> dict[Key, int]:
    """The line, from 1, on which each table and each bare key of a TOML text is written."""
    lines: dict[Key, int] = {}
    table: Key = ()
    entries: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := HEADER.match(line):
            table = tuple(header[2].split("."))
            if header[1] == "[[":
                entries[header[2]] = entries.get(header[2], -1) + 1
                lines.setdefault(table, number)
                table = (*table, entries[header[2]])
            lines[table] = number
        elif assignment := ASSIGNMENT.match(line):
            lines[(*table, *assignment[1].split("."))] = number
    return lines


def explain(error: ValidationError, places: Mapping[Key, str], file: str) -> str:
    """One paragraph for what pydantic found: unknown keys first, because they often cause the rest."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    key: Key = tuple(part for part in problem["loc"] if part not in UNION_TAGS)
    kind, found, dotted = problem["type"], problem["input"], ".".join(map(str, key))
    message = str(problem["ctx"]["error"]) if kind == "value_error" else problem["msg"]
    if kind == "extra_forbidden":
        text = f"unknown key {dotted}: {nearest_key(key)}"
    elif kind == "missing":
        text = f"{dotted} is missing: expected {purpose(key)}"
    elif kind == "model_type":
        text = f"{dotted} = {found!r}: expected a table"
    elif not key:
        text = message
        if named := LEADING_KEY.match(message):
            key = tuple(int(part) if part.isdigit() else part for part in named[0].split("."))
    elif found and isinstance(found, dict | list | tuple | Section):
        text = f"{dotted}: {expectation(message)}"
    else:
        text = f"{dotted} = {found!r}: {expectation(message)}"
    more = f" ({len(problems) - 1} more such problem{'s' * (len(problems) > 2)})" if len(problems) > 1 else ""
    where = place_of(key, places) or file
    return f"{where}: {text}{more}" if where else f"{text}{more}"


def place_of(key: Key, places: Mapping[Key, str]) -> str:
    """Where the key was written, or the nearest table around it."""
    while key:
        if key in places:
            return places[key]
        key = key[:-1]
    return ""


def expectation(message: str) -> str:
    """pydantic's sentence in our form: what was expected."""
    head, separator, tail = message.partition(" should ")
    if not separator:
        return message
    if head != "Input":
        return f"expected it to {tail}"
    tail = tail.removeprefix("be ")
    return f"expected a number {tail}" if tail.startswith(("greater", "less")) else f"expected {tail}"


def fields_of(section: type[Section]) -> dict[str, Any]:
    """The fields of a section under the names that a recipe uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, optional, or several in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def section_at(key: Key) -> type[Section]:
    """The innermost section that `key` leads into."""
    section: type[Section] = Recipe
    for part in key:
        field = fields_of(section).get(str(part))
        section = section_in(field.annotation) or section if field else section
    return section


def nearest_key(key: Key) -> str:
    """What an unknown key may have been meant for: a name close to it in its section, or its name in another one."""
    name, section = str(key[-1]), section_at(key[:-1])
    others = [
        f"{home}.{leaf}"
        for home, field in fields_of(Recipe).items()
        for leaf in fields_of(section_in(field.annotation) or Recipe)
        if leaf in (name, MOVED.get(name))
    ]
    return f"did you mean {' or '.join(map(repr, others))}?" if others else nearest(name, fields_of(section))


def purpose(key: Key) -> str:
    """The first sentence of a field's documentation."""
    field = fields_of(section_at(key[:-1])).get(str(key[-1]))
    described = (field.description or "") if field else ""
    section = section_in(field.annotation) if field else None
    if not described and section:
        return f"a section with {', '.join(name for name, part in fields_of(section).items() if part.is_required())}"
    return re.split(r"[.;(]", described)[0].strip().lower() or "a value"
