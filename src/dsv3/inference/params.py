"""What a caller asks of a continuation; names, meanings and defaults as vLLM's users expect."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsv3.errors import UserError
from dsv3.inference.grammar import Grammar


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Raises `UserError` naming the field for a value out of range."""

    n: int = 1
    """Continuations of one prompt."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Samples from the smallest set of most likely tokens whose probabilities sum up to this."""
    top_k: int = 0
    """Samples from so many most likely tokens; 0 or -1: from all."""
    min_p: float = 0.0
    """Leaves out tokens whose probability is below this share of the largest."""
    max_tokens: int = 128
    min_tokens: int = 0
    """No token or stop text ends a continuation before it has so many tokens."""
    stop: Sequence[str] = ()
    """Texts (or one text) that end the continuation; they are not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the continuation, besides the end-of-sentence token."""
    seed: int | None = None
    """Makes a continuation reproducible, whatever else is in the batch; None: drawn at random."""
    logprobs: int | None = None
    """Returns each token's logprob before temperature and penalties, and those of so many likeliest."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occurred, in the prompt too, and multiplies negative ones (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit each time that it was generated."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these tokens."""
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    grammar: Grammar | None = field(default=None, compare=False)
    """What the text has to match."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        checks: list[tuple[str, bool, str]] = [
            ("n", self.n >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= -1, "the number of tokens to choose from, or 0 for all"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0, and finite"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
        ]
        for name, right, expected in checks:
            if not right:
                raise UserError(f"{name} = {getattr(self, name)}: expected {expected}")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which would end every continuation at once: leave it out")
        if not all(map(math.isfinite, (self.logit_bias or {}).values())):
            raise UserError("logit_bias holds a value that is not finite")

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
