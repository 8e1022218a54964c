"""Training checkpoints: a directory of tensors, with everything else in `state.json` and files beside them.

    checkpoints/step-00000930/   .metadata, *.distcp (torch.distributed.checkpoint), state.json, sha256.json, tokenizer/...
    checkpoints/latest           the name of the newest one

A checkpoint is written under another name, synced to disk and renamed when it is complete; `latest` moves last. Whenever
the machine stops, a directory under a checkpoint's name is a complete one.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv3.disk import replace_file, sha256, sync
from dsv3.errors import RunError, UserError, nearest
from dsv3.weights.parts import Place, all_regions, undivided
from dsv3.weights.tensor_directory import ChunkReader, ChunkWriter

log = logging.getLogger(__name__)
STATE = "state.json"
CHECKSUMS = "sha256.json"
LATEST = "latest"
PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"
TOKENIZER = "tokenizer"
MODEL_GROUP, EMA_GROUP = "model", "ema"
"""Groups of a checkpoint's tensors: the model's, and the moving average of its weights."""
MODEL, EMA = f"{MODEL_GROUP}.", f"{EMA_GROUP}."
"""What the names in these groups begin with."""
NUMBERED = re.compile(r"[^.].*?(\d+)")


def save_checkpoint(
    directory: Path, tensors: Mapping[str, Any], state: Mapping[str, Any], files: Mapping[str, Path | bytes],
    places: Mapping[str, Place] | None = None, rank: int = 0, exchange: Callable[[Any], list[Any]] = lambda own: [own],
) -> None:  # fmt: skip
    """Writes a checkpoint, replacing one of the same name, and points `latest` to it.

    `tensors` is a dict of tensors, nested to any depth; `state` is what JSON can hold; `files` are contents, or directories to
    copy, by their name in the checkpoint. Raises `RunError` when it cannot be written; what was there stays.

    Ranks that share a file system call it together, each with its own tensors and, in `places`, where these lie in the full
    ones; `exchange` is an all-gather of objects, in the order of ranks. Where one rank fails, all raise `RunError`.
    """
    tensors = flatten(tensors)
    places = places or undivided(tensors)
    partial = directory.parent / PARTIAL
    own = all_regions(tensors, places)

    def together(work: Callable[[], Any]) -> list[Any]:
        """What `work` returned on every rank; raises what one of them failed with."""
        result: Any = None
        try:
            result = work()
        except (OSError, RunError) as error:
            result = error
        results = exchange(result)
        for each in results:
            if isinstance(each, OSError | RunError):
                raise each
        return results

    try:
        together(lambda: begin(partial) if rank == 0 else None)
        layouts = exchange(
            ({region.name: (values.dtype, places[region.name].shape) for region, values in own.items()}, list(own))
        )
        layout = {name: each for names, _ in layouts for name, each in names.items()}
        writer = ChunkWriter(partial, layout, [boxes for _, boxes in layouts])
        written = together(lambda: writer.write(rank, own.__getitem__) if own else [])

        def finish() -> None:
            writer.finish(written)
            commit(partial, directory, state, files)

        together(lambda: finish() if rank == 0 else None)
    except (OSError, RunError) as error:
        raise RunError(
            f"could not save the checkpoint {directory} ({error}). Earlier checkpoints are untouched; "
            "make room or choose another directory, then resume"
        ) from error
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def begin(partial: Path) -> None:
    """An empty directory to write into."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def commit(partial: Path, directory: Path, state: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> None:
    """Adds everything that is not a tensor, syncs it all to disk, and renames it into place."""
    for name, content in files.items():
        add_file(partial / name, content)
    (partial / STATE).write_text(json.dumps(state, indent=1))
    (partial / CHECKSUMS).write_text(json.dumps(checksums(partial), indent=1))
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    replace_directory(partial, directory)
    replace_file(directory.parent / LATEST, directory.name + "\n")
    sync(directory.parent)


def checksums(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, by its path within."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(directory).as_posix(): sha256(path) for path in files}


def check_content(directory: Path) -> None:
    """Raises `UserError` where a checkpoint's file is not what was written. Imported weights have no checksums to compare."""
    if not (directory / CHECKSUMS).is_file():
        return
    try:
        expected = json.loads((directory / CHECKSUMS).read_text())
    except ValueError as error:
        raise UserError(f"{directory / CHECKSUMS} is damaged: {error}") from None
    found = checksums(directory)
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise UserError(f"{directory / name} {'is not what was written' if name in found else 'is missing'}")


def add_file(path: Path, content: Path | bytes) -> None:
    """One file, or a directory with all it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copytree(content, path)


def replace_directory(new: Path, directory: Path) -> None:
    """Gives `new` the name `directory`. Directories cannot replace others, so one that has the name is moved aside first,
    and a stop right then leaves it aside, where `latest_checkpoint` finds it."""
    aside = new.with_name(REPLACED)
    if directory.exists():
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
    new.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)


def prune_checkpoints(parent: Path, keep_last: int, keep_every_steps: int | None = None) -> list[Path]:
    """Removes all checkpoints but the `keep_last` newest and those of every so many steps; returns what was removed.

    A directory counts by the number its name ends with; others are left alone, and so is the one that `latest` names. Each is
    renamed before it is removed: at no moment is a part of one found under its name. Raises `RunError` when that fails.
    """
    named = (parent / LATEST).read_text().strip()
    steps = {int(found[1]): path for path in parent.iterdir() if (found := NUMBERED.fullmatch(path.name))}
    kept = set(sorted(steps)[-keep_last:])
    kept |= {step for step in steps if keep_every_steps is not None and step % keep_every_steps == 0}
    old = [path for step, path in sorted(steps.items()) if step not in kept and path.name != named]
    try:
        shutil.rmtree(parent / REMOVED, ignore_errors=True)
        for path in old:
            path.rename(parent / REMOVED)
            shutil.rmtree(parent / REMOVED)
    except OSError as error:
        raise RunError(f"could not remove the old checkpoint {path} ({error}); newer ones are whole") from error
    return old


def load_checkpoint(
    directory: Path, tensors: Mapping[str, Any], leave: Sequence[str] = (), places: Mapping[str, Place] | None = None,
    elsewhere: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Fills the given tensors (as for `save_checkpoint`) in place and returns the state.

    With `places`, they are shards of what the checkpoint holds, however that was sharded when it was written. Tensors that
    other ranks hold (`elsewhere`), or whose names begin with one of `leave`, may be there and are not read. Raises
    `UserError` when the checkpoint is incomplete, or its other tensors have other names, shapes or dtypes than those given; then
    nothing was loaded.
    """
    state, reader, wanted = read_state(directory), ChunkReader(directory), flatten(tensors)
    places, found = places or undivided(wanted), reader.layout
    for name, tensor in wanted.items():
        if name not in found:
            raise UserError(
                f"{directory} has no tensor {name}: it is a checkpoint of another config. {nearest(name, found)}"
            )
        (dtype, shape), expected = found[name], places[name].shape
        if (dtype, shape) != (tensor.dtype, expected):
            raise UserError(
                f"{directory}: {name} is {dtype} {list(shape)}, expected {tensor.dtype} {list(expected)}: "
                "it is a checkpoint of another config"
            )
    known = {*wanted, *elsewhere}
    unexpected = [name for name in found if name not in known and not name.startswith(tuple(leave))]
    if unexpected:
        raise UserError(
            f"{directory} holds {len(unexpected)} tensors that this run has no place for ({', '.join(unexpected[:3])}): "
            "it is a checkpoint of another config"
        )
    reader.fill(wanted, places)
    return state


def latest_checkpoint(parent: Path, every_byte: bool = False) -> Path | None:
    """The checkpoint that `latest` names; where that one is broken, the newest whole one, with a warning. None: there is none.

    With `every_byte`, files are compared with the checksums that were written with them; else their names and sizes alone.
    """
    pointer = parent / LATEST
    named = [parent / pointer.read_text().strip()] if pointer.is_file() else []
    others = sorted((path.parent for path in parent.glob(f"[!.]*/{STATE}")), reverse=True)
    aside = [parent / REPLACED] if (parent / REPLACED).exists() else []
    for candidate in dict.fromkeys([*named, *others, *aside]):
        try:
            read_state(candidate)
            if every_byte:
                check_content(candidate)
            ChunkReader(candidate)
        except UserError as error:
            log.warning("%s is passed over: %s", candidate, error)
            continue
        if named and candidate != named[0]:
            log.warning("%s is used instead of %s", candidate, named[0])
        return candidate
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as state."""
    try:
        return json.loads((directory / STATE).read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} is no checkpoint: it has no {STATE}") from None
    except ValueError as error:
        raise UserError(f"{directory / STATE} is damaged: {error}") from None


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts to one, names joined by dots."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat
