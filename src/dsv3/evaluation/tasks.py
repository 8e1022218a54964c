"""The tasks by name, run one after the other on one model: what `dsv3 eval` and the trainer's evaluations share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluation.bits_per_byte import bits_per_byte
from dsv3.evaluation.needle import needle
from dsv3.evaluation.position import loss_by_position
from dsv3.evaluation.tinypy import pass_at_1
from dsv3.inference.llm import LLM
from dsv3.inference.sampling import SamplingParams
from dsv3.model.transformer import DeepSeekV3

TASKS = ("bpb", "tinypy", "needle", "position")
ANSWER_TOKENS = 112
"""Longest answer to a tinypy task; the longest solution takes fewer."""
BATCH_ROWS = 16
"""Windows scored together."""


@dataclass(frozen=True)
class Plan:
    """Which tasks, and on what."""

    tasks: Sequence[str]
    length: int
    """Tokens of a window of bits per byte, and of a row of loss by position."""
    texts: Mapping[str, list[str]] = field(default_factory=dict)
    """Held-out documents by source, for `bpb` and `position`."""
    tinypy_tasks: int = 0
    needle_lengths: Sequence[int] = ()
    needle_depths: int = 5
    needle_samples: int = 4


def run_tasks(
    model: DeepSeekV3, tokenizer: Tokenizer, plan: Plan, progress: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """What each task of the plan found, JSON-able; `progress(task, done, total)` is told of every part.

    `bits_per_byte` is `{source: bits}`; `pass_at_1` `{"tinypy": {"passed", "total"}}`, with `failures` beside it; `needle`
    the fields of `Haystack`; `loss_by_position` those of `LossByPosition` by source.
    """
    device = model.lm_head.weight.device
    found: dict[str, Any] = {}
    if "bpb" in plan.tasks:
        found["bits_per_byte"] = {}
        for done, (name, texts) in enumerate(plan.texts.items(), 1):
            found["bits_per_byte"][name] = bits_per_byte(
                model, tokenizer, texts, sequence_length=plan.length, batch_rows=BATCH_ROWS, device=device
            ).value
            progress("bpb", done, len(plan.texts))
    if "tinypy" in plan.tasks and plan.tinypy_tasks:
        llm = LLM.of(model, tokenizer)
        result = pass_at_1(lambda prompts: answers(llm, prompts), plan.tinypy_tasks)
        found["pass_at_1"] = {"tinypy": {"passed": result.passed, "total": result.total}}
        found["failures"] = {"tinypy": result.failures}
        progress("tinypy", 1, 1)
    if "needle" in plan.tasks:
        depths = [k / (plan.needle_depths - 1) for k in range(plan.needle_depths)]
        haystack = needle(
            model, tokenizer, lengths=plan.needle_lengths or quarters(plan.length), depths=depths,
            samples=plan.needle_samples, device=device, progress=lambda done, total: progress("needle", done, total),
        )  # fmt: skip
        found["needle"] = asdict(haystack)
    if "position" in plan.tasks:
        found["loss_by_position"] = {}
        for done, (name, texts) in enumerate(plan.texts.items(), 1):
            found["loss_by_position"][name] = asdict(
                loss_by_position(model, tokenizer, texts, length=plan.length, slide=True, device=device)
            )
            progress("position", done, len(plan.texts))
    return found


def quarters(length: int) -> list[int]:
    """A quarter, a half, three quarters and the whole of a length."""
    return [length * k // 4 for k in range(1, 5)]


def answers(llm: LLM, prompts: list[str]) -> list[str]:
    """The most likely answer to each task."""
    return [each.text for each in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS))]
