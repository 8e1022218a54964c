"""Decoded tokens a second on the CPU, greedily and with a cache, against `transformers.generate` with the same weights."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dsv3.bench.limits import experts_read
from dsv3.bench.measure import Progress, Ratio, Result, Row, Spread, Work, ratio, take_turns
from dsv3.bench.peers import Setting, continuation, with_our_weights
from dsv3.errors import RunError
from dsv3.inference.engine import Engine, EngineConfig, continuations
from dsv3.inference.params import SamplingParams
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.planning.parameters import count_parameters

OURS = "dsv3 fp32"
THEIRS = [
    Setting(torch.float32, "sdpa", "grouped_mm"),
    Setting(torch.float32, "sdpa", "batched_mm"),
    Setting(torch.float32, "sdpa", "eager"),
    Setting(torch.float32, "eager", "grouped_mm"),
    Setting(torch.bfloat16, "sdpa", "grouped_mm"),
]
SERVED = ((16, 64, 32), (8, 256, 64))
"""(requests, tokens of each prompt, new tokens): short answers at once, where reading the prompts counts."""
CLEAR_GAP = 1e-3
"""Between the two highest logits: below it, the order of additions may decide which token is the most likely."""


def bench_decode(
    preset: str = "tiny",
    rounds: int = 3,
    *,
    batches: Sequence[int] = (1, 8),
    tokens: int = 512,
    prompt: int = 16,
    served: Sequence[tuple[int, int, int]] = SERVED,
    progress: Progress = lambda **_: None,
) -> Result:
    """A turn continues `batch` random prompts of `prompt` tokens by `tokens` each, or as `served` says; reading is included.

    The engine takes them as requests, `transformers` as one batch: for prompts of one length it has no cheaper form. Raises
    `RunError` when the sides choose different tokens where the choice is clear.
    """
    config = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    workloads = {f"batch {batch}": (batch, prompt, tokens) for batch in batches}
    workloads |= {f"{count} requests, {before}/{new}": (count, before, new) for count, before, new in served}
    longest = max(before + new for _, before, new in workloads.values())
    config = config.replace(max_position_embeddings=max(config.max_position_embeddings, longest))
    model = DeepSeekV3(config).initialize("fan_in").eval()
    peers = [peer.eval() for peer in with_our_weights(model, THEIRS)]
    engine = Engine(model, None, EngineConfig(prefix_caching=False))
    generator = torch.Generator().manual_seed(0)
    rows, ratios, checks = list[Row](), list[Ratio](), dict[str, str]()
    for group, (batch, before, new) in workloads.items():
        prompts = torch.randint(config.vocab_size, (batch, before), generator=generator)
        ours, theirs = continue_ours(engine, prompts, new), continuation(peers[0], prompts, new)
        same = agreement(model, prompts, ours, theirs)
        checks[f"{group}, tokens like transformers'"] = f"{same} of {batch * new}, up to the first unclear choice"
        sides: dict[str, Work] = {OURS: partial(continue_ours, engine, prompts, new)}
        sides |= {
            each.name: partial(continuation, peer, prompts, new) for each, peer in zip(THEIRS, peers, strict=True)
        }
        seconds = take_turns(sides, rounds, progress, f"bench decode, {group}")
        for name, each in seconds.items():
            speed = Spread.of([batch * new / turn for turn in each])
            megabytes = (2 if "bf16" in name else 4) * weights_read(config, batch) / 1e6
            figures = {
                "ms a step": 1000 * batch / speed.median,
                "MB of weights a step": megabytes,
                "GB/s": megabytes / 1e3 * speed.median / batch,
            }
            rows.append(Row(name, group, speed, figures))
        target = 5.0 if (batch, before, new) in served else 3.0
        ratios.append(ratio(f"{group}, against its best", seconds, OURS, [each.name for each in THEIRS], target))
    shapes = {
        "preset": preset,
        "workloads": list(workloads),
        "new tokens": tokens,
        "prompt": prompt,
        "sampling": "greedy",
    }
    return Result("decode", shapes, rows, ratios, checks)


def continue_ours(engine: Engine, prompts: Tensor, count: int) -> Tensor:
    """What `peers.continuation` does, with our engine: [B, count]."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return torch.tensor(continuations(engine, prompts.tolist(), params))


@torch.inference_mode()
def agreement(model: DeepSeekV3, prompts: Tensor, ours: Tensor, theirs: Tensor) -> int:
    """How many tokens agree, counted in each row up to the first choice that is not clear.

    From there on both continue texts of their own. `RunError` when a clear choice differs.
    """
    same = 0
    length = prompts.shape[1]
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        logits = model(torch.cat((prompts[row], mine)).unsqueeze(0)).logits[0, length - 1 : -1]
        highest = logits.topk(2, dim=-1).values
        unclear = (highest[:, 0] - highest[:, 1] < CLEAR_GAP).nonzero()
        end = int(unclear[0]) if len(unclear) else len(mine)
        if not torch.equal(mine[:end], other[:end]):
            at = int((mine[:end] != other[:end]).nonzero()[0])
            raise RunError(
                f"row {row}, token {at}: transformers chose {int(other[at])}, dsv3 {int(mine[at])}, where one is clearly likelier"
            )
        same += end
    return same


def weights_read(config: ModelConfig, batch: int) -> float:
    """Parameters that one step over `batch` sequences has to read once, if routing is even: the least that it moves."""
    counted, moe_layers = count_parameters(config), config.num_hidden_layers - config.num_dense_layers
    more = experts_read(config, batch) - config.num_experts_per_tok
    return counted.active_with_head + moe_layers * more * counted.expert
