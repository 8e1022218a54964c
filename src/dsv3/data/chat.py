"""Messages to token ids: the checkpoint's own chat template, and what no message may do to it.

A template is rendered in jinja2's sandbox with a closed set of variables. Special tokens count where the template wrote
them: in a message their text is text, so that nobody ends a turn or opens a tool's output from inside one.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3.data import tokenizer as names
from dsv3.data.tokenizer import THINK_BEGIN, THINK_END, Tokenizer
from dsv3.errors import UserError

Message = Mapping[str, Any]
"""A turn in OpenAI's form: `role`, `content` (a text, parts of text, or None beside `tool_calls`), `tool_calls`, `tool_call_id`.
`prefix`: the answer goes on from this last message of the assistant, and from its `reasoning_content`."""
Tool = Mapping[str, Any]
"""A function that may be called, in OpenAI's form: `type`, `function` with `name`, `description`, `parameters`."""
ROLES = ("system", "developer", "user", "assistant", "tool")

CALL = f"{names.CALLS_BEGIN}{names.CALL_BEGIN}function{names.TOOL_SEPARATOR}"
NAMED = "%s\n```json\n"
"""How V3 begins to call a function."""
TOOL_TEXT = (
    "## Tools\nThese functions may be called; each is described as JSON:\n%s\n"
    'To call a function, answer with its name for NAME and a JSON object of its arguments for {"argument": "value"}:\n'
    + CALL
    + NAMED % "NAME"
    + f'{{"argument": "value"}}\n```{names.CALL_END}{names.CALLS_END}'
)
"""How tools are described to a model whose template does not mention them."""
FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
"""What a template may raise on messages that it was not written for."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. `thinking`: it ends inside an open reasoning section, which the answer continues."""

    ids: list[int]
    thinking: bool = False


class ChatTemplate:
    """The `chat_template` of a tokenizer's directory, or DeepSeek-V3's where there is none. Raises `UserError` for one that cannot be read."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals = {name: environment.globals[name] for name in ("range", "namespace", "dict")}
        environment.globals["raise_exception"] = refuse
        try:
            self._template = environment.from_string(source)
            self._lists_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template cannot be read: {error}") from None
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))))

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """From `chat_template.jinja` or `tokenizer_config.json` of a directory."""
        apart, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
        source = None
        if apart.is_file():
            source = apart.read_text(encoding="utf-8")
        elif config.is_file():
            source = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        return cls(source if isinstance(source, str) else names.CHAT_TEMPLATE, tokenizer)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), call: str | None = None, answer_now: bool = False,
        add_generation_prompt: bool = True,
    ) -> Prompt:  # fmt: skip
        """The ids that the assistant's next message continues; without `add_generation_prompt` they do not begin one.

        `call`: the function that the answer must call, "" for any. `answer_now`: reasoning that the template opens is closed again.
        Raises `UserError` for messages that the template refuses.
        """
        if not messages:
            raise UserError("a conversation without messages: give it one at least")
        mark = secrets.token_hex(16)
        turns = [self._turn(each, mark) for each in messages]
        described = self._guard(list(tools), mark)
        last = turns.pop() if messages[-1].get("prefix") else None
        try:
            if described and not self._lists_tools:
                turns = with_tools(turns, described)
            text = self._template.render(
                messages=turns, tools=described or None, add_generation_prompt=add_generation_prompt,
                bos_token=names.BOS, eos_token=names.EOS,
            )  # fmt: skip
        except FAULTS as error:
            raise UserError(f"the chat template cannot render these messages: {error}") from None
        thinking = text.rstrip("\n").endswith(THINK_BEGIN)
        if last is not None:
            reasoning, content = last.get("reasoning_content"), last["content"]
            if reasoning is not None:
                text += reasoning if thinking else f"{THINK_BEGIN}\n{reasoning}"
                thinking = True
            if content:
                text += f"\n{THINK_END}\n\n{content}" if thinking else content
                thinking = False
        if thinking and (answer_now or call is not None):
            text, thinking = f"{text}\n{THINK_END}\n\n", False
        if call is not None:
            text += CALL + (NAMED % call if call else "")
        return Prompt(self._encode(text, mark), thinking)

    def _turn(self, message: Message, mark: str) -> dict[str, Any]:
        """A message as templates expect it, its special tokens marked as text."""
        role, calls = message.get("role"), message.get("tool_calls")
        if role not in ROLES:
            raise UserError(f"a message has the role {role!r}: expected {', '.join(ROLES)}")
        turn: dict[str, Any] = {"role": "system" if role == "developer" else role}
        turn["content"] = None if calls and message.get("content") is None else text_of(message)
        turn |= {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}
        if message.get("prefix"):
            turn["reasoning_content"] = message.get("reasoning_content")
        return self._guard(turn, mark, spared=(THINK_BEGIN, THINK_END) if role == "assistant" else ())

    def _guard(self, value: Any, mark: str, spared: Sequence[str] = ()) -> Any:
        """The value with a mark inside each special token in its texts."""
        if isinstance(value, str):
            return self._special.sub(lambda m: m[0] if m[0] in spared else m[0][0] + mark + m[0][1:], value)
        if isinstance(value, Mapping):
            return {self._guard(key, mark): self._guard(each, mark, spared) for key, each in value.items()}
        return [self._guard(each, mark, spared) for each in value] if isinstance(value, list) else value

    def _encode(self, text: str, mark: str) -> list[int]:
        """Token ids; a special token that is marked is text."""
        found = list(self._special.finditer(text))
        starts, ends = [0, *(each.end() for each in found)], [*(each.start() for each in found), len(text)]
        plain = [text[start:end].replace(mark, "") for start, end in zip(starts, ends, strict=True)]
        first, *others = self._tokenizer.encode_batch(plain)
        special = [self._tokenizer.id(each[0]) for each in found]
        return first + [token for one, ids in zip(special, others, strict=True) for token in (one, *ids)]


def text_of(message: Message) -> str:
    """A message's content, its parts as one; "" where there is none."""
    content, texts = message.get("content"), list[str]()
    for part in content if isinstance(content, list) else [{"text": content or ""}]:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            raise UserError("a message's content is expected to be a text, or parts of text")
        texts.append(part["text"])
    return "".join(texts)


def with_tools(turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the tools described in its system message."""
    text = TOOL_TEXT % "\n".join(to_json(tool["function"]) for tool in tools)
    if turns and turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def to_json(value: Any, indent: int | None = None) -> str:
    """The `tojson` that Hugging Face's templates expect: no HTML escapes, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def refuse(message: str) -> NoReturn:
    """`raise_exception` of templates."""
    raise jinja2.TemplateError(message)
