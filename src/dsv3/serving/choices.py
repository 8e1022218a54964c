"""What the engine yields, as the choices of a chat completion and of a completion."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.engine import Delta
from dsv3.serving.answer import Usage
from dsv3.serving.logprobs import CompletionLogprobs, chat_logprobs
from dsv3.serving.parsing import Parser, Part, merge
from dsv3.serving.protocol import ChatRequest, CompletionRequest, Sampling

Json = dict[str, Any]


class ChatChoices:
    """Of `/v1/chat/completions`: one prompt, `n` answers, each through a parser of its own."""

    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, request: ChatRequest, tokenizer: Tokenizer, usage: Usage, parsers: Sequence[Parser]):
        self._request, self._tokenizer, self._usage, self._parsers = request, tokenizer, usage, parsers
        self._parts: list[list[Part]] = [[] for _ in parsers]
        self._ends: list[Json] = [{"logprobs": {} if request.logprobs else None} for _ in parsers]

    def opening(self) -> list[Json]:
        """Every choice begins with its role."""
        role = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
            for index in range(len(self._parsers))
        ]

    def take(self, number: int, delta: Delta) -> Json:
        """See `Choices`."""
        parser, end = self._parsers[delta.index], self._ends[delta.index]
        self._usage.take(number, delta, reasoning=parser.reasoning)
        parts = parser.push(delta.text, last=delta.finish_reason is not None)
        self._parts[delta.index] += parts
        reason: str | None = delta.finish_reason
        if reason == "stop" and parser.calls:
            reason = "tool_calls"
        logprobs = chat_logprobs(self._tokenizer, delta.logprobs) if delta.logprobs is not None else None
        extra = extras(self._request, delta)
        grow(end, extra)
        grow(end["logprobs"], logprobs)
        end["finish_reason"] = reason
        return {
            "index": delta.index, "delta": joined(parts), "logprobs": logprobs, "finish_reason": reason, **extra
        }  # fmt: skip

    def whole(self) -> list[Json]:
        """See `Choices`."""
        return [
            {"index": index, "message": merge(parts), **end}
            for index, (parts, end) in enumerate(zip(self._parts, self._ends, strict=True))
        ]


class CompletionChoices:
    """Of `/v1/completions`: `n` continuations of each prompt, numbered prompt by prompt. `echo`: what is put in front of each."""

    kinds = ("text_completion", "text_completion")

    def __init__(
        self,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        usage: Usage,
        prompts: Sequence[list[int]],
        echo: Sequence[str],
    ):
        self._request, self._usage, self._prompts, self._echo = request, usage, prompts, echo
        count = len(prompts) * request.choices
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._ends: list[Json] = [{"logprobs": None if request.logprobs is None else {}} for _ in range(count)]
        self._shapes = [CompletionLogprobs(tokenizer) for _ in range(count)]
        self._begun: set[int] = set()

    def opening(self) -> list[Json]:
        """Nothing: the prompt is echoed with the first piece, beside its logprobs."""
        return []

    def take(self, number: int, delta: Delta) -> Json:
        """See `Choices`."""
        index = number * self._request.choices + delta.index
        if self._request.max_tokens == 0:
            # The engine generates one token at least.
            delta = replace(delta, text="", token_ids=[], logprobs=None, finish_reason="length")
        text, logprobs = delta.text, delta.logprobs or []
        self._usage.take(number, delta)
        shape: Json | None = None
        prompt_logprobs: list[Any] = []
        if index not in self._begun:
            self._begun.add(index)
            text = self._echo[number] + text
            prompt_logprobs = list(delta.prompt_logprobs or ()) if self._request.echo else []
        if self._request.logprobs is not None:
            shape = self._shapes[index].shape([*prompt_logprobs, *logprobs], self._prompts[number][0])
        end = self._ends[index]
        self._texts[index].append(text)
        extra = extras(self._request, delta)
        grow(end, extra)
        grow(end["logprobs"], shape)
        end["finish_reason"] = delta.finish_reason
        return {"index": index, "text": text, "logprobs": shape, "finish_reason": delta.finish_reason, **extra}

    def whole(self) -> list[Json]:
        """See `Choices`."""
        return [
            {"index": index, "text": "".join(texts), **end}
            for index, (texts, end) in enumerate(zip(self._texts, self._ends, strict=True))
        ]


def extras(request: Sampling, delta: Delta) -> Json:
    """What neither OpenAI nor DeepSeek has, where it is asked for."""
    extra: Json = {}
    if request.return_token_ids:
        extra["token_ids"] = delta.token_ids
    if request.return_routing:
        extra["routing"] = delta.routing or []
    return extra


def grow(whole: Json | None, piece: Json | None) -> None:
    """Appends a chunk's lists to the whole answer's."""
    for key, values in (piece or {}).items():
        assert whole is not None, "what was not asked for does not come"
        whole.setdefault(key, []).extend(values)


def joined(parts: list[Part]) -> Part:
    """The parts of one chunk as one: neighbours of a kind together, in the order in which they came."""
    out: Part = {}
    for part in parts:
        for kind, value in part.items():
            out[kind] = out[kind] + value if kind in out else value
    return out
