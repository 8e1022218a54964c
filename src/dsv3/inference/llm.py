"""Text in, text out: a model with its tokenizer, on the engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv3.data.chat import ChatTemplate, Message, Tool
from dsv3.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from dsv3.errors import UserError
from dsv3.inference.engine import Delta, Engine, EngineConfig, FinishReason
from dsv3.inference.params import SamplingParams
from dsv3.inference.plan import TokenLogprobs
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.opening import load_model

Prompt = str | Sequence[int]
"""A text, which gets a beginning-of-sentence token in front, or token ids as they are."""


@dataclass
class CompletionOutput:
    """One continuation."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list, repr=False)
    """Including the token that ended it."""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum over the tokens, if logprobs were asked for."""
        return None if self.logprobs is None else sum(each.logprob for each in self.logprobs)

    def take(self, delta: Delta) -> None:
        """Adds the result of one step."""
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

    `path`: a training checkpoint, the directory of a run, or a Hugging Face directory. `ema`: load a run's averaged weights
    instead. `config`: the engine's sizes.
    """

    def __init__(
        self, path: str | Path, dtype: str | None = None, device: str = "auto", ema: bool = False,
        config: EngineConfig = EngineConfig(),
    ):  # fmt: skip
        model, directory = load_model(path, dtype=dtype, device=device, ema=ema)
        self.model, self.tokenizer, self.config = model.eval(), Tokenizer.load(directory), config
        self.directory: Path | None = directory

    @classmethod
    def of(cls, model: DeepSeekV3, tokenizer: Tokenizer, config: EngineConfig = EngineConfig()) -> "LLM":
        """From a model and a tokenizer in memory."""
        llm = cls.__new__(cls)
        llm.model, llm.tokenizer, llm.config, llm.directory = model.eval(), tokenizer, config, None
        return llm

    @cached_property
    def engine(self) -> Engine:
        """Created at the first use, with its cache."""
        return Engine(self.model, self.tokenizer, self.config)

    @cached_property
    def template(self) -> ChatTemplate:
        """The checkpoint's own chat template, or DeepSeek-V3's."""
        if self.directory is None:
            return ChatTemplate(CHAT_TEMPLATE, self.tokenizer)
        return ChatTemplate.load(self.directory, self.tokenizer)

    def generate(
        self, prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    ) -> list[RequestOutput]:  # fmt: skip
        """Continues all prompts together, with params for all or one for each."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = (
            [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else list(sampling_params)
        )
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(each)} SamplingParams: give one for all, or one each")
        results = [
            RequestOutput(
                str(number), prompt if isinstance(prompt, str) else None, self.ids(prompt),
                [CompletionOutput(index) for index in range(own.n)],
            )
            for number, (prompt, own) in enumerate(zip(prompts, each, strict=True))
        ]  # fmt: skip
        for delta in self.deltas([result.prompt_token_ids for result in results], each):
            result = results[int(delta.request_id)]
            result.outputs[delta.index].take(delta)
            result.prompt_logprobs = result.prompt_logprobs or delta.prompt_logprobs
            if delta.index == 0:  # the others find the whole prompt
                result.num_cached_tokens = delta.num_cached_tokens
        return results

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] = SamplingParams(), *,
        tools: Sequence[Tool] = (), chat_template: str | None = None, add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answers one conversation, or several together.

        `tools`: functions in OpenAI's form that all of them may call. `chat_template`: jinja2, instead of the checkpoint's own.
        The text is as the model wrote it, including the markup of reasoning and calls.
        """
        template = self.template if chat_template is None else ChatTemplate(chat_template, self.tokenizer)
        several: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [template.prompt(each, tools, add_generation_prompt=add_generation_prompt).ids for each in several]
        return self.generate(prompts, sampling_params)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams = SamplingParams()) -> Iterator[Delta]:
        """Yields what each step adds to the continuations of one prompt; texts end with whole characters.

        To stop before the end, close the iterator or drop it.
        """
        yield from self.deltas([self.ids(prompt)], [sampling_params])

    def deltas(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Iterator[Delta]:
        """What each step adds to the continuations of all prompts; a request's id is its prompt's index."""
        if self.engine.requests:
            raise UserError("another stream of this LLM is not at its end: read on, or close it")
        try:
            for number, (ids, own) in enumerate(zip(prompts, params, strict=True)):
                self.engine.add(str(number), ids, own)
            while self.engine.has_work:
                yield from self.engine.step()
        finally:
            for number in range(len(prompts)):
                self.engine.abort(str(number))

    def ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        return list(prompt)
