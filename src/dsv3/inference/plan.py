"""What one pass is to compute, and what it found: plain data, all that goes to the runner and comes back.

Nothing but numbers, texts and lists, so that a plan can be sent to several ranks as JSON (`pydantic.TypeAdapter(Plan)` reads and
writes it), which then cannot disagree about what they run.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Choice:
    """How the token behind each of the last 1 + `drafts` tokens of a work is chosen."""

    drafts: int
    """The last tokens of the work that are guesses."""
    step: int
    """Tokens generated before the first that is chosen here."""
    seed: int
    """With the step, it decides the random number of every choice."""
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
    """Tokens that may not come before step `banned_until`."""
    banned_until: int = 0
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    """With penalties alone: the tokens of prompt and continuation, drafts excluded."""
    masks: list[list[int]] = field(default_factory=list)
    """With a grammar alone: for each choice the tokens it allows, 32 a word, the first in the lowest bit."""
    logprobs: int | None = None


@dataclass(frozen=True)
class Work:
    """Tokens of one sequence that are read in this pass."""

    sequence: int
    tokens: list[int]
    start: int
    """Position of the first; what lies before is in the cache."""
    blocks: list[int]
    """The sequence's cache blocks, from position 0, with room for the tokens and for drafts behind them."""
    following: list[int] = field(default_factory=list)
    """The tokens known to come behind, as far as MTP modules look ahead."""
    choice: Choice | None = None
    """None in the middle of a prompt."""
    scored: int | None = None
    """Whether the prompt's tokens behind those of the work are scored, and how many likelier ones are told."""
    routing: bool = False
    """Whether the experts chosen are told."""


@dataclass(frozen=True)
class Plan:
    """One pass."""

    works: list[Work]
    drafts: int = 0
    """Tokens to guess behind each token that is chosen."""


@dataclass
class TokenLogprobs:
    """How likely a token was, by the model itself: before temperature, penalties and grammar."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely."""
    top: dict[int, float]
    """The likeliest tokens' logarithms, the most likely first."""


@dataclass
class Found:
    """What a pass found out about one work."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    """The drafts that are right, and one token more; none in the middle of a prompt."""
    drafts: list[int] = field(default_factory=list)
    """Guesses of what comes behind."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of `tokens`, where asked for."""
    scores: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens behind those of the work, where asked for."""
    routing: list[list[list[int]]] = field(default_factory=list)
    """Where asked for: the experts that the token in front of each of `tokens` chose, by MoE block."""
    failed: bool = False
    """The logits are not finite."""
