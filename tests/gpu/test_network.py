"""The network on a GPU: the same losses, gradients and tokens as on the CPU, and BF16 within its rounding."""

import pytest
import torch

from dsv3.inference.engine import Engine, EngineConfig, continuations
from dsv3.inference.params import SamplingParams
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops import grouped_linear as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = ModelConfig.preset("tiny", n_group=4, topk_group=2)


@pytest.fixture
def model():
    model = DeepSeekV3(CONFIG).initialize("fan_in")
    for block in model.blocks():
        if block.moe is not None:
            block.moe.gate.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def gradients(model, tokens):
    losses = model.loss(tokens, mtp_weight=0.3, balance_alpha=1e-3)
    losses.total.backward()
    return losses, {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def test_losses_and_gradients_are_those_of_the_cpu(model):
    tokens = torch.randint(CONFIG.vocab_size, (2, 97), generator=torch.Generator().manual_seed(0))
    here, expected = gradients(model, tokens)
    model.zero_grad()
    there, found = gradients(model.cuda(), tokens.cuda())
    assert float(there.main) == pytest.approx(float(here.main), rel=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def decode(model, prompts, count):
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    engine = Engine(model, None, EngineConfig(cache_bytes=1 << 26))
    return [[*prompt, *more] for prompt, more in zip(prompts, continuations(engine, prompts, params), strict=True)]


@pytest.mark.parametrize("prompts", [[[3, 4, 5, 6, 7]], [[3, 4, 5, 6, 7], [9], [11, 12, 13]]], ids=["one", "three"])
def test_cached_decoding_is_the_full_forward_pass(model, prompts):
    model = model.cuda().eval()
    for tokens in decode(model, prompts, 24):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[:-1]], device="cuda")).logits[0]
        length = len(tokens) - 24
        assert logits.argmax(-1)[length - 1 :].tolist() == tokens[length:]


@pytest.mark.parametrize("prompts", [[[3, 4, 5]], [[3, 4, 5], [9], [11, 12]]], ids=["one", "three"])
def test_bf16_decodes_within_its_rounding(model, prompts):
    count, model = 40, model.cuda().eval()
    model.compute_dtype = torch.bfloat16
    decoded = decode(model, prompts, count)
    model.compute_dtype = None
    for prompt, tokens in zip(prompts, decoded, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[:-1]], device="cuda")).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(tokens[len(prompt) :], device="cuda").unsqueeze(1)).squeeze(1)
        # Logits have a deviation of about 1: what was chosen is nearly always the highest, or as good as that.
        below = logits.amax(1) - chosen
        assert below.median() == 0
        assert (below < 0.4).float().mean() > 0.9


@pytest.mark.parametrize("counts", [[5, 0, 130, 1], [1, 1, 1, 1], [0, 0, 7, 0]])
@pytest.mark.parametrize("repeated", [False, True], ids=["rows", "one row repeated"])
def test_grouped_mm_is_the_reference(counts, repeated):
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(1 if repeated else sum(counts), 64, device="cuda", generator=generator, dtype=torch.bfloat16)
    rows = rows.expand(sum(counts), -1)
    weight = torch.randn(4, 96, 64, device="cuda", generator=generator)
    counts = torch.tensor(counts, device="cuda")
    assert ops.fits_grouped_mm(rows, weight, counts) is None
    expected = ops.reference(rows.float(), weight.to(torch.bfloat16).float(), counts)
    found = ops.grouped_mm(rows, weight, counts).float()
    assert (found - expected).norm() <= 5e-3 * expected.norm()
