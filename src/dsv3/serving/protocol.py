"""Requests: OpenAI's with vLLM's and DeepSeek's additions, every size bounded.

A field that is not listed is refused, as by OpenAI; fields that have no effect here are listed and ignored.
"""

import json
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dsv3.inference.params import SamplingParams
from dsv3.serving import settings

Natural = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Natural], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=settings.MAX_STOP_LENGTH)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Short = Annotated[str, Field(max_length=256)]


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema; raises `ValueError` for one that is too large or too deep to compile."""
    if depth(schema, settings.MAX_SCHEMA_DEPTH) > settings.MAX_SCHEMA_DEPTH:
        raise ValueError(f"expected at most {settings.MAX_SCHEMA_DEPTH} levels")
    if len(json.dumps(schema)) > settings.MAX_SCHEMA_BYTES:
        raise ValueError(f"expected at most {settings.MAX_SCHEMA_BYTES} bytes of JSON")
    return schema


def depth(value: object, limit: int) -> int:
    """Nesting levels of a JSON value, counted up to `limit` + 1."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None or limit < 0:
        return 0
    return 1 + max((depth(each, limit - 1) for each in inner), default=0)


Schema = Annotated[dict[str, Any], AfterValidator(check_schema)]


class Closed(BaseModel):
    """Refuses unknown fields and infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Message(BaseModel):
    """One turn. Other fields of an earlier answer that clients send back (`refusal`, `annotations`) are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: "str | list[TextPart] | None" = None
    reasoning_content: str | None = None
    tool_calls: "Annotated[list[ToolCall], Field(max_length=settings.MAX_TOOLS)] | None" = None
    tool_call_id: str | None = None
    prefix: bool = False
    """DeepSeek's: the answer continues this last message of the assistant."""


class TextPart(BaseModel):
    """The only kind of content that this model reads."""

    type: Literal["text"]
    text: str


class NamedFunction(BaseModel):
    """A function by its name."""

    name: Name


class FunctionCall(NamedFunction):
    """`arguments` is JSON in a string."""

    arguments: str = ""


class ToolCall(BaseModel):
    """An earlier call by the model."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(NamedFunction):
    """A function's description; `parameters` is a JSON schema."""

    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class ToolChoice(BaseModel):
    """The function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """The schema that the answer has to match."""

    model_config = ConfigDict(populate_by_name=True)

    name: Short = ""
    description: str | None = None
    strict: bool | None = None
    definition: Schema = Field(alias="schema")


class ResponseFormat(Closed):
    """`text`, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def complete(self) -> "ResponseFormat":
        """Requires a schema exactly where the type asks for it."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and has to be there with it")
        return self


class StreamOptions(Closed):
    """`include_usage`: a last chunk without choices counts tokens; `continuous_usage_stats`: every chunk does."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(Closed):
    """The fields of both kinds of completion. Nearly all may be None, which clients send for what was not chosen."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=settings.MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Natural | None = None
    min_tokens: Natural | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=settings.MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Natural], Field(max_length=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=settings.MAX_LOGIT_BIAS)] | None
    ) = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_routing: bool = False
    """Our own: the experts that every token was routed to."""
    cache_salt: Short = ""
    """Cached prefixes are shared only among requests with equal salts."""
    user: str | None = None

    @property
    def choices(self) -> int:
        """Continuations of one prompt."""
        return self.n or 1

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to match; None: any answer will do."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.definition

    def sampling_params(self, **fixed: Any) -> SamplingParams:
        """For the engine; `fixed`: the fields that each kind sets itself. Raises `UserError` for values that do not fit together."""
        asked = self.model_dump(include={each.name for each in fields(SamplingParams)}, exclude_none=True)
        return SamplingParams(**(asked | fixed))


class CompletionRequest(Sampling):
    """`/v1/completions`."""

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=settings.MAX_PROMPTS)]
    suffix: str | None = None
    """What follows the gap that the model fills."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=settings.MAX_TOP_LOGPROBS)] | None = None
    best_of: None = None
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompt or prompts as a list."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=settings.MAX_MESSAGES)]
    max_completion_tokens: Natural | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=settings.MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=settings.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[Short, str] | None = None
    store: bool | None = None
    service_tier: Short | None = None
    prompt_cache_key: Short | None = None
    safety_identifier: Short | None = None

    @model_validator(mode="after")
    def consistent(self) -> "ChatRequest":
        """Checks fields that depend on each other."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if any(message.prefix for message in self.messages[:-1]):
            raise ValueError("prefix belongs to the last message alone")
        if self.messages[-1].prefix and self.messages[-1].role != "assistant":
            raise ValueError("prefix belongs to a message of the assistant")
        if isinstance(self.tool_choice, ToolChoice) or self.tool_choice == "required":
            names = {tool.function.name for tool in self.tools or ()}
            if not names:
                raise ValueError("tool_choice asks for a call, but there are no tools")
            if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is none of the tools")
        return self

    @property
    def logprob_count(self) -> int | None:
        """Alternatives to return at each token; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def call(self) -> str | None:
        """The function that has to be called; "": any of several; None: no call is required."""
        if isinstance(self.tool_choice, ToolChoice):
            return self.tool_choice.function.name
        if self.tool_choice != "required":
            return None
        names = {tool.function.name for tool in self.tools or ()}
        return names.pop() if len(names) == 1 else ""

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """That of the arguments, where one function has to be called; else the answer's."""
        if self.call is None:
            return super().answer_schema
        parameters = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in self.tools or ()}
        return parameters.get(self.call)


class TokenizeRequest(Closed):
    """`/tokenize`: a text, or messages as in a chat completion."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=settings.MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=settings.MAX_TOOLS)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def one(self) -> "TokenizeRequest":
        """Requires exactly one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(Closed):
    """`/detokenize`."""

    model: str | None = None
    tokens: list[Natural]
