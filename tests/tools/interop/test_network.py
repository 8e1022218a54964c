import pytest
import torch

from dsv3 import DeepSeekV3, ModelConfig
from dsv3.data.tokenizer import train_tokenizer
from dsv3.model.block import Pass
from dsv3.model.config import RopeScaling
from dsv3.model.rope import rotations
from dsv3.recipe.schema import Recipe
from tools.interop.network import LEFT_OUT, PROMPT_TOKENS, RECIPE, describe, effects, examine, make_prompts

CONFIG = ModelConfig.preset(
    "debug", rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=8), routed_scaling_factor=2.5
)


@pytest.fixture(scope="module")
def model():
    model = DeepSeekV3(CONFIG).initialize(0.2, seed=1).eval()
    for block in model.blocks():
        if block.moe is not None:
            block.moe.gate.e_score_correction_bias.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(2))
    return model


@torch.inference_mode()
def step_by_step(model, prompt, tokens, blank):
    """Logprobs and drafts, each from a pass over what is known at its step and no more."""
    logprobs, drafts = [], []
    for n in range(len(tokens)):
        known = torch.tensor([[*prompt, *tokens[:n]]])
        logprobs.append(model(known).logits[0, -1].log_softmax(-1))
        if n == 0:
            continue
        # Hidden states of all but the newest token, each beside the embedding of the token after it.
        hidden, embeddings = model(known[:, :-1]).hidden, model.embed(known[:, 1:])
        if blank:
            embeddings = embeddings * (torch.arange(embeddings.shape[1]) > 0)[:, None]
        shared = Pass(rotations(model.config, torch.arange(embeddings.shape[1])[None]))
        drafts.append(int(model.head(model.mtp[0](hidden, embeddings, shared)[0])[0, -1].argmax()))
    return torch.stack(logprobs), drafts


@pytest.mark.parametrize("length", [1, 2, 9])
def test_one_pass_gives_what_step_by_step_decoding_sees(model, length):
    random = torch.Generator().manual_seed(length)
    prompt, tokens = torch.randint(0, CONFIG.vocab_size, (length + 12,), generator=random).split([length, 12])
    found = examine(model, prompt.tolist(), tokens.tolist())
    logprobs, drafts = step_by_step(model, prompt.tolist(), tokens.tolist(), blank=False)
    _, blanked = step_by_step(model, prompt.tolist(), tokens.tolist(), blank=True)
    torch.testing.assert_close(found.logprobs, logprobs, atol=1e-5, rtol=0)
    assert found.drafts == drafts
    assert found.drafts_as_vllm == blanked
    assert length > 1 or drafts != blanked


def test_each_part_has_an_effect_and_the_model_stays_as_it_was(model):
    prompt, tokens = list(range(20)), list(range(40, 60))
    before = examine(model, prompt, tokens)
    moved = effects(model, before)
    assert moved.keys() == LEFT_OUT.keys()
    assert min(moved.values()) > 0.01
    assert torch.equal(examine(model, prompt, tokens).logprobs, before.logprobs)


def test_prompts_have_their_lengths_and_differ():
    tokenizer = train_tokenizer(["def f(xs):\n    return xs\n"], 300)
    prompts = make_prompts(tokenizer)
    assert tuple(map(len, prompts)) == PROMPT_TOKENS
    assert all(prompt[0] == tokenizer.bos_id for prompt in prompts)
    assert prompts[5][:150] != prompts[4]


def test_the_recipe_makes_what_vllm_serves_on_a_cpu_with_all_that_it_could_get_wrong():
    config = Recipe.load(RECIPE).model.config()
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
    assert config.rope_scaling is not None
    assert config.num_nextn_predict_layers == 1
    assert config.n_group > config.topk_group > 1
    assert config.n_shared_experts > 0
    assert config.routed_scaling_factor != 1
    assert 0 < config.num_dense_layers < config.num_hidden_layers
    assert config.rope_scaling.original_max_position_embeddings < max(PROMPT_TOKENS) < config.max_position_embeddings


def test_the_description_tells_of_the_biases(model):
    low, _, high = describe(model)["routing biases"].split()
    assert float(low) < 0 < float(high)
