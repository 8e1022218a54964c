"""Training tokens a second of a model that one GPU holds, beside `transformers` (`dsv3 bench train --lite`).

Moonlight's shape cut to a few layers, live router, text of the standard library: 4 micro-batches of 2 x 4,096 tokens and an
AdamW update with FP32 moments a step. The sides follow one another, since memory holds one at a time.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv3.bench.measure import Progress, Result, Row, Spread, ratio, take_turns
from dsv3.bench.peers import Setting as PeerSetting
from dsv3.bench.peers import training_loss, with_our_weights
from dsv3.bench.train import check
from dsv3.data.loader import Loader
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.model.micro_batch import default_positions
from dsv3.model.transformer import DeepSeekV3
from dsv3.planning.flops import training_flops_per_token
from dsv3.recipe.schema import Recipe
from dsv3.stages.data import data_stages, open_sets
from dsv3.stages.machine import machine
from dsv3.stages.runner import run_stages
from dsv3.training.gradients import Inputs, Passes, Setting, passes
from dsv3.training.replay import Replay

LAYERS, VOCABULARY = 6, 32_768
MICRO_BATCHES, BATCH, LENGTH = 4, 2, 4096
Work = Callable[[Tensor], object]
"""Passes of one micro-batch [B, T + 1]."""
OURS = {"dsv3 bf16": 1.4, "dsv3 fp8": 1.6}
"""Times faster than the peer's best that each is to be."""
THEIRS = {
    "transformers, autocast": (PeerSetting(torch.bfloat16, "sdpa", "grouped_mm"), torch.float32),
    "transformers, bf16 weights": (PeerSetting(torch.bfloat16, "sdpa", "grouped_mm"), torch.bfloat16),
}
"""(how it is asked to compute, what its weights are in)."""


def bench_lite(rounds: int = 3, progress: Progress = lambda **_: None, config: ModelConfig | None = None) -> Result:
    """On the current GPU; `config` stands for another network, which a CPU trains as well.

    Raises `UserError` without a GPU, `RunError` when the sides' losses of one micro-batch differ.
    """
    if config is None and not torch.cuda.is_available():
        raise UserError("dsv3 bench train --lite measures a GPU, and found none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config or ModelConfig.preset(
        "lite", num_hidden_layers=LAYERS, vocab_size=VOCABULARY, num_nextn_predict_layers=0
    )
    batches = text(config, progress).to(device)
    model = DeepSeekV3(config, torch.bfloat16).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    for block in model.blocks():
        if block.moe is not None:
            block.moe.gate.e_score_correction_bias.zero_()
    start = {name: each.cpu() for name, each in model.state_dict().items()}
    seconds: dict[str, list[float]] = {}
    first: dict[str, float] = {}

    def measure(name: str, peer: nn.Module, loss: Callable[[Tensor], Tensor], passes: Work) -> None:
        first[name] = float(loss(batches[0]).detach())
        peer.zero_grad()
        seconds.update(take_turns({name: stepper(peer, passes, batches, name in OURS)}, rounds, progress, name))

    for name, (setting, dtype) in THEIRS.items():
        (peer,) = with_our_weights(model, [setting], dtype)
        loss = partial(training_loss, peer, setting)
        measure(name, peer.to(device).train(), loss, partial(backward, loss))
        del peer, loss
        clear()
    for name in OURS:
        model.load_state_dict(start)
        if name.endswith("fp8"):
            model.compute_in_fp8()
        # Recorded, as the trainer does it on a GPU.
        run = partial(recorded, model, Replay() if device == "cuda" else passes)
        measure(name, model, lambda tokens: model.loss(tokens, divisor=BATCH * LENGTH).total, run)
        clear()
    check({"dsv3 fp32": first["transformers, autocast"], **first})
    tokens, flops = batches[0, :, :-1].numel() * MICRO_BATCHES, training_flops_per_token(config, batches.shape[2] - 1)
    rows = []
    for name, each in seconds.items():
        speed = Spread.of([tokens / turn for turn in each])
        rows.append(
            Row(name, "", speed, {"ms a step": 1000 * statistics.median(each), "TFLOP/s": flops * speed.median / 1e12})
        )
    ratios = [ratio("against its best", seconds, name, list(THEIRS), target) for name, target in OURS.items()]
    shapes = {"layers": config.num_hidden_layers, "micro-batches": MICRO_BATCHES, "batch": BATCH, "length": LENGTH}
    checks = {"loss of the first micro-batch": ", ".join(f"{name} {loss:.4f}" for name, loss in first.items())}
    return Result("lite", shapes, rows, ratios, checks, machine(torch.device(device)))


def clear() -> None:
    """Gives back what a side has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def backward(loss: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    """Adds a micro-batch's gradients to the parameters'."""
    (loss(tokens) / MICRO_BATCHES).backward()


def recorded(model: DeepSeekV3, run: Passes, tokens: Tensor) -> None:
    """The same of our network."""
    divisor = torch.tensor(float(BATCH * LENGTH), device=tokens.device)
    inputs = Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool), default_positions(tokens), None, divisor)
    run(model, inputs, Setting(0.0, 0.0, False, 1 / MICRO_BATCHES))


def stepper(model: nn.Module, passes: Work, batches: Tensor, keep: bool) -> Callable[[], None]:
    """One optimizer step a turn, to its end on the GPU. With `keep` gradients stay where recorded passes add to them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    coming = cycle(batches)

    def turn() -> None:
        for _ in range(MICRO_BATCHES):
            passes(next(coming))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        torch.autograd.graph.increment_version(list(model.parameters()))
        optimizer.zero_grad(set_to_none=not keep)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return turn


def text(config: ModelConfig, progress: Progress) -> Tensor:
    """Micro-batches [n, B, T + 1] of the standard library in tokens of a vocabulary trained on it."""
    content: Mapping[str, object] = {
        "model": {"preset": "lite", "vocab_size": config.vocab_size},
        "tokenizer": {"training_bytes": 4_000_000},
        "data": {
            "sources": [{"name": "stdlib", "uri": "builtin:stdlib", "tokens": 2 * MICRO_BATCHES * BATCH * LENGTH}],
            "sequence_length": LENGTH,
        },
        "schedule": {"learning_rate": 1e-4, "batch_size": BATCH},
        "training": {"tokens": BATCH * LENGTH},
    }
    recipe = Recipe.from_dict(content)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        run_stages(data_stages(recipe, out, progress, lambda _: None), out, lambda *_: None)
        sets = [("stdlib", open_sets(recipe, out, "train")["stdlib"], 1.0)]
        loader = Loader(sets, LENGTH + 1, 0, Tokenizer.load(out / "tokenizer").pad_id)
        rows = [loader.batch(number * BATCH, BATCH).tokens for number in range(2 * MICRO_BATCHES)]
    return torch.stack(rows)
