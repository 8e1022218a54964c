"""Hugging Face directories of `deepseek_v3` models, in and out, MTP modules included."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.block_scaled import BLOCK
from dsv3.weights.loading import load
from dsv3.weights.released import FP8, Released, ReleasedFiles, ReleasedModel
from dsv3.weights.safetensors import DTYPES, read_headers
from dsv3.weights.safetensors_writer import write_shards

MAX_SHARD_BYTES = 5 * 10**9
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def open_directory(path: str | os.PathLike[str]) -> ReleasedFiles:
    """The weights of a Hugging Face directory. Raises `UserError` when there is none, or its files are damaged."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(
            f"{directory} is no directory: expected one with config.json and safetensors files. "
            "Names on a model hub are not fetched; download the files first"
        )
    return ReleasedFiles(directory, ModelConfig.from_hf(directory), read_headers(directory))


def from_pretrained(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> DeepSeekV3:
    """The model of a Hugging Face directory: `config.json` and safetensors in FP32, BF16 or FP8.

    `dtype` is what weights become (None: what they are in the file, FP8 included, which can compute and not be trained;
    the routing bias is FP32 always), `device` where they go (None: the CPU). Tensors are read one by one into the model's
    own, so that memory holds the model once. When none of the MTP modules that the config announces is in the files (as
    transformers saves them), the depth becomes 0.

    Raises `UserError` naming file and tensor when one is missing, unexpected, of another shape or dtype, or a file is
    truncated, absent or a pickle.
    """
    return load(open_directory(path), dtype, device)


def save_pretrained(model: DeepSeekV3, path: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `config.json` and safetensors that transformers, vLLM and SGLang load; weights keep their dtype.

    MTP modules are written as the released checkpoint has them, with their copies of embedding and head. Raises
    `UserError` for weights that are neither FP32, BF16 nor FP8, `RunError` when the disk is full; then nothing has changed.
    """
    source = ReleasedModel(model)
    write_shards(Path(path), source, {"config.json": as_json(config_of(source, model.config))}, max_shard_bytes)


def config_of(source: Released, config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of weights in their present dtype."""
    values = config.to_hf()
    quantization = values.pop("quantization_config", None)
    for spelling in ("dtype", "torch_dtype"):
        values.pop(spelling, None)
    if any(each.dtype == FP8 for each in source.layout.values()):
        values["quantization_config"] = quantization or QUANTIZATION
    # In FP8 directories as well, this is what the rest is in.
    values["torch_dtype"] = str(DTYPES[source.layout["lm_head.weight"].dtype]).removeprefix("torch.")
    return values


def as_json(values: dict[str, Any]) -> bytes:
    """The content of a file."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
