"""Published files into checkpoints, and checkpoints into published files: streamed, several files at a time, resumable.

Files are written tensor by tensor: memory holds one tensor for each of them that is being written, never the model.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.disk import sync
from dsv3.errors import RunError, UserError
from dsv3.model.config import ModelConfig
from dsv3.weights.checkpoint import MODEL, STATE, TOKENIZER
from dsv3.weights.fit import checked
from dsv3.weights.huggingface import MAX_SHARD_BYTES, as_json, config_of
from dsv3.weights.jobs import Job, Journal, Progress, grouped, run_jobs
from dsv3.weights.loading import compare_copies, dtype_of, skeleton_for
from dsv3.weights.names import released
from dsv3.weights.opening import open_weights
from dsv3.weights.parts import Region
from dsv3.weights.released import Converted, Released
from dsv3.weights.safetensors import Layout
from dsv3.weights.safetensors_writer import write_shards
from dsv3.weights.tensor_directory import ChunkWriter

FILE_BYTES = 512 * 10**6
"""In one file of an imported checkpoint: what has to be written again after a stop."""
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "tiktoken.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Files that go with weights from directory to directory. Python files do not: they would be run by others."""


@dataclass(frozen=True)
class ImportPlan:
    """What an import will do."""

    stored: Mapping[str, Layout]
    """As it is read."""
    source: Released
    """As it will be written: in the dtype asked for."""
    config: ModelConfig
    tokenizer: Path
    names: Mapping[Region, str]
    """Which of the source's tensors each region of the checkpoint is."""
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Of the checkpoint's tensors."""
    files: list[list[Region]]
    """What each file of the checkpoint will hold."""

    def bytes_of(self, regions: Iterable[Region]) -> int:
        """Of the tensors there."""
        return sum(self.source.layout[self.names[region]].bytes for region in regions)

    def write(self, writer: ChunkWriter, number: int, path: Path, advance: Callable[[int], None]) -> Any:
        """Writes one of the files; a `Job`'s work."""

        def read(region: Region) -> Tensor:
            advance(self.bytes_of([region]))
            return self.source.read(self.names[region]).to(self.layout[region.name][0]).view(region.size)

        return writer.write(number, read)


def plan_import(path: Path, dtype: torch.dtype | None = None, config: Path | None = None) -> ImportPlan:
    """Everything that can be known before a tensor is read; `UserError` when the weights at `path` cannot be imported.

    `dtype` is what weights become; None: what they are, FP8 included. See `open_weights` for `path` and `config`.
    """
    source, tokenizer = open_weights(path, config)
    fitting = checked(source)
    stored, source = source.layout, converted(source, dtype)
    names, layout = {}, {}
    for ours, tensor in skeleton_for(source, fitting).state_dict().items():
        layout[MODEL + ours] = dtype_of(ours, tensor, source, fitting), tuple(tensor.shape)
        for part in released(ours, tuple(tensor.shape), fitting):
            if not part.copy:
                names[Region(MODEL + ours, part.start, part.size)] = part.name
    order = {name: i for i, name in enumerate(source.layout)}
    # In the order in which tensors are stored, so that a file is read once.
    ordered = sorted(names, key=lambda region: order[names[region]])
    files = grouped(((region, source.layout[names[region]].bytes) for region in ordered), FILE_BYTES)
    return ImportPlan(stored, source, fitting, tokenizer, names, layout, files)


def import_weights(plan: ImportPlan, directory: Path, workers: int = 2, progress: Progress = lambda *_: None) -> None:
    """Writes a checkpoint without training state: tensors, config and tokenizer.

    It is written as `<directory>.partial` and renamed when it is whole; after a stop, the same call goes on with the files
    that are complete. Raises `UserError` when the directory exists, `RunError` when it cannot be written.
    """
    if directory.exists():
        raise UserError(f"{directory} exists: name a directory that does not, or remove it")
    unfinished = directory.with_name(directory.name + ".partial")
    try:
        journal = Journal(unfinished, plan.source.fingerprint)
        writer = ChunkWriter(unfinished, plan.layout, plan.files)
        jobs = [
            Job(writer.file(i), plan.bytes_of(regions), partial(plan.write, writer, i))
            for i, regions in enumerate(plan.files)
        ]
        writer.finish(run_jobs(jobs, journal, workers, progress))
        (unfinished / TOKENIZER).mkdir(exist_ok=True)
        for name, content in companions(plan.tokenizer).items():
            (unfinished / TOKENIZER / name).write_bytes(content)
        (unfinished / STATE).write_text(json.dumps({"model": config_of(plan.source, plan.config)}, indent=1))
        journal.close()
        for path in [*unfinished.rglob("*"), unfinished]:
            sync(path)
        unfinished.rename(directory)
        sync(directory.parent)
    except OSError as error:
        raise RunError(
            f"could not write {directory} ({error}). Make room and repeat the command, which keeps the files that are "
            f"complete in {unfinished}; or name another directory"
        ) from None
    compare_copies(plan.source, plan.config)


def export_weights(
    path: Path,
    directory: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = 2,
    progress: Progress = lambda *_: None,
    ema: bool = False,
) -> None:
    """Writes a Hugging Face directory of the weights at `path` (see `open_weights`, also for `ema`): what transformers, vLLM and SGLang load.

    `dtype` is what weights become; None: what they are; E4M3: what the released FP8 checkpoints have in FP8, with scales
    that are powers of two where the config asks for `ue8m0`. Other files of the directory stay. After a stop, the same
    call goes on with the shards that are complete. Raises `UserError` as `checked` does, `RunError` when the disk is full.
    """
    source, tokenizer = open_weights(path, ema=ema)
    if directory.resolve() in (path.resolve(), Path(source.where).resolve()):
        raise UserError(f"{directory} is where the weights are read from: name another directory")
    config = checked(source)
    source = converted(source, dtype)
    # What transformers and servers take as the first and the last token of a text.
    ends = {"_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    files = {"generation_config.json": as_json(ends), **companions(tokenizer)}
    files["config.json"] = as_json(config_of(source, config))
    write_shards(directory, source, files, max_shard_bytes, resume=True, workers=workers, progress=progress)


def converted(source: Released, dtype: torch.dtype | None) -> Released:
    """The weights in a dtype; None: as they are."""
    quantization = source.config.extra.get("quantization_config") or {}
    return source if dtype is None else Converted(source, dtype, quantization.get("scale_fmt") == "ue8m0")


def companions(directory: Path) -> dict[str, bytes]:
    """The files that go with the weights."""
    return {name: (directory / name).read_bytes() for name in COMPANIONS if (directory / name).is_file()}
