"""Text in, text out: a model with its tokenizer, on the engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.inference.engine import Delta, Engine, EngineConfig, FinishReason
from dsv3.inference.params import SamplingParams
from dsv3.inference.plan import TokenLogprobs
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.opening import load_model

Prompt = str | Sequence[int]
"""A text, in front of which a beginning-of-sentence token is put, or token ids as they are."""


@dataclass
class CompletionOutput:
    """One continuation."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list, repr=False)
    """The token that ended it included."""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum over the tokens, where asked for."""
        return None if self.logprobs is None else sum(each.logprob for each in self.logprobs)

    def take(self, delta: Delta) -> None:
        """Adds what one step gave."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass
class RequestOutput:
    """A prompt with its continuations."""

    request_id: str
    prompt: str | None
    """None for a prompt of token ids."""
    prompt_token_ids: list[int] = field(repr=False)
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether all continuations have ended."""
        return all(each.finish_reason is not None for each in self.outputs)


class LLM:
    """`LLM(path).generate(prompts, SamplingParams(...))`, as vLLM's users know it.

    `path` is a training checkpoint, the directory of a run, or a Hugging Face directory. `ema`: the average of the weights that
    a run kept, instead of its weights. `config`: the engine's sizes.
    """

    def __init__(
        self, path: str | Path, dtype: str | None = None, device: str = "auto", ema: bool = False,
        config: EngineConfig = EngineConfig(),
    ):  # fmt: skip
        model, tokenizer = load_model(path, dtype=dtype, device=device, ema=ema)
        self.attach(model, Tokenizer.load(tokenizer), config)

    @classmethod
    def of(cls, model: DeepSeekV3, tokenizer: Tokenizer, config: EngineConfig = EngineConfig()) -> "LLM":
        """From a model and a tokenizer at hand."""
        llm = cls.__new__(cls)
        llm.attach(model, tokenizer, config)
        return llm

    def attach(self, model: DeepSeekV3, tokenizer: Tokenizer, config: EngineConfig) -> None:
        """Takes a model and its tokenizer."""
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config

    @cached_property
    def engine(self) -> Engine:
        """Made at the first use, with its cache."""
        return Engine(self.model, self.tokenizer, self.config)

    def generate(
        self, prompts: str | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> list[RequestOutput]:
        """Continues all prompts together, each with its own params where several are given."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(each)} SamplingParams: give one for all, or one each")
        results = []
        try:
            for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                ids, outputs = self.ids(prompt), [CompletionOutput(index) for index in range(own.n)]
                self.engine.add(str(number), ids, own)
                results.append(RequestOutput(str(number), prompt if isinstance(prompt, str) else None, ids, outputs))
            while self.engine.has_work:
                for delta in self.engine.step():
                    result = results[int(delta.request_id)]
                    result.outputs[delta.index].take(delta)
                    result.prompt_logprobs = result.prompt_logprobs or delta.prompt_logprobs
                    result.num_cached_tokens = max(result.num_cached_tokens, delta.num_cached_tokens)
        finally:
            for result in results:
                self.engine.abort(result.request_id)
        return results

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Iterator[str]:
        """Yields pieces of one continuation as they come; whole characters only."""
        self.engine.add("stream", self.ids(prompt), params)
        try:
            while self.engine.has_work:
                for delta in self.engine.step():
                    yield delta.text
        finally:
            self.engine.abort("stream")

    def ids(self, prompt: Prompt) -> list[int]:
        """Its tokens."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        return list(prompt)
