"""What a run is measured by while it trains: the recipe's tasks, and samples to read."""

from collections.abc import Iterable
from typing import Any

from dsv3.data.fim import gap_prompt
from dsv3.data.sources import GENERATORS, TINYPY, Document, documents
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluation.tasks import SMALL_CACHE, run_tasks
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams
from dsv3.model.transformer import DeepSeekV3
from dsv3.recipe.schema import Recipe

SAMPLE_TOKENS = 96
"""Longest sample."""


class Scores:
    """Called with a model, gives what `evaluations.jsonl` holds; texts and tasks are the same at every call."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer):
        self.recipe, self.tokenizer = recipe, tokenizer
        # Tasks of tinypy are asked where the model was taught them.
        taught = any(source.uri == TINYPY for source in recipe.data.sources)
        self.wanted = recipe.evaluation if taught else recipe.evaluation.model_copy(update={"tinypy_tasks": 0})
        self.texts = held_out(recipe, self.wanted.bits_per_byte_bytes)
        prose = [self.texts[source.name] for source in recipe.data.sources if source.uri not in GENERATORS]
        self.gap = self.find_gap(prose[0]) if prose and recipe.data.fim_rate > 0 else None

    def __call__(self, model: DeepSeekV3) -> dict[str, Any]:
        """What `run_tasks` gives, and samples."""
        found = run_tasks(model, self.tokenizer, self.wanted, self.recipe.data.sequence_length, self.texts)
        return {**found, "samples": self.samples(LLM.of(model, self.tokenizer, SMALL_CACHE))}

    def samples(self, llm: LLM) -> list[dict[str, str]]:
        """Continuations of the recipe's prompts, and the hole filled."""
        params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=self.recipe.training.seed)
        prompts = list(self.recipe.evaluation.sample_prompts)
        completions = llm.generate(prompts, params) if prompts else []
        samples = [dict(kind="plain", prompt=c.prompt or "", suffix="", text=c.outputs[0].text) for c in completions]
        if self.gap is not None:
            prefix, suffix = self.gap
            filled = llm.generate([gap_prompt(prefix, suffix, self.tokenizer)], params)[0].outputs[0].text
            samples.append(dict(kind="fim", prompt=prefix, suffix=suffix, text=filled))
        return samples

    def find_gap(self, texts: list[str]) -> tuple[str, str] | None:
        """What is before and after the first hole whose surroundings leave the model room to fill it."""
        room = self.recipe.model.config().max_position_embeddings - SAMPLE_TOKENS
        gaps = (gap for text in texts if (gap := cut_a_line(text)))
        return next((gap for gap in gaps if len(gap_prompt(*gap, self.tokenizer)) <= room), None)


def held_out(recipe: Recipe, limit: int) -> dict[str, list[str]]:
    """By source, documents of its validation split until `limit` bytes are reached."""
    seed, fraction = recipe.data_seed, recipe.data.validation_fraction
    return {
        source.name: take(documents(source.uri, "validation", seed=seed, validation_fraction=fraction), limit)
        for source in recipe.data.sources
    }


def take(found: Iterable[Document], limit: int) -> list[str]:
    """Whole texts until `limit` bytes of UTF-8 are reached."""
    texts, total = [], 0
    for document in found:
        if total >= limit:
            break
        texts.append(document.text)
        total += len(document.text.encode())
    return texts


def cut_a_line(text: str) -> tuple[str, str] | None:
    """What is around the first indented line past the first third of a text's first 60 lines; None where there is none."""
    lines = text.splitlines(keepends=True)[:60]
    for i in range(len(lines) // 3, len(lines) - 3):
        if lines[i].strip() and lines[i].startswith("    "):
            return "".join(lines[max(i - 8, 0) : i]), "".join(lines[i + 1 : i + 5])
    return None
