"""The DeepSeek-V3 system: model, training, weights and inference. Names are loaded on first use, so importing is instant."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dsv3.inference.llm import LLM
    from dsv3.inference.params import SamplingParams
    from dsv3.model.config import ModelConfig
    from dsv3.model.transformer import DeepSeekV3
    from dsv3.weights.huggingface import from_pretrained, save_pretrained

HOMES = {
    "LLM": "dsv3.inference.llm",
    "SamplingParams": "dsv3.inference.params",
    "ModelConfig": "dsv3.model.config",
    "DeepSeekV3": "dsv3.model.transformer",
    "from_pretrained": "dsv3.weights.huggingface",
    "save_pretrained": "dsv3.weights.huggingface",
}
__all__ = ["LLM", "DeepSeekV3", "ModelConfig", "SamplingParams", "from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
