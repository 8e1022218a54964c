"""Tokens a second with drafts of the MTP modules, on held-out text, one request at a time (`dsv3 bench decode --checkpoint`)."""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3.bench.measure import Progress, Ratio, Result, Row, Spread, ratio, take_turns
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.inference.engine import Engine, EngineConfig, continuations
from dsv3.inference.params import SamplingParams
from dsv3.model.device import pick_device
from dsv3.ops.latent_pages import PAGE
from dsv3.stages.evaluate import recipe_of
from dsv3.stages.machine import machine
from dsv3.stages.scores import held_out
from dsv3.weights.opening import load_model

TARGET, LIKELY = 1.6, 0.85
"""How many times faster the best number of drafts should be, where at least this share of first drafts is accepted."""
PROMPTS = 4
"""A source's."""
TEXT_BYTES = 20_000
"""Held-out text of a source."""


class Drafted(NamedTuple):
    """An engine's answers to some prompts, and the passes they took."""

    tokens: list[list[int]]
    passes: int
    accepted: tuple[float, ...]
    """By position, the share of passes with drafts in which this draft and all before it were right."""


def bench_speculation(
    path: Path,
    rounds: int = 3,
    *,
    drafts: Sequence[int] = (0, 1, 2, 3, 4),
    tokens: int = 256,
    prompt: int = 64,
    device: str = "auto",
    progress: Progress = lambda **_: None,
) -> Result:
    """A turn continues the first `prompt` tokens of held-out texts greedily, one after the other, with one number of drafts; 0 is the
    first of these.

    In BF16 with CUDA graphs on a GPU; on a CPU in what the checkpoint is in. Raises `UserError` for a model without MTP
    modules, or without the recipe that names its held-out texts.
    """
    where = pick_device(device)
    recipe, _ = recipe_of(path)
    if recipe is None:
        raise UserError(
            f"{path} comes without the recipe that names its held-out texts: expected a run or a checkpoint"
        )
    model, directory = load_model(path, dtype=torch.bfloat16 if where.type == "cuda" else None, device=where)
    tokenizer = Tokenizer.load(directory)
    longest = prompt + tokens + 2 * max(drafts)
    blocks = -(-longest // PAGE)
    engines = {
        k: Engine(model, None, EngineConfig(blocks, num_speculative_tokens=k, prefix_caching=False)) for k in drafts
    }
    rows, ratios, checks = list[Row](), list[Ratio](), dict[str, str]()
    for source, texts in held_out(recipe, TEXT_BYTES).items():
        beginnings = ([tokenizer.bos_id, *tokenizer.encode(text)][:prompt] for text in texts)
        prompts = [each for each in beginnings if len(each) == prompt][:PROMPTS]
        if not prompts:
            continue
        found = {name_of(k): answer(each, prompts, tokens) for k, each in engines.items()}
        turns = {name_of(k): partial(answer, each, prompts, tokens) for k, each in engines.items()}
        seconds = take_turns(turns, rounds, progress, source)
        for name, each in found.items():
            made = sum(map(len, each.tokens))
            speed, each_pass = Spread.of([made / turn for turn in seconds[name]]), made / each.passes
            figures = {"ms a pass": 1000 * each_pass / speed.median, "tokens a pass": each_pass}
            rows.append(Row(name, source, speed, figures))
            same = sum(a == b for a, b in zip(each.tokens, found[name_of(0)].tokens, strict=True))
            shares = ", ".join(f"{share:.1%}" for share in each.accepted)
            if shares:
                checks[f"{source}, {name}"] = f"accepted {shares}; {same} of {len(prompts)} answers as without drafts"
        best = min(list(found)[1:], key=lambda name: statistics.median(seconds[name]))
        likely = found[best].accepted[0] >= LIKELY
        ratios.append(ratio(source, seconds, best, [name_of(0)], TARGET if likely else None))
        progress(stage=f"{source}, {best}", done=1, total=1, times_as_fast=f"{ratios[-1].value.median:.2f}")
    shapes = {
        "checkpoint": str(path), "prompts a source": PROMPTS, "tokens of each": prompt, "new tokens": tokens,
        "batch": 1, "sampling": "greedy", "dtype": str(model.lm_head.weight.dtype),
    }  # fmt: skip
    return Result("speculation", shapes, rows, ratios, checks, machine(where))


def name_of(drafts: int) -> str:
    """As tables show it."""
    return f"{drafts} drafts" if drafts else "no drafts"


def answer(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> Drafted:
    """Continues one prompt after the other."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    before = engine.stats()
    answers = [continuations(engine, [prompt], params)[0] for prompt in prompts]
    after = engine.stats()
    checked = after.drafts - before.drafts
    counts = zip(after.accepted_per_position, before.accepted_per_position, strict=True)
    accepted = tuple((now - then) / checked for now, then in counts)
    # Without drafts a pass gives a token; so does one that reads a prompt, whose drafts the next pass checks.
    passes = checked + len(prompts) if accepted else len(prompts) * tokens
    return Drafted(answers, passes, accepted)
