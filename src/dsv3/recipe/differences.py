"""In which keys two nested values differ: what a refusal to continue tells the user."""

from typing import Any


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """The dotted keys in which two JSON-like values differ, with both values; entries of equally long lists by number."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = (dict(zip(map(str, range(len(each))), each, strict=True)) for each in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        parts = sorted(old.keys() | new.keys())
        return [
            found for part in parts for found in differences(old.get(part), new.get(part), f"{key}.{part}".lstrip("."))
        ]
    return [] if old == new else [f"{key} was {old!r} and is {new!r}"]
