"""From requests to answers: what each endpoint does, without HTTP.

Tokenising and compiling grammars run in threads of their own, with a time limit, after the request has got its place.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import TypeVar

from dsv3.data.chat import ChatTemplate, Prompt, text_of
from dsv3.data.fim import gap_prompt
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.inference.grammar import Grammar, Grammars
from dsv3.inference.params import SamplingParams
from dsv3.serving.answer import Answer
from dsv3.serving.choices import ChatChoices, Choices, CompletionChoices
from dsv3.serving.errors import ApiError, Overloaded
from dsv3.serving.metrics import Meter
from dsv3.serving.parsing import Parser
from dsv3.serving.protocol import ChatRequest, CompletionRequest, Message, Sampling, TokenizeRequest, Tool
from dsv3.serving.settings import Settings
from dsv3.serving.worker import Stream, Worker

T = TypeVar("T")
THREADS = 2
"""For tokenising, and as many for grammars."""
DEFAULT_MAX_TOKENS = 16
"""Of a completion, as OpenAI's; a chat completion may fill the context window."""


class Service:
    """A worker's model with its tokenizer, chat template and limits; `vocab_size` is the model's."""

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, template: ChatTemplate, vocab_size: int, settings: Settings
    ):
        self.worker, self.tokenizer, self.template = worker, tokenizer, template
        self.vocab_size, self.settings = vocab_size, settings
        self._texts = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._grammars = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._longest_token = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    async def chat(self, request: ChatRequest, tenant: str) -> Answer:
        """`/v1/chat/completions`. Raises an error for a request that is refused."""
        self.check_model(request.model)
        with ExitStack() as place:
            stream = place.enter_context(self.worker.open(f"chatcmpl-{secrets.token_hex(12)}", request.choices))
            tools = () if request.tool_choice == "none" else request.tools or ()
            grammar = await self._grammar(request)
            prompt = await self._tokenize(self._render, request.messages, tools, request.call, grammar is not None)
            chosen = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
            if chosen == 0:
                raise ApiError("max_tokens: expected 1 or more", param="max_tokens")
            room = self._room(prompt.ids, chosen or 1)
            params = request.sampling_params(max_tokens=chosen or room, logprobs=request.logprob_count, grammar=grammar)
            parsers = [Parser(prompt.thinking, bool(tools), request.call) for _ in range(request.choices)]
            choices = ChatChoices(request, prompt.ids, self.tokenizer, parsers)
            return await self._answer(place, stream, choices, params, tenant)

    async def complete(self, request: CompletionRequest, tenant: str) -> Answer:
        """`/v1/completions`. Raises an error for a request that is refused."""
        self.check_model(request.model)
        with ExitStack() as place:
            sequences = len(request.prompts) * request.choices
            stream = place.enter_context(self.worker.open(f"cmpl-{secrets.token_hex(12)}", sequences))
            grammar = await self._grammar(request)
            ids = await self._tokenize(self._prompts, request)
            max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
            for each in ids:
                self._room(each, max_tokens)
            echo = await self._tokenize(self._echo, request, ids)
            params = request.sampling_params(
                max_tokens=max(max_tokens, 1), logprobs=request.logprobs, grammar=grammar,
                prompt_logprobs=request.logprobs if request.echo else None,
            )  # fmt: skip
            choices = CompletionChoices(request, ids, self.tokenizer, echo)
            return await self._answer(place, stream, choices, params, tenant)

    async def _answer(
        self, place: ExitStack, stream: Stream, choices: Choices, params: SamplingParams, tenant: str
    ) -> Answer:
        """Starts a request and hands its place over to the answer."""
        request, prompts = choices.request, choices.prompts
        salt = f"{tenant}:{request.cache_salt}"
        await self.worker.submit(stream, prompts, params, salt, request.return_routing)
        meter = Meter(self.worker.metrics, prompts, stream.began)
        return Answer(place.pop_all(), stream, choices, meter, self.settings)

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """`/tokenize`."""
        self.check_model(request.model)
        if request.messages is None:
            return await self._tokenize(self._ids, request.prompt or "", None, request.add_special_tokens)
        return (await self._tokenize(self._render, request.messages, request.tools or ())).ids

    async def detokenize(self, tokens: list[int]) -> str:
        """`/detokenize`."""
        return await self._tokenize(self.tokenizer.decode, tokens)

    def check_model(self, name: str | None) -> None:
        """Refuses another model's name."""
        if name is not None and name != self.settings.name:
            raise ApiError(
                f"the model {name!r} is not served here, but {self.settings.name!r} is", 404, "model_not_found", "model"
            )

    async def _grammar(self, request: Sampling) -> Grammar | None:
        schema = request.answer_schema
        if schema is None:
            return None
        return await self._off_loop(self._grammars, lambda: self._compiler.json_schema(schema))

    @cached_property
    def _compiler(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size, self.settings.prepare_seconds / 2)

    async def _tokenize(self, work: Callable[..., T], *arguments: object) -> T:
        return await self._off_loop(self._texts, work, *arguments)

    async def _off_loop(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> T:
        """Runs in another thread; raises `Overloaded` after the time limit, though the thread still runs to its end."""
        try:
            async with asyncio.timeout(self.settings.prepare_seconds):
                return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
        except TimeoutError:
            seconds = self.settings.prepare_seconds
            raise Overloaded(f"preparing this request took longer than {seconds:g} seconds: try again") from None

    def _render(
        self, messages: list[Message], tools: Sequence[Tool], call: str | None = None, answer_now: bool = False
    ) -> Prompt:
        turns = [message.model_dump(exclude_none=True) for message in messages]
        self._check_length(sum(len(text_of(turn)) for turn in turns))
        return self.template.prompt(turns, [tool.model_dump(exclude_none=True) for tool in tools], call, answer_now)

    def _prompts(self, request: CompletionRequest) -> list[list[int]]:
        return [self._ids(each, request.suffix, request.add_special_tokens) for each in request.prompts]

    def _ids(self, prompt: str | list[int], suffix: str | None, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, list):
            if suffix:
                raise UserError("suffix needs a prompt that is a text")
            return prompt
        self._check_length(len(prompt) + len(suffix or ""))
        if suffix:
            return gap_prompt(prompt, suffix, self.tokenizer)
        begin = [self.tokenizer.bos_id] if add_special_tokens else []
        return begin + self.tokenizer.encode(prompt)

    def _echo(self, request: CompletionRequest, ids: list[list[int]]) -> list[str]:
        if not request.echo:
            return [""] * len(ids)
        return [
            given if isinstance(given, str) else self.tokenizer.decode(prompt)
            for given, prompt in zip(request.prompts, ids, strict=True)
        ]

    def _check_length(self, characters: int) -> None:
        """Refuses, before tokenising, a text that is too long whatever its tokens are."""
        if characters > self._longest_token * self.settings.max_model_len:
            raise ApiError(
                f"a prompt of {characters} characters is more than the {self.settings.max_model_len} tokens that fit",
                code="context_length_exceeded",
            )

    def _room(self, prompt: list[int], wanted: int) -> int:
        """How many tokens fit after a prompt; raises `ApiError` for fewer than `wanted`."""
        limit = self.settings.max_model_len
        if not prompt:
            raise ApiError("the prompt is empty: give it at least one token", param="prompt")
        if len(prompt) + max(wanted, 1) > limit:
            raise ApiError(
                f"{len(prompt)} tokens of prompt and {max(wanted, 1)} to generate are more than the {limit} tokens that fit: "
                "shorten the prompt or max_tokens",
                code="context_length_exceeded",
            )
        return limit - len(prompt)
