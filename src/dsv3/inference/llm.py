"""Text in, text out: a model with its tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.generate import generate
from dsv3.inference.sampling import SamplingParams
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.opening import load_model


@dataclass(frozen=True)
class Completion:
    """One finished continuation."""

    prompt: str
    text: str
    token_ids: list[int] = field(repr=False)
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop token or a stop text; `length`: max_tokens."""


class LLM:
    """`LLM(path).generate(prompts, SamplingParams(...))`, as vLLM's users know it.

    `path` is a training checkpoint, the directory of a run, or a Hugging Face directory. `ema`: the average of the weights that
    a run kept, instead of its weights.
    """

    def __init__(self, path: str | Path, dtype: str | None = None, device: str = "auto", ema: bool = False):
        model, tokenizer = load_model(path, dtype=dtype, device=device, ema=ema)
        self.attach(model, Tokenizer.load(tokenizer))

    @classmethod
    def of(cls, model: DeepSeekV3, tokenizer: Tokenizer) -> "LLM":
        """From a model and a tokenizer at hand."""
        llm = cls.__new__(cls)
        llm.attach(model, tokenizer)
        return llm

    def attach(self, model: DeepSeekV3, tokenizer: Tokenizer) -> None:
        """Takes a model and its tokenizer."""
        self.model, self.tokenizer = model.eval(), tokenizer

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams = SamplingParams()
    ) -> list[Completion]:
        """Continues all prompts together: texts (a beginning-of-sentence token is put in front) or token ids as they are."""
        parts = [_Part(self.tokenizer, params.stop) for _ in prompts]
        for sequence, text in self._run(prompts, params, parts):
            parts[sequence].text += text
        return [
            Completion(
                prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt), part.text, part.ids, part.reason
            )
            for prompt, part in zip(prompts, parts, strict=True)
        ]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams = SamplingParams()) -> Iterator[str]:
        """Yields pieces of one continuation as they come; whole characters only."""
        for _, text in self._run([prompt], params, [_Part(self.tokenizer, params.stop)]):
            yield text

    def _run(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams, parts: list["_Part"]
    ) -> Iterator[tuple[int, str]]:
        """(prompt's index, piece of text) as tokens come; the last piece of each prompt releases what was held back."""
        ids = [[self.tokenizer.bos_id, *self.tokenizer.encode(p)] if isinstance(p, str) else list(p) for p in prompts]
        ends = {*params.stop_token_ids} if params.ignore_eos else {*params.stop_token_ids, self.tokenizer.eos_id}
        steps = generate(self.model, ids, replace(params, stop_token_ids=tuple(ends), ignore_eos=True))
        stopped: set[int] | None = None
        while True:
            try:
                tokens = steps.send(stopped)
            except StopIteration:
                return
            stopped = set()
            for new in tokens:
                part = parts[new.sequence]
                yield new.sequence, part.push(new.token, ends, new.last)
                if part.reason == "stop":
                    stopped.add(new.sequence)


class _Part:
    """One continuation in the making. Text that could be the beginning of a stop text is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.stream, self.stop = tokenizer.stream(), stop
        self.text, self.held = "", ""
        self.ids: list[int] = []
        self.reason: Literal["stop", "length"] = "length"

    def push(self, token: int, ends: set[int], last: bool) -> str:
        """The text that one more token releases."""
        if token in ends:
            self.reason = "stop"
            return self.release(self.stream.flush(), everything=True)
        self.ids.append(token)
        text = self.stream.push(token) + (self.stream.flush() if last else "")
        return self.release(text, everything=last)

    def release(self, text: str, everything: bool) -> str:
        """What of the held and the new text may be shown."""
        self.held += text
        # The stop text that is complete first, so that it does not matter in which pieces the text comes.
        found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            shown, self.held, self.reason = self.held[: min(found)[1]], "", "stop"
            return shown
        keep = 0 if everything else max((overlap(self.held, stop) for stop in self.stop), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` may begin with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
