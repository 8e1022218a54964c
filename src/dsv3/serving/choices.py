"""From what the engine yields to OpenAI's JSON: the choices of a chat completion and of a completion."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.engine import Delta
from dsv3.inference.plan import TokenLogprobs
from dsv3.serving.logprobs import CompletionLogprobs, chat_logprobs
from dsv3.serving.parsing import Parser, joined, merge
from dsv3.serving.protocol import ChatRequest, CompletionRequest, Sampling

Json = dict[str, Any]


class Choices(ABC):
    """`n` choices of each prompt, numbered prompt by prompt, and their token counts."""

    kinds: ClassVar[tuple[str, str]]
    """`object` of a whole answer and of a chunk."""

    def __init__(self, request: Sampling, prompts: Sequence[list[int]]):
        self.request, self.prompts = request, prompts
        self._pieces: list[list[Json]] = [[] for _ in range(len(prompts) * request.choices)]
        self._cached: dict[int, int] = {}
        """Of each prompt, when its first continuation began: the others find in the cache what this one has read."""
        self._generated = self._reasoning = 0

    def opening(self) -> list[Json]:
        """Choices of the first chunks."""
        return []

    def take(self, number: int, delta: Delta) -> Json:
        """A chunk's choice, from a delta of the prompt with that number; kept for `whole`."""
        index = number * self.request.choices + delta.index
        if delta.index == 0:
            self._cached[number] = delta.num_cached_tokens
        self._generated += len(delta.token_ids)
        piece = {"index": index, **self._content(index, delta), "finish_reason": delta.finish_reason}
        # Not in OpenAI's or DeepSeek's API.
        if self.request.return_token_ids:
            piece["token_ids"] = delta.token_ids
        if self.request.return_routing:
            piece["routing"] = delta.routing or []
        self._pieces[index].append(piece)
        return piece

    @abstractmethod
    def _content(self, index: int, delta: Delta) -> Json:
        """The text and the logprobs of a choice's next piece."""

    def whole(self) -> list[Json]:
        """The choices of a whole answer."""
        return [joined(pieces) for pieces in self._pieces]

    def usage(self) -> Json:
        """Token counts so far, in OpenAI's and DeepSeek's fields."""
        prompt, cached = sum(map(len, self.prompts)), sum(self._cached.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": self._reasoning},
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
        }


class ChatChoices(Choices):
    """Of `/v1/chat/completions`: one prompt, `n` answers, each with its own parser."""

    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, request: ChatRequest, prompt: list[int], tokenizer: Tokenizer, parsers: Sequence[Parser]):
        super().__init__(request, [prompt])
        self._tokenizer, self._parsers = tokenizer, parsers

    def opening(self) -> list[Json]:
        """Every choice begins with its role."""
        role = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
            for index in range(len(self._parsers))
        ]

    def take(self, number: int, delta: Delta) -> Json:
        """See `Choices`; an answer that calls functions ends with `tool_calls` instead of `stop`."""
        piece = super().take(number, delta)
        if delta.finish_reason == "stop" and self._parsers[delta.index].calls:
            piece["finish_reason"] = "tool_calls"
        return piece

    def _content(self, index: int, delta: Delta) -> Json:
        parser = self._parsers[index]
        self._reasoning += len(delta.token_ids) if parser.reasoning else 0
        parts = parser.push(delta.text, last=delta.finish_reason is not None)
        logprobs = None if delta.logprobs is None else chat_logprobs(self._tokenizer, delta.logprobs)
        return {"delta": joined([{}, *parts]), "logprobs": logprobs}

    def whole(self) -> list[Json]:
        """See `Choices`."""
        return [{"message": merge([choice.pop("delta")]), **choice} for choice in super().whole()]


class CompletionChoices(Choices):
    """Of `/v1/completions`: `n` continuations of each prompt. `echo`: for each prompt, the text in front of its continuations."""

    kinds = ("text_completion", "text_completion")
    request: CompletionRequest

    def __init__(
        self, request: CompletionRequest, prompts: Sequence[list[int]], tokenizer: Tokenizer, echo: Sequence[str]
    ):
        super().__init__(request, prompts)
        self._echo = echo
        self._shapes = [CompletionLogprobs(tokenizer) for _ in self._pieces]

    def take(self, number: int, delta: Delta) -> Json:
        """See `Choices`."""
        if self.request.max_tokens == 0:
            # The engine generates one token at least.
            delta = replace(delta, text="", token_ids=[], logprobs=None, finish_reason="length")
        return super().take(number, delta)

    def _content(self, index: int, delta: Delta) -> Json:
        text, number, tokens = delta.text, index // self.request.choices, list[TokenLogprobs | None]()
        if not self._pieces[index]:  # the prompt is echoed with the first piece, beside its logprobs
            text = self._echo[number] + text
            tokens += (delta.prompt_logprobs or []) if self.request.echo else []
        if self.request.logprobs is None:
            return {"text": text, "logprobs": None}
        tokens += delta.logprobs or []
        return {"text": text, "logprobs": self._shapes[index].shape(tokens, self.prompts[number][0])}
