"""Slices of a network for measuring: a few full-width layers with random weights, stored in FP8 as the released ones are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv3.bench.kernels.products import values
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Experts
from dsv3.model.linear import Linear
from dsv3.model.transformer import DeepSeekV3

DEVIATION = 120
"""Standard deviation of the E4M3 values that `values` makes."""
DEPTHS = ((1, 4), (1, 2), (2, 2))
"""(dense, MoE) layers of the networks whose differences give the time of a layer; the first is the one that is shown."""


class Layers(NamedTuple):
    """Milliseconds of one dense layer, of one MoE layer, and of all that is in neither."""

    dense: float
    moe: float
    rest: float

    @classmethod
    def of(cls, times: Sequence[float], depths: Sequence[tuple[int, int]] = DEPTHS) -> "Layers":
        """From what the networks of these depths take."""
        moe = (times[0] - times[1]) / (depths[0][1] - depths[1][1])
        dense = times[2] - times[1]
        return cls(dense, moe, times[0] - depths[0][0] * dense - depths[0][1] * moe)

    def whole(self, config: ModelConfig) -> float:
        """Of a network with all its layers."""
        dense = config.num_dense_layers
        return dense * self.dense + (config.num_hidden_layers - dense) * self.moe + self.rest


def of_depth(config: ModelConfig, dense: int, moe: int, mtp: bool = False) -> ModelConfig:
    """The network with so many layers."""
    return config.replace(num_hidden_layers=dense + moe, first_k_dense_replace=dense, num_nextn_predict_layers=int(mtp))


def randomize(model: DeepSeekV3, std: float) -> None:
    """Normal weights, made on the model's device; gains become 1 and routing biases 0."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std) if parameter.dim() > 1 else nn.init.ones_(parameter)
    for block in model.blocks():
        if block.moe is not None:
            block.moe.gate.e_score_correction_bias.zero_()


def stored_network(config: ModelConfig, device: torch.device) -> DeepSeekV3:
    """Linear layers of attention, feed-forward and experts in FP8, the rest in BF16; weights have a standard deviation of 1 / sqrt(inputs).

    Values are made in FP8 expert by expert: memory never holds more than one of them in BF16.
    """
    with torch.device("meta"):
        model = DeepSeekV3(config).to(torch.bfloat16)
        stored = {each for block in model.blocks() for each in block.modules() if isinstance(each, Linear | Experts)}
        for module in stored:
            module.keep_in_fp8()
        for block in model.blocks():
            if block.moe is not None:
                block.moe.gate.e_score_correction_bias = block.moe.gate.e_score_correction_bias.float()
    model = model.to_empty(device=device).eval()
    for name, tensor in model.state_dict().items():
        fill(name, tensor)
    return model


def fill(name: str, tensor: Tensor) -> None:
    """Random values, in place; scales give a weight the standard deviation 1 / sqrt(inputs)."""
    if tensor.dtype == torch.float8_e4m3fn:
        for matrix in tensor if tensor.dim() == 3 else [tensor]:
            matrix.copy_(values(matrix.device, *matrix.shape))
    elif name.endswith("_scale_inv"):
        # The last block of a row may be smaller, which does not matter here.
        tensor.fill_((tensor.shape[-1] * 128) ** -0.5 / DEVIATION)
    elif name.endswith("e_score_correction_bias"):
        tensor.zero_()
    elif tensor.dim() == 1:
        tensor.fill_(1.0)
    else:
        tensor.normal_(0.0, 1.0 if name.startswith("embed") else tensor.shape[-1] ** -0.5)


def layers_of(model: DeepSeekV3, dense: int, moe: int) -> DeepSeekV3:
    """A network of so many of a model's dense and MoE layers, over the same weights."""
    first = model.config.num_dense_layers
    chosen: Sequence[nn.Module] = [*model.layers[:dense], *model.layers[first : first + moe]]
    with torch.device("meta"):
        part = DeepSeekV3(of_depth(model.config, dense, moe))
    part.embed_tokens, part.norm, part.lm_head = model.embed_tokens, model.norm, model.lm_head
    part.layers = nn.ModuleList(chosen)  # type: ignore[assignment]
    return part.eval()
