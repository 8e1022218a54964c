"""The tasks by name, run one after the other on one model: what `dsv3 eval` and the trainer's evaluations share."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluation.acceptance import acceptance
from dsv3.evaluation.bits_per_byte import bits_per_byte
from dsv3.evaluation.needle import needle
from dsv3.evaluation.position import loss_by_position
from dsv3.evaluation.tinypy import pass_at_1
from dsv3.inference.engine import EngineConfig
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams
from dsv3.model.transformer import DeepSeekV3
from dsv3.recipe.schema import EvaluationSection

ANSWER_TOKENS = 112
"""Longest answer to a tinypy task; the longest solution takes fewer."""
SMALL_CACHE = EngineConfig(cache_bytes=1 << 30)
"""Beside a model in training."""
BATCH_ROWS = 16
"""Windows scored together."""


def run_tasks(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    wanted: EvaluationSection,
    length: int,
    texts: Mapping[str, list[str]],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """What each of the `wanted` tasks found, JSON-able; `progress(task, done, total)` is told of every part.

    `length` is that of a window of bits per byte and of drafts, and of a row of loss by position, in tokens; `texts` are held-out
    documents by source, for all three.

    `bits_per_byte` is `{source: bits}`; `pass_at_1` `{"tinypy": {"passed", "total"}}`, with `failures` beside it; `needle`
    the fields of `Haystack`; `loss_by_position` those of `LossByPosition` by source; `mtp_acceptance` `{source: shares by depth}`.
    """
    found: dict[str, Any] = {}
    windows = {"sequence_length": length, "batch_rows": BATCH_ROWS}

    def of_each(task: str, score: Callable[[list[str]], Any]) -> dict[str, Any]:
        scores = {}
        for done, (name, held_out) in enumerate(texts.items(), 1):
            scores[name] = score(held_out)
            progress(task, done, len(texts))
        return scores

    if "bpb" in wanted.tasks:
        found["bits_per_byte"] = of_each("bpb", lambda texts: bits_per_byte(model, tokenizer, texts, **windows))
    if "tinypy" in wanted.tasks and wanted.tinypy_tasks:
        llm, greedy = LLM.of(model, tokenizer, SMALL_CACHE), SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)

        def answers(prompts: list[str]) -> list[str]:
            return [each.outputs[0].text for each in llm.generate(prompts, greedy)]

        verdicts = [each.verdict for each in pass_at_1(answers, wanted.tinypy_tasks)]
        passed = sum(verdict.passed for verdict in verdicts)
        failures = Counter(verdict.kind for verdict in verdicts if not verdict.passed)
        found["pass_at_1"] = {"tinypy": {"passed": passed, "total": len(verdicts)}}
        found["failures"] = {"tinypy": dict(failures.most_common())}
        progress("tinypy", 1, 1)
    if "needle" in wanted.tasks:
        depths = [k / (wanted.needle_depths - 1) for k in range(wanted.needle_depths)]
        haystack = needle(
            model, tokenizer, lengths=wanted.needle_lengths or [length * k // 4 for k in range(1, 5)], depths=depths,
            samples=wanted.needle_samples, progress=lambda done, total: progress("needle", done, total),
        )  # fmt: skip
        found["needle"] = asdict(haystack)
    if "position" in wanted.tasks:
        found["loss_by_position"] = of_each(
            "position", lambda texts: asdict(loss_by_position(model, tokenizer, texts, length=length))
        )
    if "mtp" in wanted.tasks:
        found["mtp_acceptance"] = of_each("mtp", lambda texts: acceptance(model, tokenizer, texts, **windows))
    return found
