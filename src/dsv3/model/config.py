"""The shape of the network: a frozen dataclass with the field names of the released `config.json`.

This file imports no torch, so that planning and the command line answer at once.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsv3.errors import UserError, nearest


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (Peng et al. 2023, section 3) as DeepSeek-V3 uses it; `rope_scaling` of `config.json`.

    The frequencies and the logit factor depend on `factor` alone and stay the same at every length.
    """

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "rope_scaling.")

    @property
    def logit_factor(self) -> float:
        """What the attention logits are multiplied by, RoPE part and the rest alike: mscale squared."""
        return self.magnitude(self.mscale_all_dim) ** 2

    @property
    def rotation_factor(self) -> float:
        """What cos and sin are multiplied by: 1 for the released models, whose two mscales are equal."""
        return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)

    def magnitude(self, mscale: float) -> float:
        """`0.1 mscale ln(factor) + 1` (report, section 4.3)."""
        return 1.0 if self.factor <= 1 or mscale == 0 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """One DeepSeek-V3 network. Sizes are counts of elements; every field has its Hugging Face name and meaning.

    `q_lora_rank = None` projects queries directly; `num_nextn_predict_layers` is the MTP depth D, any number from 0 up.
    Raises `UserError` naming the field when values contradict each other.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    bos_token_id: int = 0
    eos_token_id: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Fields of a `config.json` that change nothing here; written back by `to_hf`."""

    def __post_init__(self) -> None:
        check_numbers(self)
        per_group = self.n_routed_experts // self.n_group
        most = self.topk_group * per_group
        rules = [
            ("norm_topk_prob", isinstance(self.norm_topk_prob, bool), "true or false"),
            ("q_lora_rank", self.q_lora_rank is None or is_count(self.q_lora_rank, 1), "None or a whole number above 0"),
            ("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "an even number (RoPE turns pairs)"),
            ("n_group", self.n_routed_experts % self.n_group == 0, f"a divisor of n_routed_experts = {self.n_routed_experts}"),
            ("topk_group", self.topk_group <= self.n_group, f"at most n_group = {self.n_group}"),
            ("num_experts_per_tok", self.num_experts_per_tok <= most, f"at most topk_group x experts a group = {most}"),
            ("n_group", self.n_group == 1 or per_group >= 2, "1, or groups of at least 2 experts (a group is ranked by its top 2)"),
        ]  # fmt: skip
        for name, holds, expected in rules:
            require(holds, name, getattr(self, name), expected)

    @property
    def qk_head_dim(self) -> int:
        """Elements of one head's query and key: the content part and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What `q . k` is multiplied by: `qk_head_dim ** -0.5`, times mscale squared under YaRN."""
        return self.qk_head_dim**-0.5 * (self.rope_scaling.logit_factor if self.rope_scaling else 1.0)

    @property
    def num_dense_layers(self) -> int:
        """Blocks of the main model whose feed-forward is dense."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ModelConfig":
        """A named shape with some fields replaced; `UserError` for an unknown preset or field."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}: {nearest(name, PRESETS)}")
        known = {f.name for f in fields(cls)}
        for key in overrides:
            if key not in known:
                raise UserError(f"unknown model field {key!r}: {nearest(key, known)}")
        if isinstance(scaling := overrides.get("rope_scaling"), Mapping):
            legal = {f.name for f in fields(RopeScaling)}
            for key in scaling.keys() - legal - {"type"}:
                raise UserError(f"unknown model field 'rope_scaling.{key}': {nearest(key, legal)}")
            overrides["rope_scaling"] = read_rope_scaling(scaling)
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_hf(cls, source: "str | Path | Mapping[str, Any]") -> "ModelConfig":
        """Reads a `config.json`: its path, the directory that holds it, or its content. Both RoPE spellings are read.

        Fields that mean nothing here are kept in `extra`. Raises `UserError` naming the file, the field, what it is and
        what was expected, for another network, a missing field, a wrong type, or fields that contradict each other.
        """
        values, where = (dict(source), "config") if isinstance(source, Mapping) else read_object(source)
        try:
            refuse_other_networks(values)
            scaling = rope_of(values)
            theta = scaling.pop("rope_theta", HF_DEFAULTS["rope_theta"])
            known = {f.name for f in fields(cls)} - {"extra"}
            chosen = {name: values[name] for name in known & values.keys()}
            # Absent, this one means 0 in the released modelling code: cos and sin are scaled in place of the logits.
            chosen["rope_scaling"] = read_rope_scaling({"mscale_all_dim": 0.0, **scaling})
            extra = {key: value for key, value in values.items() if key not in known and key not in WRITTEN}
            config = cls(**{**HF_DEFAULTS, **chosen, "rope_theta": theta}, extra=extra)
            expect(values, "qk_head_dim", config.qk_head_dim, "qk_nope_head_dim + qk_rope_head_dim")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return config

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` in the published form, which transformers, vLLM and SGLang read."""
        values = {key: value for key, value in asdict(self).items() if key not in ("extra", "rope_scaling")}
        scaling = {"type": "yarn", **asdict(self.rope_scaling)} if self.rope_scaling else None
        head = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
        rest = {
            "num_key_value_heads": self.num_attention_heads,
            "rope_scaling": scaling,
            **{key: legal[0] for key, legal in FIXED.items()},
        }
        return {**self.extra, **head, **values, **rest}

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def check_numbers(config: "ModelConfig | RopeScaling", prefix: str = "") -> None:
    """Refuses what is no number, or too small, in the `int` and `float` fields; `prefix` goes before their names."""
    for each in fields(config):
        value, zero = getattr(config, each.name), each.name in MAY_BE_ZERO
        bound = ", 0 or more" if zero else " above 0"
        if each.type is int:
            require(is_count(value, 0 if zero else 1), prefix + each.name, value, f"a whole number{bound}")
        elif each.type is float:
            fits = is_number(value) and (value > 0 or (zero and value == 0))
            require(fits, prefix + each.name, value, f"a number{bound}")


def is_count(value: object, least: int) -> bool:
    """Whether a field is a whole number, `least` or more; True and 3.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require(holds: bool, name: str, found: object, expected: str) -> None:
    """Refuses one field of a config."""
    if not holds:
        raise UserError(f"model.{name} = {found!r}: expected {expected}")


def is_number(value: object) -> bool:
    """Whether a field is a finite number; True is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_object(source: "str | Path") -> tuple[dict[str, Any], str]:
    """The content of a `config.json`, or of the one in a directory, and its path for messages."""
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a Hugging Face config.json or its directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object of fields and values")
    return values, str(path)


def refuse_other_networks(values: Mapping[str, Any]) -> None:
    """Refuses the content of a `config.json` that means a network this one cannot be, or lacks what tells."""
    expect(values, "model_type", "deepseek_v3")
    names = values.get("architectures") or []
    if not isinstance(names, list) or not all(str(name).startswith("DeepseekV3") for name in names):
        raise UserError(f"architectures = {names!r}, but this network is ['DeepseekV3ForCausalLM']")
    for key, legal in FIXED.items():
        if key in values and values[key] not in legal:
            raise UserError(f"{key} = {values[key]!r}, but this network has {' or '.join(map(repr, legal))}")
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise UserError(f"it lacks {', '.join(missing)}")
    expect(values, "num_key_value_heads", values["num_attention_heads"], "MLA has one per attention head")


def expect(values: Mapping[str, Any], key: str, expected: object, why: str = "") -> None:
    """Refuses a field that has, where it is given, any other value than the one that follows from the rest."""
    if values.get(key) not in (None, expected):
        raise UserError(f"{key} = {values[key]!r}, expected {expected!r}{f' ({why})' if why else ''}")


def rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_theta`, `rope_scaling` (older) and `rope_parameters` (newer spelling) say together."""
    said: dict[str, tuple[str, Any]] = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        content = values.get(spelling) or {}
        if not isinstance(content, Mapping):
            raise UserError(f"{spelling} = {content!r}, expected an object of fields and values, or null")
        for key, value in content.items():
            agree(said, "type" if key == "rope_type" else key, f"{spelling}.{key}", value)
    agree(said, "rope_theta", "rope_theta", values.get("rope_theta"))
    for key, (name, value) in said.items():
        if key in ROPE_FIXED and value != ROPE_FIXED[key]:
            raise UserError(f"{name} = {value!r}, but this network has {ROPE_FIXED[key]!r}")
        if key not in ROPE_FIXED and key not in ROPE_KEYS:
            raise UserError(f"unknown field {name!r}: {nearest(key, ROPE_KEYS)}")
    return {key: value for key, (_, value) in said.items() if key in ROPE_KEYS}


def agree(said: dict[str, tuple[str, Any]], key: str, name: str, value: object) -> None:
    """Notes what one more field says of a key; null says nothing."""
    if value is None:
        return
    other, found = said.setdefault(key, (name, value))
    if found != value:
        raise UserError(f"{name} = {value!r}, but {other} = {found!r}: expected the same in both")


def read_rope_scaling(values: Mapping[str, Any] | None) -> RopeScaling | None:
    """`rope_scaling` of a config by its older names; None when plain RoPE is meant."""
    values = dict(values or {})
    kind = values.pop("type", None) or ("yarn" if "factor" in values else "default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(f"rope_scaling type {kind!r}: expected 'yarn' or none")
    known = {f.name for f in fields(RopeScaling)}
    return RopeScaling(**{key: value for key, value in values.items() if key in known and value is not None})


MAY_BE_ZERO = {
    "num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts", "bos_token_id", "eos_token_id", "mscale",
    "mscale_all_dim",
}  # fmt: skip
"""Number fields that need not be above 0."""

FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "attention_bias": (False,),
    "attention_dropout": (0.0, 0),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}
"""Fields of `config.json` that have one legal value here, the first of each being what `to_hf` writes."""

ROPE_KEYS = {"type", "rope_theta", *(f.name for f in fields(RopeScaling))}
ROPE_FIXED: dict[str, object] = {"truncate": True, "partial_rotary_factor": 1.0, "attention_factor": None}
"""Fields of `rope_parameters` that other networks use, and the value that changes nothing."""

WRITTEN = {
    *FIXED, "architectures", "model_type", "num_key_value_heads", "rope_scaling", "rope_parameters", "qk_head_dim", "head_dim",
}  # fmt: skip
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok",
)  # fmt: skip
HF_DEFAULTS: dict[str, Any] = {
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": None,
    "rope_theta": 10000.0,
}
"""What an absent field of a `config.json` means, where that differs from the `deepseek-v3` preset."""

PRESETS: dict[str, dict[str, Any]] = {
    # The report, section 4.2, and the released config.json.
    "deepseek-v3": {},
    # The shape of Moonlight-16B-A3B: the architecture at the size that fits 8 GPUs.
    "lite": dict(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408, num_hidden_layers=27,
        num_nextn_predict_layers=0, first_k_dense_replace=1, num_attention_heads=16, q_lora_rank=None, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, routed_scaling_factor=2.446,
        max_position_embeddings=8192, rope_theta=50000.0,
    ),
    # About 100M active parameters, every part of V3: what one GPU trains in minutes.
    "small": dict(
        vocab_size=16384, hidden_size=768, intermediate_size=2048, moe_intermediate_size=384, num_hidden_layers=12,
        first_k_dense_replace=1, num_attention_heads=12, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4,
        max_position_embeddings=2048,
    ),
    # What two CPU cores train in five minutes. Query and value heads are equally long: unequal ones are slow on CPU.
    "tiny": dict(
        vocab_size=2048, hidden_size=128, intermediate_size=384, moe_intermediate_size=128, num_hidden_layers=4,
        first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
        routed_scaling_factor=1.0, max_position_embeddings=512,
    ),
    # For tests: milliseconds a step, with groups, a dense block, MTP and unequal head sizes.
    "debug": dict(
        vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        max_position_embeddings=128,
    ),
}  # fmt: skip
