"""The layout of DeepSeek's own `inference/` code, in: one safetensors file a rank, as its `convert.py` writes them.

    model{rank}-mp{N}.safetensors   the part of every tensor that one of N ranks holds, under the names of `model.py`
    config.json                     the fields of `ModelArgs`; kept elsewhere by DeepSeek, so put there by hand

Matrices are cut along their outputs (or inputs, for those that follow the activation or the heads), experts are dealt out
whole, and everything else is in every file. MTP modules are left out.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.errors import UserError, nearest
from dsv3.model.config import ModelConfig, RopeScaling, read_object
from dsv3.weights.huggingface import QUANTIZATION
from dsv3.weights.safetensors import Stored, read_header

FILE = re.compile(r"model(0|[1-9]\d*)-mp([1-9]\d*)\.safetensors")
NAME = re.compile(
    r"""(embed | norm | head | layers\.\d+\.(
          attn_norm | ffn_norm | attn\.(wq | wq_a | q_norm | wq_b | wkv_a | kv_norm | wkv_b | wo)
        | ffn\.(gate | ((experts\.(?P<expert>\d+) | shared_experts)\.)?w[123])
        ))\.(weight | scale) | layers\.\d+\.ffn\.gate\.bias""",
    re.VERBOSE,
)
"""The names of tensors that `convert.py` writes."""
RELEASED = {
    "embed": "embed_tokens", "head": "lm_head", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn": "self_attn", "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj", "ffn": "mlp",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "scale": "weight_scale_inv", "bias": "e_score_correction_bias",
}  # fmt: skip
"""The released word for each of theirs that is another one."""
CUT = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
"""The dimension of a module's matrix that is cut among ranks; others are whole in every file."""
FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 102400), "dim": ("hidden_size", 2048), "inter_dim": ("intermediate_size", 10944),
    "moe_inter_dim": ("moe_intermediate_size", 1408), "n_layers": ("num_hidden_layers", 27),
    "n_dense_layers": ("first_k_dense_replace", 1), "n_heads": ("num_attention_heads", 16),
    "n_routed_experts": ("n_routed_experts", 64), "n_shared_experts": ("n_shared_experts", 2),
    "n_activated_experts": ("num_experts_per_tok", 6), "n_expert_groups": ("n_group", 1),
    "n_limited_groups": ("topk_group", 1), "route_scale": ("routed_scaling_factor", 1.0),
    "kv_lora_rank": ("kv_lora_rank", 512), "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "qk_rope_head_dim": ("qk_rope_head_dim", 64), "v_head_dim": ("v_head_dim", 128), "rope_theta": ("rope_theta", 10000.0),
}  # fmt: skip
"""Fields of `ModelArgs` that are one of ours under another name, and what an absent one means: DeepSeek-V2-Lite's value."""
ARGUMENTS: dict[str, Any] = {
    **{theirs: default for theirs, (_, default) in FIELDS.items()}, "max_batch_size": 8, "max_seq_len": 16384,
    "dtype": "bf16", "scale_fmt": None, "score_func": "softmax", "q_lora_rank": 0, "original_seq_len": 4096,
    "rope_factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
}  # fmt: skip
"""All fields of `ModelArgs` and their defaults."""


class Place(NamedTuple):
    """Where a tensor of a rank's file belongs."""

    name: str
    """The released name."""
    dimension: int | None
    """The one that is cut among ranks."""
    expert: bool
    """Whether it is a routed expert's, which one rank alone holds."""


def is_deepseek(directory: Path) -> bool:
    """Whether a directory holds files of this layout."""
    return any(FILE.fullmatch(file.name) for file in directory.glob("model*-mp*.safetensors"))


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory by its released name, in one piece or in one a rank; no tensor is read.

    A tensor that every rank holds whole is taken from the first. Raises `UserError` when a rank's file is missing or
    damaged, files of several N are mixed, a name is unknown, or the ranks do not fit together.
    """
    files = rank_files(directory)
    found: dict[Place, dict[int, Stored]] = {}
    for rank, file in enumerate(files):
        for theirs, stored in read_header(file).items():
            found.setdefault(place(theirs, file), {})[rank] = stored
    tensors = {at.name: whole(at, ranks, files) for at, ranks in found.items()}
    check_experts(files, found)
    return tensors


def rank_files(directory: Path) -> list[Path]:
    """The files of all ranks in order."""
    matches = [match for file in directory.glob("*.safetensors") if (match := FILE.fullmatch(file.name))]
    sizes = sorted({int(match[2]) for match in matches})
    if len(sizes) != 1:
        found = f"files of {' and '.join(map(str, sizes))} ranks" if sizes else "no model{rank}-mp{N}.safetensors"
        raise UserError(f"{directory} has {found}: expected those of one conversion, model0-mpN to model(N-1)-mpN")
    files = [directory / f"model{rank}-mp{sizes[0]}.safetensors" for rank in range(sizes[0])]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{directory} lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}: expected the files of all "
            f"{sizes[0]} ranks"
        )
    if beyond := sorted(match[0] for match in matches if int(match[1]) >= sizes[0]):
        raise UserError(f"{directory} has {beyond[0]}: expected ranks 0 to {sizes[0] - 1}")
    return files


def place(theirs: str, file: Path) -> Place:
    """The released name of a tensor, and how it is cut; `UserError` for a name that `convert.py` does not write."""
    known = NAME.fullmatch(theirs)
    if known is None:
        raise UserError(f"{file}: unknown tensor {theirs}: expected the names that DeepSeek's convert.py writes")
    words = theirs.split(".")
    name = ".".join(RELEASED.get(word, word) for word in words)
    return Place(name if words[0] == "head" else f"model.{name}", CUT.get(words[-2]), known["expert"] is not None)


def whole(at: Place, ranks: Mapping[int, Stored], files: list[Path]) -> Stored:
    """One tensor out of what the ranks hold of it."""
    rank, first = next(iter(ranks.items()))
    if at.expert:
        if len(ranks) > 1:
            raise UserError(
                f"{at.name} is in the files of ranks {', '.join(map(str, ranks))}: expected it in one of them"
            )
        return first
    for other, file in enumerate(files):
        if other not in ranks:
            raise UserError(f"{file} lacks {first.pieces[0].name} ({at.name}), which rank {rank} holds a part of")
        if (ranks[other].dtype, ranks[other].shape) != (first.dtype, first.shape):
            raise UserError(
                f"{file}: {first.pieces[0].name} is {ranks[other].dtype} {list(ranks[other].shape)}, but rank {rank} holds "
                f"{first.dtype} {list(first.shape)}: expected parts of one shape"
            )
    if at.dimension is None or len(files) == 1:
        return first
    if len(first.shape) != 2:
        raise UserError(
            f"{first.file}: {first.pieces[0].name} has shape {list(first.shape)}: expected a part of a matrix"
        )
    size = first.shape[at.dimension]
    shape = tuple(size * len(files) if d == at.dimension else length for d, length in enumerate(first.shape))
    pieces = []
    for other, stored in sorted(ranks.items()):
        part = slice(other * size, (other + 1) * size)
        pieces.append(replace(stored.pieces[0], index=(part,) if at.dimension == 0 else (slice(None), part)))
    return Stored(first.dtype, shape, tuple(pieces))


def check_experts(files: list[Path], found: Mapping[Place, Mapping[int, Stored]]) -> None:
    """Raises `UserError` unless every layer has experts 0, 1, ..., as many in each file."""
    layers: dict[str, dict[int, set[int]]] = {}
    for at, ranks in found.items():
        if at.expert:
            layer, _, rest = at.name.partition(".mlp.experts.")
            layers.setdefault(layer, {}).setdefault(int(rest.partition(".")[0]), set()).update(ranks)
    for layer, experts in layers.items():
        if absent := set(range(max(experts))) - experts.keys():
            raise UserError(f"{files[0].parent}: no file holds expert {min(absent)} of {layer}")
        held = [sum(rank in owners for owners in experts.values()) for rank in range(len(files))]
        if len(set(held)) > 1:
            raise UserError(
                f"{files[held.index(min(held))]} holds {min(held)} experts of {layer}, where {files[held.index(max(held))].name} "
                f"holds {max(held)}: expected as many in each"
            )


def find_config(directory: Path) -> Path:
    """The file of `ModelArgs` in a directory: `config.json`, or the one `config*.json` that holds them."""
    found = sorted(path for path in directory.glob("config*.json") if holds_arguments(path))
    named = [path for path in found if path.name == "config.json"]
    if len(named or found) != 1:
        names = (
            f"has {', '.join(path.name for path in found)}" if found else "has no config of DeepSeek's inference code"
        )
        raise UserError(
            f"{directory} {names}: expected one file with the fields of ModelArgs; copy the model's own there, "
            "such as inference/configs/config_671B.json, as config.json"
        )
    return (named or found)[0]


def holds_arguments(path: Path) -> bool:
    """Whether a file is an object with `dim`, which no Hugging Face config of this network has."""
    try:
        values = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(values, dict) and "dim" in values


def read_config(path: Path) -> ModelConfig:
    """The network that a file of `ModelArgs` means, without MTP; absent fields mean what they do in DeepSeek's code.

    RoPE is YaRN's wherever `max_seq_len` is above `original_seq_len`, as that code decides; `max_batch_size` and the rest
    of `max_seq_len` are its cache's sizes and mean nothing here. `dtype` and `scale_fmt` become the
    `quantization_config` of the published models. Raises `UserError` naming file and field for anything else.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected the fields of ModelArgs as JSON")
    given, _ = read_object(path)
    for key, value in given.items():
        check_argument(path, key, value)
    values = {**ARGUMENTS, **given}
    if values["score_func"] != "sigmoid":
        origin = "" if "score_func" in given else ", which is what an absent one means,"
        raise UserError(f"{path}: score_func = {values['score_func']!r}{origin} but this network has 'sigmoid'")
    long = values["max_seq_len"] > values["original_seq_len"]
    length = values["original_seq_len"]
    scaling = RopeScaling(
        factor=values["rope_factor"], original_max_position_embeddings=length, beta_fast=values["beta_fast"],
        beta_slow=values["beta_slow"], mscale=values["mscale"], mscale_all_dim=values["mscale"],
    )  # fmt: skip
    try:
        return ModelConfig(
            **{ours: values[theirs] for theirs, (ours, _) in FIELDS.items()},
            q_lora_rank=values["q_lora_rank"] or None,
            num_nextn_predict_layers=0,
            rope_scaling=scaling if long else None,
            max_position_embeddings=math.floor(length * values["rope_factor"]) if long else length,
            extra=storage(path, values),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_argument(path: Path, key: str, value: object) -> None:
    """Refuses one field that DeepSeek's code does not know, or a value of another kind than its default."""
    if key not in ARGUMENTS:
        raise UserError(f"{path}: unknown field {key!r}: {nearest(key, ARGUMENTS)}")
    default = ARGUMENTS[key]
    kind, expected = {int: (int, "a whole number"), float: (int | float, "a number")}.get(
        type(default), (str, "a text")
    )
    if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
        raise UserError(f"{path}: {key} = {value!r}: expected {expected}")


def storage(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """How weights are stored, in the fields of the published `config.json`."""
    if values["dtype"] not in ("bf16", "fp8"):
        raise UserError(f"{path}: dtype = {values['dtype']!r}: expected 'bf16' or 'fp8'")
    if values["scale_fmt"] not in (None, "ue8m0"):
        raise UserError(f"{path}: scale_fmt = {values['scale_fmt']!r}: expected 'ue8m0', or none")
    if values["dtype"] == "bf16":
        return {"torch_dtype": "bfloat16"}
    scales = {"scale_fmt": values["scale_fmt"]} if values["scale_fmt"] else {}
    return {"torch_dtype": "bfloat16", "quantization_config": {**QUANTIZATION, **scales}}
