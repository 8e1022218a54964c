"""Python's own source as a corpus: the standard library's, and that of any package installed beside it."""

import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from dsv3.data.files import Document, walk
from dsv3.errors import UserError

STDLIB, PACKAGE = "builtin:stdlib", "package:"
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
"""Directories that are not worth reading."""
GENERATED = re.compile(r"(auto-?|automatically )generated|generated (by|from|and used by) |do not edit", re.IGNORECASE)


def is_library(uri: str) -> bool:
    """Whether a source is of this kind."""
    return uri == STDLIB or uri.startswith(PACKAGE)


def library_files(uri: str) -> tuple[Path, Iterator[Path]]:
    """(its directory, its files in sorted order). `UserError` for a package that is not installed, or has no files."""
    root = Path(sysconfig.get_path("stdlib")) if uri == STDLIB else package_root(uri.removeprefix(PACKAGE))
    return root, (path for path in walk(root, LEFT_OUT) if path.suffix == ".py")


def package_root(name: str) -> Path:
    """The directory of an installed package, which is not imported."""
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{PACKAGE}{name}: there is no package {name!r} installed here whose files could be read")
    return Path(found.submodule_search_locations[0])


def by_people(pieces: Iterable[Document]) -> list[Document]:
    """The pieces of a file, or none where its first five lines say that a program wrote it (`_sysconfigdata*`, the tables of
    `encodings`, `pydoc_data/topics.py`, `token.py` and others)."""
    found = list(pieces)
    return [] if found and GENERATED.search("\n".join(found[0].text[:2000].split("\n")[:5])) else found
