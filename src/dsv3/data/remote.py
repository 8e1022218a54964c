"""Files at URLs, through fsspec: `s3://`, `gs://`, `https://`, `memory://` and whatever else it has a package for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

import fsspec

from dsv3.errors import UserError


@dataclass(frozen=True)
class RemoteFile:
    """A file of a file system of fsspec."""

    filesystem: Any
    path: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.path).name

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Its bytes, fetched as they are read."""
        stream: BinaryIO = self.filesystem.open(self.path, mode)
        return stream

    def __str__(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.path))


def is_url(uri: str) -> bool:
    """Whether a source is at a URL: `SCHEME://...`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", uri) is not None


def remote_files(uri: str) -> Iterator[tuple[str, RemoteFile, int, str]]:
    """(name below the URL, file, bytes, stamp) of a file, or of those of a directory or glob, in the order of a local walk.

    Hidden files and directories are left out. Raises `UserError` for an unknown scheme, one whose package is missing,
    and when there is nothing.
    """
    scheme = uri.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        # fsspec says which package opens the scheme.
        raise UserError(f"{uri}: {scheme}:// needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"{uri}: fsspec does not know {scheme}://: {error}") from None
    if has_magic(path):
        root = path[: next(found.start() for found in re.finditer(r"[*?[]", path))].rpartition("/")[0]
        found = filesystem.glob(path, detail=True)
        order = None
    else:
        root = path.rpartition("/")[0] if filesystem.isfile(path) else path.rstrip("/")
        found = filesystem.find(path, detail=True)
        order = as_walked
    if not found:
        raise UserError(f"there is nothing at {uri}; expected a file, a directory or a glob")
    for name, about in ((name, found[name]) for name in sorted(found, key=order)):
        below = name.removeprefix(root).lstrip("/")
        if about["type"] == "file" and not any(part.startswith(".") for part in below.split("/")):
            stamps = (about.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "updated", "created"))
            stamp = next((str(each) for each in stamps if each is not None), "")
            yield below, RemoteFile(filesystem, name), int(about["size"] or 0), stamp


def as_walked(path: str) -> list[tuple[bool, str]]:
    """Sort key: a directory's files before its subdirectories, as `walk` yields them."""
    *directories, name = path.split("/")
    return [*((True, directory) for directory in directories), (False, name)]
