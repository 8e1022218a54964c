"""Our side of `make interop`: the network that is exported, and what we say it continues each prompt with."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3 import LLM, DeepSeekV3, SamplingParams, save_pretrained
from dsv3.cli.ui import Progress
from dsv3.data.tinypy import documents
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.block import Pass
from dsv3.model.rope import rotations
from dsv3.model.transformer import default_positions
from dsv3.recipe.schema import Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.pretrain import pretraining_stages
from dsv3.stages.runner import run_stages

RECIPE = Path(__file__).parents[2] / "recipes" / "interop" / "pretrain.toml"
PROMPT_TOKENS = (1, 5, 17, 64, 150, 330)
"""Lengths of the prompts: the shortest there is, YaRN's original length, and far beyond it."""
NEW_TOKENS = 64

LEFT_OUT: dict[str, dict[str, Any]] = {
    "YaRN": {"rope_scaling": None},
    "groups": {"n_group": 1, "topk_group": 1},
    "routed_scaling_factor": {"routed_scaling_factor": 1.0},
    "routing biases": {},
}
"""What an engine might miss, as changes of the config; biases are set to 0."""


@dataclass(frozen=True)
class Continuation:
    """The greedy continuation of one prompt: N new tokens."""

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor
    """FP32 [N, V]: of every token at every step, from a pass over the whole sequence without a cache."""
    drafts: list[int]
    """[N - 1]: what the MTP module expects in place of `tokens[1:]`, given all tokens before the last of them."""
    drafts_as_vllm: list[int]
    """The same where the module sees no embedding at its first position, which vLLM blanks."""


def train_and_export(out: Path) -> Path:
    """Trains the recipe in `out` unless that is done, and writes the Hugging Face directory, which is returned."""
    with Progress() as progress:
        stages = pretraining_stages(RunContext(Recipe.load(RECIPE), out, progress, progress.note))
        run_stages(stages, out, progress.note)
    trained, export = LLM(out, device="cpu"), out / "export"
    save_pretrained(trained.model, export)
    trained.tokenizer.save(export)
    return export


def make_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids: held-out documents one after the other, begun anew for each prompt and cut at its length."""
    texts = [text for _, text in islice(documents("validation", seed=0), 64)]
    ids = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    return [[token for each in ids[k:] for token in each][:length] for k, length in enumerate(PROMPT_TOKENS)]


def continue_all(llm: LLM, prompts: list[list[int]]) -> list[Continuation]:
    """Our engine's tokens, all prompts in one batch, with logprobs and drafts from a full pass over each sequence."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    found = llm.generate(prompts, params)
    return [examine(llm.model, prompt, each.outputs[0].token_ids) for prompt, each in zip(prompts, found, strict=True)]


@torch.inference_mode()
def examine(model: DeepSeekV3, prompt: list[int], tokens: list[int]) -> Continuation:
    """One continuation, as the network sees it all at once."""
    sequence = torch.tensor([[*prompt, *tokens]])
    hidden = model(sequence).hidden[:, :-1]
    logprobs = model.head(hidden[0, len(prompt) - 1 :]).log_softmax(-1)
    embeddings = model.embed(sequence[:, 1:])
    blanked = embeddings.clone()
    blanked[:, 0] = 0
    shared = Pass(rotations(model.config, default_positions(sequence[:, 1:])))
    drafts = [
        # At position i the module has seen token i + 1 and drafts token i + 2; the last draft has nothing to compare with.
        model.head(model.mtp[0](hidden, each, shared)[0])[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        for each in (embeddings, blanked)
    ]
    return Continuation(prompt, tokens, logprobs, *drafts)


def effects(model: DeepSeekV3, continuation: Continuation) -> dict[str, float]:
    """Nats by which a logprob moves at most when a part of the network is left out: what the comparison would show."""
    found = {}
    for name, changes in LEFT_OUT.items():
        reduced = DeepSeekV3(model.config.replace(**changes)).eval()
        reduced.load_state_dict(model.state_dict())
        if not changes:
            for moe in (block.moe for block in reduced.blocks() if block.moe is not None):
                moe.gate.e_score_correction_bias.zero_()
        without = examine(reduced, continuation.prompt, continuation.tokens).logprobs
        found[name] = float((without - continuation.logprobs).abs().max())
    return found


def describe(model: DeepSeekV3) -> dict[str, Any]:
    """What an engine has to get right of the network, with the routing biases as training left them."""
    config = model.config
    biases = torch.cat([block.moe.gate.e_score_correction_bias for block in model.blocks() if block.moe is not None])
    scaling = config.rope_scaling
    assert scaling is not None
    return {
        "layers": config.num_hidden_layers,
        "dense layers": config.num_dense_layers,
        "MTP modules": config.num_nextn_predict_layers,
        "hidden": config.hidden_size,
        "latent": f"{config.kv_lora_rank}+{config.qk_rope_head_dim}",
        "YaRN": f"{scaling.original_max_position_embeddings} x {scaling.factor:g}",
        "experts": f"{config.num_experts_per_tok} of {config.n_routed_experts}, {config.n_shared_experts} shared",
        "groups": f"{config.topk_group} of {config.n_group}",
        "routing biases": f"{float(biases.min()):.2f} to {float(biases.max()):.2f}",
        "dtype": "FP32",
        "prompts": " ".join(map(str, PROMPT_TOKENS)),
        "new tokens": NEW_TOKENS,
    }
