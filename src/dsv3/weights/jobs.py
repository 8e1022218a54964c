"""Writing a large directory as jobs: several at a time, each leaving one file, and none done twice after a stop."""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsv3.disk import sha256, sync

T = TypeVar("T")
JOURNAL = ".journal"
Progress = Callable[[int, int], None]
"""Called with the bytes that are done, and the bytes in all."""


@dataclass(frozen=True)
class Job:
    """One file to be written."""

    file: str
    bytes: int
    """Of tensors in it, for the progress."""
    run: Callable[[Path, Callable[[int], None]], Any]
    """Writes the file at this path, reports bytes as they are written, and returns what the journal keeps (JSON-able)."""


class Journal:
    """Which files of a directory are complete, with their hashes; one line per file, synced before the next file begins.

    A directory of another `key`, or without a journal, is emptied.
    """

    def __init__(self, directory: Path, key: str):
        self.directory, self.path, self.lock = directory, directory / JOURNAL, threading.Lock()
        lines = read_lines(self.path)
        if not lines or lines[0] != {"key": key}:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            self.path.write_text(json.dumps({"key": key}) + "\n")
            lines = []
        self.kept = {line["file"]: line for line in lines[1:]}

    def done(self, file: str) -> bool:
        """Whether an earlier try completed the file, and it still is what was written: `kept[file]["result"]` is the job's."""
        path = self.directory / file
        return file in self.kept and path.is_file() and sha256(path) == self.kept[file]["sha256"]

    def add(self, file: str, result: Any) -> None:
        """Notes that a file is complete."""
        sync(self.directory / file)
        line = json.dumps({"file": file, "sha256": sha256(self.directory / file), "result": result}) + "\n"
        with self.lock:
            with self.path.open("a") as opened:
                opened.write(line)
            sync(self.path)

    def close(self) -> None:
        """Removes the journal, when the directory is whole."""
        self.path.unlink()


def read_lines(path: Path) -> list[Any]:
    """The journal's lines; the last one is left out where a stop cut it."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def run_jobs(jobs: Sequence[Job], journal: Journal, workers: int, progress: Progress) -> list[Any]:
    """What every job returned, in order; those that the journal knows are not run again. The first error stops the rest."""
    total, lock = sum(job.bytes for job in jobs), threading.Lock()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    def work(job: Job) -> Any:
        if journal.done(job.file):
            advance(job.bytes)
            return journal.kept[job.file]["result"]
        result = job.run(journal.directory / job.file, advance)
        journal.add(job.file, result)
        return result

    progress(0, total)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]


def grouped(sized: Iterable[tuple[T, int]], most: int) -> list[list[T]]:
    """Items, given with their bytes, in groups of at most `most` bytes, in order; a larger item gets a group of its own."""
    groups: list[list[T]] = [[]]
    size = 0
    for item, count in sized:
        if groups[-1] and size + count > most:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += count
    return groups
