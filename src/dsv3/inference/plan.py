"""What a pass computes, and its results: plain data, all that goes to the runner and comes back.

Nothing but numbers, texts and lists, so that a plan can be sent to several ranks as JSON (`pydantic.TypeAdapter(Plan)` reads and
writes it), which then cannot disagree about what they run.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen, the same at every step."""

    seed: int
    """With the step, it determines the random number of every choice."""
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: list[tuple[int, float]] = field(default_factory=list)
    """(token, what is added to its logit)."""
    banned: list[int] = field(default_factory=list)
    """Tokens that may not be chosen before step `banned_until`."""
    banned_until: int = 0
    prompt: list[int] = field(default_factory=list)
    """Only with penalties."""
    logprobs: int | None = None


@dataclass(frozen=True)
class Choice:
    """How to choose the token after each of the last 1 + `drafts` tokens of a work."""

    sampling: Sampling
    drafts: int
    """How many of the work's tokens, its last, are guesses."""
    step: int
    """Tokens generated before the first one chosen here."""
    output: list[int] = field(default_factory=list)
    """Only with penalties: the tokens of the continuation, without drafts."""
    masks: list[list[int]] = field(default_factory=list)
    """Only with a grammar: for each choice a bit mask of the allowed tokens, 32 a word, the first in the lowest bit."""


@dataclass(frozen=True)
class Work:
    """Tokens of one sequence to be read in a pass."""

    sequence: int
    tokens: list[int]
    start: int
    """Position of the first; all before it are in the cache."""
    blocks: list[int]
    """The sequence's cache blocks from position 0, with room for these tokens and for drafts after them."""
    following: list[int] = field(default_factory=list)
    """The next tokens where they are known, as many as MTP modules look ahead."""
    choice: Choice | None = None
    """None in the middle of a prompt."""
    scored: int | None = None
    """Asks for the logprobs of the prompt tokens after each of these, with so many of the likeliest; None: for none."""
    routing: bool = False
    """Whether to return the experts chosen."""


@dataclass(frozen=True)
class Plan:
    """One pass."""

    works: list[Work]
    drafts: int = 0
    """Tokens to guess after each chosen token."""


@dataclass
class TokenLogprobs:
    """How likely a token was by the model itself: before temperature, penalties and grammar."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely."""
    top: dict[int, float]
    """Logprobs of the likeliest tokens, the most likely first."""


@dataclass
class Found:
    """The results of one work."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    """The accepted drafts and one token more; none in the middle of a prompt."""
    drafts: list[int] = field(default_factory=list)
    """Guesses of the next tokens."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of `tokens`, where asked for."""
    scores: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens after those of the work, where asked for."""
    routing: list[list[list[int]]] = field(default_factory=list)
    """Where asked for: for each of `tokens`, by MoE block, the experts that the token before it chose."""
    failed: bool = False
    """The logits are not finite."""
