"""Python's own source as a corpus: the standard library's, and that of any package installed beside it."""

import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from dsv3.data.files import Document, SkipReport, read, walk
from dsv3.errors import UserError

STDLIB, PACKAGE = "builtin:stdlib", "package:"
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
"""Directories without what is worth reading."""
GENERATED = re.compile(r"(auto-?|automatically )generated|generated (by|from|and used by) |do not edit", re.IGNORECASE)


def is_library(uri: str) -> bool:
    """Whether a source is of this kind."""
    return uri == STDLIB or uri.startswith(PACKAGE)


def library_files(uri: str) -> tuple[Path, Iterator[Path]]:
    """(where it lies, its files in sorted order). `UserError` for a package that is not installed, or is not of files."""
    root = Path(sysconfig.get_path("stdlib")) if uri == STDLIB else package_root(uri.removeprefix(PACKAGE))
    return root, (path for path in walk(root, LEFT_OUT) if path.suffix == ".py")


def package_root(name: str) -> Path:
    """The directory of an installed package, which is not imported."""
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{PACKAGE}{name}: there is no package {name!r} installed here whose files could be read")
    return Path(found.submodule_search_locations[0])


def library_reader(uri: str) -> Callable[[SkipReport], Iterator[Document]]:
    """What reads all its documents, as often as it is called: `.py` files, ids relative to where it lies.

    Of the standard library about 9 MB of code and its prose. Left out are the directories of `LEFT_OUT`, and every file that
    a program wrote, by one rule: it says so within its first five lines (`_sysconfigdata*`, the tables of `encodings`,
    `pydoc_data/topics.py`, `token.py` and others).
    """
    library_files(uri)

    def every(report: SkipReport) -> Iterator[Document]:
        root, paths = library_files(uri)
        for path in paths:
            pieces = list(read(path, path.relative_to(root).as_posix(), report))
            if pieces and not GENERATED.search("\n".join(pieces[0].text[:2000].split("\n")[:5])):
                yield from pieces

    return every
