"""Safetensors files in Hugging Face's layout, written tensor by tensor, so that memory holds one at a time."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv3.disk import sync
from dsv3.errors import RunError
from dsv3.weights.jobs import Job, Journal, Progress, grouped, run_jobs
from dsv3.weights.released import Released
from dsv3.weights.safetensors import DTYPES, INDEX, SINGLE, read_header

PARTIAL = ".partial"


def write_shards(
    directory: Path,
    source: Released,
    files: Mapping[str, bytes],
    max_shard_bytes: int,
    resume: bool = False,
    workers: int = 1,
    progress: Progress = lambda *_: None,
) -> None:
    """Writes all tensors as `model.safetensors`, or as shards of at most `max_shard_bytes` with their index, and the files.

    Everything is written under `.partial` first and moved in when it is complete, files last; weights that were there are
    replaced, other files stay. When that fails, with `RunError` if the disk is full or cannot be written, what was there
    is unchanged. With `resume`, the shards that an earlier call completed are kept, and left for a later one.
    """
    shards = grouped(((name, each.bytes) for name, each in source.layout.items()), max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    if len(shards) > 1:
        placed = {each: file for file, shard in zip(names, shards, strict=True) for each in shard}
        index = {"metadata": {"total_size": sum(each.bytes for each in source.layout.values())}, "weight_map": placed}
        files = {INDEX: (json.dumps(index, indent=2) + "\n").encode(), **files}
    partial_directory = directory / PARTIAL
    try:
        if not resume:
            shutil.rmtree(partial_directory, ignore_errors=True)
        journal = Journal(partial_directory, f"{source.fingerprint} {max_shard_bytes}")
        jobs = [
            Job(
                file, sum(source.layout[name].bytes for name in shard), partial(write_shard, source=source, names=shard)
            )
            for file, shard in zip(names, shards, strict=True)
        ]
        run_jobs(jobs, journal, workers, progress)
        for file, content in files.items():
            (partial_directory / file).write_bytes(content)
            sync(partial_directory / file)
        for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
            old.unlink(missing_ok=True)
        for file in [*names, *files]:
            (partial_directory / file).rename(directory / file)
        journal.close()
        partial_directory.rmdir()
        sync(directory)
    except OSError as error:
        kept = f"; the same command keeps the shards that are complete in {partial_directory}" if resume else ""
        raise RunError(
            f"could not write {directory} ({error}): what was there is unchanged. Make room, or name another directory{kept}"
        ) from None
    finally:
        if not resume:
            shutil.rmtree(partial_directory, ignore_errors=True)


def write_shard(path: Path, advance: Callable[[int], None], source: Released, names: list[str]) -> None:
    """One file (format: 8 bytes of length, a header in JSON, values), then read back as far as its header goes.

    Wider dtypes lie in front, so that every value lies at a multiple of its size; they are asked for in the order of names.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(names, key=lambda name: -DTYPES[source.layout[name].dtype].itemsize):
        each = source.layout[name]
        entries[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [end, end + each.bytes]}
        end += each.bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            tensor, wanted = source.read(name), source.layout[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[wanted.dtype], wanted.shape), name
            file.seek(8 + len(header) + entries[name]["data_offsets"][0])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(wanted.bytes)
    if read_header(path).keys() != set(names):
        raise RunError(f"{path} does not hold what was written: is the disk damaged?")
