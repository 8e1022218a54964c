"""Grammars that a continuation has to follow, through llguidance (the extra `grammar`)."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError

WORD = 4
"""Bytes of a word of a mask."""


class Grammars:
    """Compiles grammars for one tokenizer; `vocab_size` is the model's, which may be larger than the tokenizer's.

    Raises `UserError` without llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        try:
            self.library = import_module("llguidance")
        except ImportError:
            raise UserError("grammars need the package llguidance: pip install 'dsv3[grammar]'") from None
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer as llguidance has it."""
        return self.library.LLTokenizer(self.tokenizer.json, n_vocab=self.vocab_size, eos_token=self.tokenizer.eos_id)

    def json_object(self) -> "Grammar":
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | str) -> "Grammar":
        """JSON that a schema accepts; white space as compact as usual. Raises `UserError` for a schema that is wrong or too large."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            source = self.library.LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_flexible": False}, overrides=None
            )
        except ValueError as error:
            raise UserError(f"this JSON schema cannot be followed: {error}") from None
        return self.checked(source)

    def regex(self, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole."""
        return self.checked(self.library.LLMatcher.grammar_from_regex(pattern))

    def checked(self, source: str) -> "Grammar":
        """Compiles it once, so that what is wrong with it shows here."""
        grammar = Grammar(self, source)
        error = grammar.matcher().state.get_error()
        if error:
            raise UserError(f"this grammar cannot be followed: {error}")
        return grammar


class Grammar:
    """One grammar; every continuation gets a matcher of its own."""

    def __init__(self, grammars: Grammars, source: str):
        self.grammars, self.source = grammars, source

    def matcher(self) -> "Matcher":
        """At the beginning of a text."""
        library, vocabulary = self.grammars.library, self.grammars.vocabulary
        return Matcher(library.LLMatcher(vocabulary, self.source, log_level=0), -(-self.grammars.vocab_size // 32))


class Matcher:
    """Where a continuation stands in its grammar."""

    def __init__(self, state: Any, words: int):
        self.state, self.words = state, words

    def masks(self, drafts: Sequence[int]) -> list[list[int]]:
        """Which tokens may come next, and after each of these drafts, which `right` has let through: see `plan.Choice`."""
        masks = [self.mask()]
        for draft in drafts:
            self.state.consume_token(draft)
            masks.append(self.mask())
        if drafts:
            self.state.rollback(len(drafts))
        return masks

    def mask(self) -> list[int]:
        """Which tokens may come next, 32 a word."""
        raw: bytes = self.state.compute_bitmask()
        raw = raw[: self.words * WORD].ljust(self.words * WORD, b"\0")
        return [int.from_bytes(raw[k : k + WORD], "little") for k in range(0, len(raw), WORD)]

    def right(self, drafts: list[int]) -> list[int]:
        """The drafts up to the first that the grammar refuses."""
        return drafts[: self.state.validate_tokens(drafts)]

    def accept(self, token: int) -> None:
        """Goes on behind a token."""
        self.state.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self.state.is_stopped())
