"""Training tokens a second of a model that one GPU holds, beside `transformers` (`dsv3 bench train --lite`).

Moonlight's shape cut to a few layers, live router, text of the standard library: 4 micro-batches of 2 x 4,096 tokens and an
AdamW update a step, with moments in BF16 where the weights are or the report has them so. The sides follow one another, since
memory holds one at a time.
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

from dsv3.bench.limits import Rates, limits, measured_rates
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
from dsv3.planning.parameters import count_parameters
from dsv3.recipe.schema import OptimizerSection, Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.data import data_stages, open_sets
from dsv3.stages.machine import machine
from dsv3.stages.runner import run_stages
from dsv3.training.gradients import Inputs, Passes, Setting, passes
from dsv3.training.optimizer import Optimizer
from dsv3.training.replay import Replay

LAYERS, VOCABULARY = 6, 32_768
MICRO_BATCHES, BATCH, LENGTH = 4, 2, 4096
RATE = 1e-5
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

    def measure(
        name: str, peer: nn.Module, loss: Callable[[Tensor], Tensor], passes: Work, update: Callable[[], None]
    ) -> None:
        first[name] = float(loss(batches[0]).detach())
        peer.zero_grad()
        seconds.update(take_turns({name: stepper(passes, update, batches)}, rounds, progress, name))

    for name, (setting, dtype) in THEIRS.items():
        (peer,) = with_our_weights(model, [setting], dtype)
        loss = partial(training_loss, peer, setting)
        peer.to(device).train()
        measure(name, peer, loss, partial(backward, loss), updater(peer))
        del peer, loss
        clear()
    for name in OURS:
        model.load_state_dict(start)
        if name.endswith("fp8"):
            model.compute_in_fp8()
        # Recorded, as the trainer does it on a GPU.
        run = partial(recorded, model, Replay() if device == "cuda" else passes)
        measure(name, model, lambda tokens: model.loss(tokens, divisor=BATCH * LENGTH).total, run, our_updater(model))
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
    if device == "cuda":
        best = max(row.tokens_per_second.median for row in rows if row.name in THEIRS)
        for name, most in ceilings(config, BATCH * LENGTH, measured_rates()).items():
            checks[f"{name}, ceiling from rates of this run"] = f"{most:,.0f} tokens/s, {most / best:.2f} times"
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


def stepper(passes: Work, update: Callable[[], None], batches: Tensor) -> Callable[[], None]:
    """One optimizer step a turn, to its end on the GPU."""
    coming = cycle(batches)

    def turn() -> None:
        for _ in range(MICRO_BATCHES):
            passes(next(coming))
        update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return turn


def updater(peer: nn.Module) -> Callable[[], None]:
    """Torch's fused AdamW."""
    optimizer = torch.optim.AdamW(peer.parameters(), lr=RATE, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return update


def our_updater(model: DeepSeekV3) -> Callable[[], None]:
    """The trainer's; gradients stay where recorded passes add to them."""
    optimizer = Optimizer(model, OptimizerSection(moments="bf16"))
    optimizer.keep_gradients = True

    def update() -> None:
        optimizer.clip()
        optimizer.step(RATE)

    return update


def ceilings(config: ModelConfig, tokens: int, rates: Rates) -> dict[str, float]:
    """Tokens a second of our sides if every operation of a step reached the rate of a bare product, of cuDNN's attention or of a
    copy: see `limits`. The update reads gradients twice, and weights and moments once to write them."""
    counted = count_parameters(config)
    update = counted.main * (4 + 20) / rates.copy
    each = {"dsv3 bf16": limits(config, tokens, "bf16", rates), "dsv3 fp8": limits(config, tokens, "fp8", rates)}
    return {
        name: tokens * MICRO_BATCHES / (MICRO_BATCHES * sum(of.values()) / 1e3 + update) for name, of in each.items()
    }


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
        run_stages(data_stages(RunContext(recipe, out, progress)), out, lambda *_: None)
        sets = [("stdlib", open_sets(recipe, out, "train")["stdlib"], 1.0)]
        loader = Loader(sets, LENGTH + 1, 0, Tokenizer.load(out / "tokenizer").pad_id)
        rows = [loader.batch(number * BATCH, BATCH).tokens for number in range(2 * MICRO_BATCHES)]
    return torch.stack(rows)
