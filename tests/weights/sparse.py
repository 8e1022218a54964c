"""Directories of sparse safetensors files: real headers, and holes where the data would be."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from dsv3.model.config import ModelConfig
from dsv3.ops.block_scaled import scale_shape
from dsv3.weights.names import KEPT_FLOAT32, SCALE, is_block_scaled
from dsv3.weights.released import places_of, skeleton
from dsv3.weights.safetensors import Layout

BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def write_sparse(directory: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[Path]:
    """Writes shards of at most `shard_bytes` of data (one tensor at least), and their index; every element reads as zero.

    `tensors` are (dtype, shape) by name, the dtype as safetensors headers spell it. The sizes of the files are those of
    real ones, but they take a few MB of the disk for hundreds of GB. Returns the shards.
    """
    shards: list[dict[str, dict[str, object]]] = [{}]
    end = total = 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * math.prod(shape)
        if shards[-1] and end + size > shard_bytes:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
        total += size
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(file, shard)
    placed = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def write_file(file: Path, entries: Mapping[str, Mapping[str, object]]) -> None:
    """One file: the header's length, the header, and a hole."""
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    data = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + data)


def published(config: ModelConfig) -> dict[str, Layout]:
    """Every tensor of a released FP8 checkpoint of this config, as DeepSeek published its own (README_WEIGHTS)."""
    found: dict[str, Layout] = {}
    for name, (_, part) in places_of(skeleton(config)).items():
        dtype = "F8_E4M3" if is_block_scaled(name) else "F32" if name.endswith(KEPT_FLOAT32) else "BF16"
        found[name] = Layout(dtype, part.shape)
        if dtype == "F8_E4M3":
            found[name + SCALE] = Layout("F32", scale_shape(part.shape))
    return found
