"""What a run is measured by while it trains: bits per byte by source, pass@1 on held-out tasks, samples to read."""

from dataclasses import dataclass
from typing import Any

from dsv3.data.fim import fim_prompt
from dsv3.data.sources import TINYPY, documents
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluation.bits_per_byte import bits_per_byte
from dsv3.evaluation.tinypy import pass_at_1
from dsv3.inference.llm import LLM
from dsv3.inference.sampling import SamplingParams
from dsv3.model.transformer import DeepSeekV3
from dsv3.recipe.schema import Recipe

ANSWER_TOKENS = 112
"""Longest answer to a tinypy task; the longest solution takes fewer."""
SAMPLE_TOKENS = 96
"""Longest sample."""
BATCH_ROWS = 16
"""Windows scored together."""


@dataclass(frozen=True)
class Gap:
    """A held-out text with a hole, for a fill-in-the-middle sample."""

    prefix: str
    suffix: str


class Scores:
    """Called with a model, gives what `evaluations.jsonl` holds; texts and tasks are the same at every call."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer):
        self.recipe, self.tokenizer = recipe, tokenizer
        limit = recipe.evaluation.bits_per_byte_bytes
        self.texts = {source.name: held_out(recipe, source.uri, limit) for source in recipe.data.sources}
        self.has_tasks = any(source.uri == TINYPY for source in recipe.data.sources)
        prose = [
            texts
            for source, texts in zip(recipe.data.sources, self.texts.values(), strict=True)
            if source.uri != TINYPY
        ]
        self.gap = self.find_gap(prose[0]) if prose and recipe.data.fim_rate > 0 else None

    def __call__(self, model: DeepSeekV3) -> dict[str, Any]:
        """Bits per byte by source, passed and total tasks, samples."""
        llm = LLM.of(model, self.tokenizer)
        device = model.lm_head.weight.device
        length = self.recipe.data.sequence_length
        found: dict[str, Any] = {
            "bits_per_byte": {
                name: bits_per_byte(
                    model, self.tokenizer, texts, sequence_length=length, batch_rows=BATCH_ROWS, device=device
                ).value
                for name, texts in self.texts.items()
            }
        }
        if self.has_tasks and self.recipe.evaluation.tinypy_tasks:
            result = pass_at_1(lambda prompts: answers(llm, prompts), self.recipe.evaluation.tinypy_tasks)
            found["pass_at_1"] = {"tinypy": {"passed": result.passed, "total": result.total}}
            found["failures"] = {"tinypy": result.failures}
        found["samples"] = self.samples(llm)
        return found

    def samples(self, llm: LLM) -> list[dict[str, str]]:
        """Continuations of the recipe's prompts, and the hole filled."""
        params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=self.recipe.training.seed)
        prompts = list(self.recipe.evaluation.sample_prompts)
        completions = llm.generate(prompts, params) if prompts else []
        samples = [dict(kind="plain", prompt=c.prompt, suffix="", text=c.text) for c in completions]
        if self.gap is not None:
            filled = llm.generate([self.ids_around(self.gap)], params)[0].text
            samples.append(dict(kind="fim", prompt=self.gap.prefix, suffix=self.gap.suffix, text=filled))
        return samples

    def find_gap(self, texts: list[str]) -> Gap | None:
        """The first hole whose surroundings leave the model room to fill it."""
        room = self.recipe.model.config().max_position_embeddings - SAMPLE_TOKENS
        gaps = (gap for text in texts if (gap := cut_a_line(text)))
        return next((gap for gap in gaps if len(self.ids_around(gap)) <= room), None)

    def ids_around(self, gap: Gap) -> list[int]:
        """The prompt that asks for what is missing."""
        encode = self.tokenizer.encode
        return [self.tokenizer.bos_id, *fim_prompt(encode(gap.prefix), encode(gap.suffix), self.tokenizer)]


def held_out(recipe: Recipe, uri: str, limit: int) -> list[str]:
    """Whole documents of a source's validation split until `limit` bytes are reached."""
    texts, total = [], 0
    for document in documents(
        uri, "validation", seed=recipe.data_seed, validation_fraction=recipe.data.validation_fraction
    ):
        if total >= limit:
            break
        texts.append(document.text)
        total += len(document.text.encode())
    return texts


def answers(llm: LLM, prompts: list[str]) -> list[str]:
    """The most likely answer to each task."""
    return [each.text for each in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS))]


def cut_a_line(text: str) -> Gap | None:
    """The first indented line from the middle of a text's first 20 lines on is the hole; None where there is none."""
    lines = text.splitlines(keepends=True)[:60]
    for i in range(len(lines) // 3, len(lines) - 3):
        if lines[i].strip() and lines[i].startswith("    "):
            return Gap("".join(lines[max(i - 8, 0) : i]), "".join(lines[i + 1 : i + 5]))
    return None
