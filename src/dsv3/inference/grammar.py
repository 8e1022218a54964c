"""Grammars that constrain a continuation, through llguidance (the extra `grammar`)."""

import json
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError

KEPT = 64
"""Compiled grammars kept for reuse."""
TRIAL = "import sys, llguidance as g; g.LLMatcher(g.LLTokenizer('byte'), sys.stdin.read(), log_level=0)"


class Grammars:
    """Compiles grammars for one tokenizer; `vocab_size` is the model's, which may be larger than the tokenizer's.

    A grammar is first compiled in a process of its own, and refused if that takes longer than `seconds`: llguidance does not
    bound the time that combined patterns take, and a thread could not be stopped. Raises `UserError` without llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, seconds: float = 5.0):
        try:
            self.library = import_module("llguidance")
        except ImportError:
            raise UserError("grammars need the package llguidance: pip install 'dsv3[grammar]'") from None
        self.tokenizer, self.vocab_size, self.seconds = tokenizer, vocab_size, seconds
        self.compiled = lru_cache(KEPT)(self.compile)

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer in llguidance's form."""
        return self.library.LLTokenizer(self.tokenizer.json, n_vocab=self.vocab_size, eos_token=self.tokenizer.eos_id)

    def json_schema(self, schema: Mapping[str, Any] | str) -> "Grammar":
        """JSON that matches a schema, without free white space. Raises `UserError` for a schema that is wrong or too large."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            source = self.library.LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_flexible": False}, overrides=None
            )
        except ValueError as error:
            raise UserError(f"this JSON schema cannot be followed: {error}") from None
        return self.compiled(source)

    def regex(self, pattern: str) -> "Grammar":
        """Text that a regular expression matches in full."""
        return self.compiled(self.library.LLMatcher.grammar_from_regex(pattern))

    def compile(self, source: str) -> "Grammar":
        """From a grammar in llguidance's own form."""
        try:
            subprocess.run(
                [sys.executable, "-P", "-c", TRIAL], input=source.encode(), timeout=self.seconds, capture_output=True
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"this grammar cannot be followed: it takes more than {self.seconds:g} seconds to compile"
            ) from None
        state = self.library.LLMatcher(self.vocabulary, source, log_level=0)
        if state.is_error():
            raise UserError(f"this grammar cannot be followed: {state.get_error().splitlines()[0]}")
        return Grammar(state, -(-self.vocab_size // 32))


class Grammar:
    """One grammar and where a text stands in it, as llguidance's state; `words` are those of a mask."""

    def __init__(self, state: Any, words: int):
        self.state, self.words = state, words

    def copy(self) -> "Grammar":
        """For another continuation: takes microseconds, where compiling may take seconds."""
        return Grammar(self.state.deep_copy(), self.words)

    def masks(self, drafts: Sequence[int]) -> list[list[int]]:
        """Masks of the tokens allowed next, and after each of these drafts, which `right` has accepted: see `plan.Choice`."""
        masks = [self.mask()]
        for draft in drafts:
            self.state.consume_token(draft)
            masks.append(self.mask())
        if drafts:
            self.state.rollback(len(drafts))
        return masks

    def mask(self) -> list[int]:
        """A bit for each token allowed next, 32 a word."""
        size = 4 * self.words
        return list(struct.unpack(f"<{self.words}I", self.state.compute_bitmask()[:size].ljust(size, b"\0")))

    def right(self, drafts: list[int]) -> list[int]:
        """The drafts up to the first that the grammar refuses."""
        return drafts[: self.state.validate_tokens(drafts)]

    def accept(self, token: int) -> None:
        """Advances by a token."""
        self.state.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self.state.is_stopped()) and not self.failed

    @property
    def failed(self) -> str:
        """Why llguidance gave up, such as a state beyond its limits; "" if it did not."""
        return str(self.state.get_error()).partition("\n")[0]
