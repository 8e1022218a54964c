"""Training tokens a second of a model that one GPU holds, beside `transformers` (`dsv3 bench train --lite`).

Moonlight's shape cut to a few layers, live router, text of the standard library: 4 micro-batches of 2 x 4,096 tokens and an
AdamW update a step, with moments in BF16 where the weights are or the report has them so. The sides follow one another, since
memory holds one at a time.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, cycle, islice

import torch
from torch import Tensor, nn

from dsv3.bench.limits import Rates, limits, measured_rates
from dsv3.bench.measure import Progress, Result, Row, Spread, agree, clear, gpu, ratio, synchronize, take_turns
from dsv3.bench.peers import Setting as PeerSetting
from dsv3.bench.peers import training_loss, with_our_weights
from dsv3.bench.slices import randomize
from dsv3.bench.train import our_loss
from dsv3.data.library import STDLIB
from dsv3.data.sources import VALIDATION_FRACTION, to_learn_from
from dsv3.data.tokenizer import train_tokenizer
from dsv3.model.config import ModelConfig
from dsv3.model.micro_batch import default_positions
from dsv3.model.transformer import DeepSeekV3
from dsv3.planning.flops import training_flops_per_token
from dsv3.planning.parameters import count_parameters
from dsv3.recipe.schema import OptimizerSection
from dsv3.stages.machine import machine
from dsv3.training.gradients import Inputs, Passes, Setting, passes
from dsv3.training.optimizer import Optimizer
from dsv3.training.replay import Replay

LAYERS, VOCABULARY = 6, 32_768
MICRO_BATCHES, BATCH, LENGTH = 4, 2, 4096
RATE = 1e-5
Work = Callable[[Tensor], object]
"""Passes of one micro-batch [B, T + 1]."""
OURS = {"dsv3 bf16": 1.4, "dsv3 fp8": 1.6}
"""How many times faster than the peer's best each should be."""
THEIRS = {
    "transformers, autocast": (PeerSetting(torch.bfloat16, "sdpa", "grouped_mm"), torch.float32),
    "transformers, bf16 weights": (PeerSetting(torch.bfloat16, "sdpa", "grouped_mm"), torch.bfloat16),
}
"""(how it is asked to compute, dtype of its weights)."""


def bench_lite(rounds: int = 3, progress: Progress = lambda **_: None, config: ModelConfig | None = None) -> Result:
    """On the current GPU; `config` stands for another network, which the CPU trains.

    Raises `UserError` without a GPU, `RunError` when the sides' losses of one micro-batch differ.
    """
    device = gpu("dsv3 bench train --lite") if config is None else torch.device("cpu")
    config = config or ModelConfig.preset(
        "lite", num_hidden_layers=LAYERS, vocab_size=VOCABULARY, num_nextn_predict_layers=0
    )
    batches = text(config.vocab_size).to(device)
    model = DeepSeekV3(config, torch.bfloat16).to(device)
    randomize(model, 0.02)
    start = {name: each.cpu() for name, each in model.state_dict().items()}
    seconds: dict[str, list[float]] = {}
    first: dict[str, float] = {}

    def measure(
        name: str, side: nn.Module, loss: Callable[[Tensor], Tensor], passes: Work, update: Callable[[], None]
    ) -> None:
        first[name] = float(loss(batches[0]).detach())
        side.zero_grad()
        turn = partial(step, passes, update, cycle(batches), device)
        seconds.update(take_turns({name: turn}, rounds, progress, name))

    for name, (setting, dtype) in THEIRS.items():
        (peer,) = with_our_weights(model, [setting], dtype)
        peer.to(device).train()
        loss = partial(training_loss, peer, setting)
        fused = torch.optim.AdamW(peer.parameters(), lr=RATE, fused=True)
        measure(name, peer, loss, partial(backward, loss), partial(update, peer, fused))
        del peer, loss, fused
        clear()
    for name in OURS:
        model.load_state_dict(start)
        if name.endswith("fp8"):
            model.compute_in_fp8()
        # Recorded, as the trainer does it on a GPU: gradients stay where recorded passes add to them.
        run = partial(recorded, model, Replay() if device.type == "cuda" else passes)
        optimizer = Optimizer(model, OptimizerSection(moments="bf16"))
        optimizer.keep_gradients = True
        measure(name, model, partial(our_loss, model), run, partial(our_update, optimizer))
        del optimizer
        clear()
    agree("loss", first, 2e-2)
    tokens, flops = MICRO_BATCHES * BATCH * LENGTH, training_flops_per_token(config, LENGTH)
    rows = []
    for name, each in seconds.items():
        speed = Spread.of([tokens / turn for turn in each])
        figures = {"ms a step": 1000 * statistics.median(each), "TFLOP/s": flops * speed.median / 1e12}
        rows.append(Row(name, "", speed, figures))
    ratios = [ratio("against its best", seconds, name, list(THEIRS), target) for name, target in OURS.items()]
    shapes = {"layers": config.num_hidden_layers, "micro-batches": MICRO_BATCHES, "batch": BATCH, "length": LENGTH}
    checks = {"loss of the first micro-batch": ", ".join(f"{name} {loss:.4f}" for name, loss in first.items())}
    if device.type == "cuda":
        best = max(row.tokens_per_second.median for row in rows if row.name in THEIRS)
        for name, most in ceilings(config, BATCH * LENGTH, measured_rates()).items():
            checks[f"{name}, ceiling from rates of this run"] = f"{most:,.0f} tokens/s, {most / best:.2f} times"
    return Result("lite", shapes, rows, ratios, checks, machine(device))


def step(passes: Work, update: Callable[[], None], coming: Iterator[Tensor], device: torch.device) -> None:
    """One optimizer step on the next micro-batches, to its end on the GPU."""
    for _ in range(MICRO_BATCHES):
        passes(next(coming))
    update()
    synchronize(device)


def backward(loss: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    """Adds a micro-batch's gradients to the parameters'."""
    (loss(tokens) / MICRO_BATCHES).backward()


def update(peer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The peer's."""
    nn.utils.clip_grad_norm_(peer.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


def recorded(model: DeepSeekV3, run: Passes, tokens: Tensor) -> None:
    """Adds a micro-batch's gradients to our network's."""
    divisor = torch.tensor(float(BATCH * LENGTH), device=tokens.device)
    inputs = Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool), default_positions(tokens), None, divisor)
    run(model, inputs, Setting(0.0, 0.0, False, 1 / MICRO_BATCHES))


def our_update(optimizer: Optimizer) -> None:
    """The trainer's."""
    optimizer.clip()
    optimizer.step(RATE)


def ceilings(config: ModelConfig, tokens: int, rates: Rates) -> dict[str, float]:
    """Tokens a second of our sides if every operation of a step reached the rate of a bare product, of cuDNN's attention or of a
    copy: see `limits`. The update reads gradients twice, and weights and moments once to write them."""
    counted = count_parameters(config)
    update = counted.main * (4 + 20) / rates.copy
    each = {"dsv3 bf16": limits(config, tokens, "bf16", rates), "dsv3 fp8": limits(config, tokens, "fp8", rates)}
    return {
        name: tokens * MICRO_BATCHES / (MICRO_BATCHES * sum(of.values()) / 1e3 + update) for name, of in each.items()
    }


def text(vocab_size: int) -> Tensor:
    """Micro-batches [n, B, T + 1] of the standard library in tokens of a vocabulary trained on it."""
    texts = to_learn_from(STDLIB, 0, VALIDATION_FRACTION, 4_000_000)
    tokenizer, shape = train_tokenizer(texts, vocab_size), (2 * MICRO_BATCHES, BATCH, LENGTH + 1)
    ids = chain.from_iterable([tokenizer.bos_id, *tokenizer.encode(each)] for each in texts)
    return torch.tensor(list(islice(ids, math.prod(shape)))).view(shape)
