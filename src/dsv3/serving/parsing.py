"""Splits an answer's text into reasoning, content and tool calls while it streams.

DeepSeek-V3 writes a call as `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a line break and its arguments between
```` ```json ```` and ```` ``` ````; V3.1 leaves out `function` and the fence. Text that may still become markup is held
back, so that the result does not depend on how the text is split.
"""

import re
import secrets
from collections.abc import Sequence
from typing import Any

from dsv3.data.tokenizer import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, THINK_BEGIN, THINK_END, TOOL_SEPARATOR
from dsv3.inference.text import overlap

HEADER = re.compile(
    rf"function{TOOL_SEPARATOR}\s*([^\s<{{`]+)\s*```(?:json)?\n|(?!function{TOOL_SEPARATOR})([^\s<]+){TOOL_SEPARATOR}"
)

Part = dict[str, Any]
"""What a delta of a chat completion carries: `reasoning_content`, `content` or `tool_calls`."""


class Parser:
    """One answer. `thinking`: the prompt has opened the reasoning. `call`: the prompt has begun a call of this function, "" of any."""

    def __init__(self, thinking: bool = False, tools: bool = False, call: str | None = None):
        self.tools = tools
        self.calls = 0
        """Calls begun so far."""
        self._held = ""
        self._out: list[Part] = []
        self._fenced = True
        self._state = self._reasoning if thinking else self._start
        if call:
            self._begin(call)
        elif call is not None:
            self._held, self._state = f"function{TOOL_SEPARATOR}", self._header

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._state == self._reasoning

    def push(self, text: str, last: bool = False) -> list[Part]:
        """The parts that `text` completes; with `last`, also all that was held back."""
        self._held += text
        while self._state(last):
            pass
        out, self._out = self._out, []
        return out

    def _start(self, last: bool) -> bool:
        if not last and len(self._held) < len(THINK_BEGIN) and THINK_BEGIN.startswith(self._held):
            return False
        thinks = self._held.startswith(THINK_BEGIN)
        self._held = self._held.removeprefix(THINK_BEGIN)
        self._state = self._reasoning if thinks else self._content
        return True

    def _reasoning(self, last: bool) -> bool:
        return self._until(THINK_END, "reasoning_content", self._gap, last)

    def _gap(self, last: bool) -> bool:
        self._held = self._held.lstrip("\n")
        if not self._held:
            return False
        self._state = self._content
        return True

    def _content(self, last: bool) -> bool:
        if self.tools:
            return self._until(CALLS_BEGIN, "content", self._between, last)
        self._emit("content", self._held)
        self._held = ""
        return False

    def _between(self, last: bool) -> bool:
        held = self._held.lstrip()
        if held.startswith(CALL_BEGIN):
            self._held, self._state = held.removeprefix(CALL_BEGIN), self._header
            return True
        if not last and (CALL_BEGIN.startswith(held) or CALLS_END.startswith(held)):
            return False
        self._held, self._state = held.removeprefix(CALLS_END), self._content
        return True

    def _header(self, last: bool) -> bool:
        if (found := HEADER.match(self._held)) is None:
            before, end, after = self._held.partition(CALL_END)
            if end or last:
                self._emit("content", before)
                self._held, self._state = after, self._between
            return bool(end)
        self._held, self._fenced = self._held[found.end() :], found[1] is not None
        self._begin(found[1] or found[2])
        return True

    def _begin(self, name: str) -> None:
        function = {"name": name, "arguments": ""}
        identity = f"call_{secrets.token_hex(12)}"
        self._out.append(
            {"tool_calls": [{"index": self.calls, "id": identity, "type": "function", "function": function}]}
        )
        self.calls += 1
        self._state = self._arguments

    def _arguments(self, last: bool) -> bool:
        text, found, after = self._held.partition(CALL_END)
        keep = 0 if found or last else overlap(text, CALL_END)
        shown = text[: len(text) - keep]
        if self._fenced:
            bare = shown.rstrip()
            shown = bare[: max(len(bare) - 3, len(bare.rstrip("`")))].rstrip()
        if shown:
            self._out.append({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": shown}}]})
        self._held = after if found else "" if last else text[len(shown) :]
        if found:
            self._state = self._between
        return bool(found)

    def _until(self, marker: str, kind: str, then: Any, last: bool) -> bool:
        before, found, after = self._held.partition(marker)
        keep = 0 if found or last else overlap(before, marker)
        self._emit(kind, before[: len(before) - keep])
        self._held = after if found else before[len(before) - keep :]
        if found:
            self._state = then
        return bool(found)

    def _emit(self, kind: str, text: str) -> None:
        if text:
            self._out.append({kind: text})


def merge(parts: Sequence[Part]) -> Part:
    """The whole message from the parts of a stream."""
    message, pieces = joined([{}, *parts]), dict[int, list[Part]]()
    for call in message.pop("tool_calls", ()):
        pieces.setdefault(call["index"], []).append(call)
    calls = [joined(each) for each in pieces.values()]
    for call in calls:
        del call["index"]
    message = {"role": "assistant", "content": None if calls else "", **message}
    return {**message, "tool_calls": calls} if calls else message


def joined(pieces: Sequence[Any]) -> Any:
    """Merges pieces of JSON: concatenates texts and lists, merges objects key by key, takes the last of anything else."""
    pieces = [piece for piece in pieces if piece is not None]
    match pieces:
        case [str(), *_]:
            return "".join(pieces)
        case [list(), *_]:
            return [item for piece in pieces for item in piece]
        case [dict(), *_]:
            keys = dict.fromkeys(key for piece in pieces for key in piece)
            return {key: joined([piece[key] for piece in pieces if key in piece]) for key in keys}
    return pieces[-1] if pieces else None
