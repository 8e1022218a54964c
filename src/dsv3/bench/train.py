"""Training tokens a second on the CPU, the main model without MTP: forward, backward and AdamW, against `transformers`."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from dsv3.bench.measure import Progress, Result, Row, Spread, Work, agree, ratio, take_turns
from dsv3.bench.peers import Setting, training_loss, with_our_weights
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.planning.flops import training_flops_per_token

OURS = {"dsv3 fp32": torch.float32, "dsv3 bf16": torch.bfloat16}
THEIRS = [
    Setting(torch.float32, "sdpa", "grouped_mm"),
    Setting(torch.float32, "sdpa", "eager"),
    Setting(torch.bfloat16, "sdpa", "grouped_mm"),
    Setting(torch.bfloat16, "sdpa", "eager"),
    Setting(torch.bfloat16, "eager", "grouped_mm"),
]
"""`batched_mm` is left out: it copies an expert's weights for every row, gigabytes at this size."""
RATE = 1e-4
"""Small, so that no router leaves its balance."""


def bench_train(
    preset: str = "tiny",
    rounds: int = 5,
    *,
    steps: int = 3,
    batch: int = 8,
    length: int = 256,
    progress: Progress = lambda **_: None,
) -> Result:
    """Both sides start from the same weights and read the same batches; a turn is `steps` optimizer steps.

    Raises `RunError` when the sides' losses of one batch differ, for then they do not compute the same.
    """
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    models = {name: DeepSeekV3(config, compute_dtype=dtype).initialize("fan_in") for name, dtype in OURS.items()}
    peers = with_our_weights(models["dsv3 fp32"], THEIRS, torch.float32)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(config.vocab_size, (batch, length + 1), generator=generator) for _ in range(4)]
    losses = {name: partial(our_loss, model) for name, model in models.items()}
    losses |= {each.name: partial(training_loss, peer, each) for each, peer in zip(THEIRS, peers, strict=True)}
    networks = [*models.values(), *(peer.train() for peer in peers)]
    sides: dict[str, Work] = {
        name: partial(
            turn, losses[name], torch.optim.AdamW(network.parameters(), lr=RATE, fused=True), cycle(batches), steps
        )
        for name, network in zip(losses, networks, strict=True)
    }
    first = {name: float(loss(batches[0]).detach()) for name, loss in losses.items()}
    check(first)
    seconds = take_turns(sides, rounds, progress, "bench train")
    flops = training_flops_per_token(config, length)
    rows = []
    for name, each in seconds.items():
        speed = Spread.of([steps * batch * length / turn for turn in each])
        figures = {"ms a step": 1000 * batch * length / speed.median, "GFLOP/s": flops * speed.median / 1e9}
        rows.append(Row(name, "", speed, figures))
    best = [setting.name for setting in THEIRS]
    wide = [setting.name for setting in THEIRS if setting.dtype == torch.float32]
    ratios = [
        ratio("against its best", seconds, "dsv3 bf16", best, 1.0),
        ratio("BF16 against its FP32", seconds, "dsv3 bf16", wide, 1.3),
        ratio("FP32 against its FP32", seconds, "dsv3 fp32", wide, None),
    ]
    shapes = {"preset": preset, "batch": batch, "length": length, "steps a turn": steps, "optimizer": "AdamW, fused"}
    checks = {"loss of the first batch": ", ".join(f"{name} {loss:.5f}" for name, loss in first.items())}
    return Result("train", shapes, rows, ratios, checks)


def our_loss(model: DeepSeekV3, tokens: Tensor) -> Tensor:
    """The same loss by our model."""
    return model.loss(tokens).total


def turn(
    loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, coming: Iterator[Tensor], steps: int
) -> None:
    """So many optimizer steps on the next batches."""
    for _ in range(steps):
        loss(next(coming)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check(first: dict[str, float]) -> None:
    """Refuses to compare sides whose losses differ from the first one's, in FP32."""
    agree("loss", {name: loss for name, loss in first.items() if "fp32" in name}, 1e-4)
    agree("loss", first, 2e-2)
