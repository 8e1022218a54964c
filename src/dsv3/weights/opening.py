"""Weights by their path, whatever is there: a training checkpoint, a run, or a directory of published files."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from dsv3.errors import UserError, nearest
from dsv3.model.config import ModelConfig
from dsv3.model.device import pick_device
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights import deepseek
from dsv3.weights.checkpoint import EMA, LATEST, MODEL, STATE, TOKENIZER, latest_checkpoint, read_state
from dsv3.weights.huggingface import open_directory
from dsv3.weights.loading import load
from dsv3.weights.released import FP8, Released, ReleasedCheckpoint, ReleasedFiles

log = logging.getLogger(__name__)
NAMED_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def open_weights(
    path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None, ema: bool = False
) -> tuple[Released, Path]:
    """The weights at a path, and the directory with their tokenizer; no tensor is read.

    A path is a training checkpoint, a run (its newest checkpoint is meant), a Hugging Face directory, or one in the layout
    of DeepSeek's `inference/`, for which `config` may name the ModelArgs file. With `ema`, the average of the weights that a checkpoint may hold is
    meant. Raises `UserError` when it is none of them.
    """
    path = Path(path)
    if ema and is_published(path):
        raise UserError(f"{path} holds published weights: only a training checkpoint has an average beside its weights")
    if deepseek.is_deepseek(path):
        arguments = Path(config) if config is not None else deepseek.find_config(path)
        return ReleasedFiles(path, deepseek.read_config(arguments), deepseek.read_headers(path)), path
    if config is not None:
        raise UserError(
            f"{path} is not in the layout of DeepSeek's inference/, for which alone a config is named apart"
        )
    if is_published(path):
        return open_directory(path), path
    directory, state = checkpoint_at(path)
    if "model" not in state:
        raise UserError(f"{directory / STATE} has no model config: expected one under 'model'")
    config_of_run = ModelConfig.from_hf(state["model"])
    return ReleasedCheckpoint(directory, config_of_run, EMA if ema else MODEL), directory / TOKENIZER


def load_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    ema: bool = False,
) -> tuple[DeepSeekV3, Path]:
    """The model at a path (see `open_weights`, also for `ema`), and the directory with its tokenizer.

    `dtype`: what weights become, "bf16" and "fp32" included; None or "auto": what they are, but BF16 for FP8 weights on
    the CPU. `device`: None is the CPU, a name as for `pick_device`. Raises `UserError` when there is no model, it is
    damaged, or the device is not here.
    """
    dtype = named_dtype(dtype) if isinstance(dtype, str) else dtype
    device = pick_device(device) if isinstance(device, str) else device
    source, tokenizer = open_weights(path, ema=ema)
    stored = {each.dtype for each in source.layout.values()}
    if dtype is None and FP8 in stored and (device is None or device.type == "cpu"):
        log.warning("%s is in FP8, which CPUs do not compute in: its weights become BF16", source.where)
        dtype = torch.bfloat16
    return load(source, dtype, device), tokenizer


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype that a user names; None for "auto"."""
    if name not in ("auto", *NAMED_DTYPES):
        raise UserError(f"unknown dtype {name!r}: {nearest(name, ('auto', *NAMED_DTYPES))}")
    return NAMED_DTYPES.get(name)


def is_published(path: Path) -> bool:
    """Whether a path is a directory of published weights, in Hugging Face's layout or DeepSeek's, and no checkpoint of ours."""
    return deepseek.is_deepseek(path) or ((path / "config.json").is_file() and not (path / STATE).is_file())


def checkpoint_at(path: Path) -> tuple[Path, dict[str, Any]]:
    """(the checkpoint meant by a path, its state); published weights are meant themselves, and have no state."""
    if is_published(path):
        return path, {}
    directory = find_checkpoint(path)
    return directory, read_state(directory)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest of the run there, of its last stage when it has several."""
    if (path / STATE).is_file():
        return path
    parents = [path, path / "checkpoints", *path.glob("*/checkpoints")]
    pointers = sorted(
        (p / LATEST for p in parents if (p / LATEST).is_file()), key=lambda pointer: pointer.stat().st_mtime
    )
    found = latest_checkpoint(pointers[-1].parent) if pointers else None
    if found is None:
        raise UserError(
            f"{path} holds no model: expected a checkpoint ({STATE} and tensors), a run with checkpoints/, "
            "or a Hugging Face directory (config.json and safetensors)"
        )
    return found
