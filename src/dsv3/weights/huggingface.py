"""Hugging Face directories of `deepseek_v3` models, in and out: FP32 and BF16, MTP modules included."""

import json
import logging
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsv3.errors import UserError, nearest
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.names import KEPT_FLOAT32, Part, is_mtp, released
from dsv3.weights.shards import DTYPES, Planned, Stored, read_headers, read_tensors, write_shards

log = logging.getLogger(__name__)
MAX_SHARD_BYTES = 5 * 10**9


def from_pretrained(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> DeepSeekV3:
    """The model of a Hugging Face directory: `config.json` and safetensors in FP32 or BF16.

    `dtype` is what weights become (None: what they are in the file; the routing bias is FP32 always), `device` where they
    go (None: the CPU). Tensors are read one by one into the model's own, so that memory holds the model once. When none
    of the MTP modules that the config announces is in the files (as transformers saves them), the depth becomes 0.

    Raises `UserError` naming file and tensor when one is missing, unexpected, of another shape or dtype, or a file is
    truncated, absent or a pickle.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(
            f"{directory} is no directory: expected one with config.json and safetensors files. "
            "Names on a model hub are not fetched; download the files first"
        )
    config = ModelConfig.from_hf(directory)
    stored = read_headers(directory)
    refuse_fp8(directory, config, stored)
    if config.num_nextn_predict_layers and not any(is_mtp(name, config) for name in stored):
        log.warning(
            "%s announces %d MTP modules and holds none of their tensors: loading without MTP",
            directory,
            config.num_nextn_predict_layers,
        )
        config = config.replace(num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    places = {
        part.name: (ours, part)
        for ours, tensor in model.state_dict().items()
        for part in released(ours, tuple(tensor.shape), config)
    }
    check(directory, places, stored)
    model.load_state_dict(read(model, places, stored, dtype, device), assign=True)
    return model


def refuse_fp8(directory: Path, config: ModelConfig, stored: dict[str, Stored]) -> None:
    """Quantised weights would be read as numbers that they are not."""
    quantised = next((name for name, each in stored.items() if each.dtype.startswith("F8")), None)
    if quantised or config.extra.get("quantization_config"):
        found = (
            f"tensor {quantised} is {stored[quantised].dtype}" if quantised else "config.json has quantization_config"
        )
        raise UserError(
            f"{directory} holds FP8 weights ({found}), which are not read yet: expected FP32 or BF16; "
            "the published fp8_cast_bf16.py converts them"
        )


def check(directory: Path, places: dict[str, tuple[str, Part]], stored: dict[str, Stored]) -> None:
    """Refuses what does not fit the config, before any tensor is read."""
    missing = [name for name, (_, part) in places.items() if name not in stored and not part.copy]
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of the {len(places)} tensors that its config.json asks for: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Was a shard left out, or is the config another model's?"
        )
    for name, each in stored.items():
        if name not in places:
            raise UserError(
                f"{each.file}: unexpected tensor {name} of shape {list(each.shape)}, which its config.json has no place for; "
                f"{nearest(name, places) if len(places) < 1000 else 'expected those of a deepseek_v3 model'}"
            )
        expected = places[name][1].shape
        if each.shape != expected:
            raise UserError(
                f"{each.file}: tensor {name} has shape {list(each.shape)}, but its config.json asks for {list(expected)}"
            )
        if each.dtype not in DTYPES:
            raise UserError(f"{each.file}: tensor {name} is {each.dtype}, expected {' or '.join(DTYPES)}")


def read(
    model: DeepSeekV3,
    places: dict[str, tuple[str, Part]],
    stored: dict[str, Stored],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """The model's state dict, filled from the files; every tensor of a stack must have the same dtype."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    filled: dict[str, Tensor] = {}
    wanted = {name: each for name, each in stored.items() if not places[name][1].copy}
    for name, tensor in read_tensors(wanted):
        ours, part = places[name]
        if ours not in filled:
            kept = torch.float32 if ours.endswith(KEPT_FLOAT32) else dtype or tensor.dtype
            filled[ours] = torch.empty(shapes[ours], dtype=kept, device=device or "cpu")
        elif dtype is None and tensor.dtype != filled[ours].dtype:
            raise UserError(
                f"{stored[name].file}: tensor {name} is {tensor.dtype}, but others of {ours} are {filled[ours].dtype}; "
                "name the dtype that they should become"
            )
        filled[ours][part.index].copy_(tensor)
    for name, tensor in read_tensors({name: each for name, each in stored.items() if places[name][1].copy}):
        original = places[name][0]
        if not torch.equal(tensor.to(filled[original]), filled[original]):
            log.warning("%s: %s differs from %s, which is used instead", stored[name].file, name, original)
    return filled


def save_pretrained(model: DeepSeekV3, path: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `config.json` and safetensors that transformers, vLLM and SGLang load; weights keep their dtype.

    MTP modules are written as the released checkpoint has them, with their copies of embedding and head. Raises
    `UserError` for weights that are neither FP32 nor BF16, `RunError` when the disk is full; then nothing has changed.
    """
    planned = []
    for ours, tensor in model.state_dict().items():
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{ours} is {tensor.dtype}: expected torch.float32 or torch.bfloat16")
        for part in released(ours, tuple(tensor.shape), model.config):
            view = tensor[part.index]
            # Two names for one storage are refused by the format's writer.
            load = partial(view.to, "cpu", copy=True) if part.copy else partial(view.to, "cpu")
            planned.append(Planned(part.name, view.nbytes, load))
    config = model.config.to_hf()
    config.pop("quantization_config", None)
    config.pop("dtype", None)
    config["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write_shards(Path(path), planned, {"config.json": json.dumps(config, indent=2) + "\n"}, max_shard_bytes)
