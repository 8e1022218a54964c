import pytest
import torch

from dsv3.data.tokenizer import Tokenizer, train_tokenizer
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3

TEXTS = ["def add(first, second):\n    return first + second\n", "naïve café 😀 日本 こんにちは\n"]


def random_model(preset: str, **changes: object) -> DeepSeekV3:
    """Weights, gains and routing biases at random."""
    model = DeepSeekV3(ModelConfig.preset(preset, **changes)).initialize("fan_in", seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        for block in model.blocks():
            if block.moe is not None:
                block.moe.gate.e_score_correction_bias.normal_(std=0.2, generator=generator)
    return model


@pytest.fixture(scope="session")
def make_model():
    return random_model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 20, 320)


@pytest.fixture(scope="session")
def drafting_model() -> DeepSeekV3:
    """Two MTP modules whose drafts are often right: blocks add little, so that what follows depends on the last token most."""
    model = random_model("debug", num_nextn_predict_layers=2, max_position_embeddings=512)
    hidden = model.config.hidden_size
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
        for block in model.blocks():
            for name, parameter in block.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    parameter.mul_(0.15)
        for module in model.mtp:
            module.eh_proj.weight.zero_()[:, :hidden] = torch.eye(hidden)
            module.shared_head.norm.weight.copy_(model.norm.weight)
            module.enorm.weight.fill_(1.0)
    return model
