"""The named peer of the benchmarks: DeepSeek-V3 as `transformers` has it, with our weights, in each of its own settings."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.huggingface import save_pretrained


@dataclass(frozen=True)
class Setting:
    """How `transformers` is asked to compute; the values are its own."""

    dtype: torch.dtype
    """BF16 means BF16 weights in decoding, and in training, where weights are in FP32, autocast."""
    attention: str
    experts: str

    @property
    def name(self) -> str:
        """As tables show it."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"transformers {dtype}, {self.attention}, {self.experts}"


def import_transformers() -> Any:
    """The library; `UserError` where it is not installed."""
    try:
        return import_module("transformers")
    except ImportError:
        raise UserError(
            "the benchmarks compare with transformers, which is not installed: pip install 'dsv3[test]'"
        ) from None


def with_our_weights(model: DeepSeekV3, settings: Sequence[Setting], dtype: torch.dtype | None = None) -> list[Any]:
    """`DeepseekV3ForCausalLM` once for each setting, with weights in `dtype` (None: the setting's)."""
    library = import_transformers()
    shown = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model, directory)
        peers = [
            library.DeepseekV3ForCausalLM.from_pretrained(
                directory,
                dtype=dtype or each.dtype,
                attn_implementation=each.attention,
                experts_implementation=each.experts,
            )
            for each in settings
        ]
    if shown:
        library.utils.logging.enable_progress_bar()
    return peers


def training_loss(peer: Any, setting: Setting, tokens: Tensor) -> Tensor:
    """Cross-entropy of rows of T + 1 tokens [B, T + 1], ready for backward."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    mixed = setting.dtype == torch.bfloat16 and next(peer.parameters()).dtype == torch.float32
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=mixed):
        loss: Tensor = peer(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
    return loss


@torch.inference_mode()
def continuation(peer: Any, prompts: Tensor, count: int) -> Tensor:
    """The `count` most likely tokens after each prompt [B, T], one by one through its cache: [B, count]."""
    peer.generation_config.eos_token_id = None
    out: Tensor = peer.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return out[:, prompts.shape[1] :]
