"""One continuation of a prompt on its way through the engine."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv3.inference.blocks import Key, key_after, root_key
from dsv3.inference.grammar import Grammar
from dsv3.inference.params import SamplingParams
from dsv3.inference.plan import Choice, Sampling, TokenLogprobs, Work
from dsv3.inference.text import TextSoFar


@dataclass(eq=False)
class Request:
    """The state of one continuation. `tokens`: the prompt and what was generated."""

    number: int
    """Unique in an engine."""
    request_id: str
    index: int
    """Among the continuations of one prompt."""
    tokens: list[int]
    params: SamplingParams
    seed: int
    salt: str
    ends: frozenset[int]
    """Tokens that end it."""
    text: TextSoFar
    routing: bool = False
    grammar: Grammar | None = None
    siblings: "list[Request]" = field(default_factory=list)
    """Continuations of the same prompt, which wait for this one to bring it into the cache."""
    prompt_length: int = field(init=False)
    sampling: Sampling = field(init=False)
    computed: int = 0
    """How many of the first tokens are in the cache."""
    cached: int | None = None
    """How many were there when it was first admitted."""
    admitted: float = 0.0
    """When that was, by `time.perf_counter`."""
    blocks: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    """Of its full blocks, as far as computed."""
    drafts: list[int] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, where asked for."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self.sampling = sampling_of(self.params, self.seed, self.ends, self.tokens)

    @property
    def generated(self) -> int:
        """How many tokens."""
        return len(self.tokens) - self.prompt_length

    @property
    def unscored(self) -> bool:
        """Whether prompt tokens are still to be scored, for which they have to be read."""
        return self.params.prompt_logprobs is not None and len(self.scores) < self.prompt_length - 1

    def key(self, block: int, size: int) -> Key:
        """The key of one of the full blocks."""
        while len(self.keys) <= block:
            k = len(self.keys)
            before = self.keys[-1] if self.keys else root_key(self.salt)
            self.keys.append(key_after(before, self.tokens[k * size : (k + 1) * size]))
        return self.keys[block]

    def work(self, count: int, ahead: int) -> Work:
        """The next `count` tokens, drafts included; `ahead`: how many known tokens after them to include, one at least."""
        start, end = self.computed, self.computed + count
        known = len(self.tokens)
        choice = self.choice(end - known) if end >= known else None
        return Work(
            sequence=self.number,
            tokens=[*self.tokens[start:end], *self.drafts[: max(end - known, 0)]],
            start=start,
            blocks=list(self.blocks),
            following=self.tokens[end : end + max(ahead, 1)],
            choice=choice,
            scored=self.params.prompt_logprobs if self.unscored else None,
            routing=self.routing,
        )

    def choice(self, drafts: int) -> Choice:
        """How to choose the tokens after the last known one and after each of so many drafts."""
        return Choice(
            self.sampling,
            drafts,
            self.generated,
            self.tokens[self.prompt_length :] if self.sampling.prompt else [],
            [] if self.grammar is None else self.grammar.masks(self.drafts[:drafts]),
        )


def sampling_of(params: SamplingParams, seed: int, ends: Iterable[int], prompt: list[int]) -> Sampling:
    """What a request's parameters mean at every step."""
    return Sampling(
        seed=seed,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        bias=sorted((params.logit_bias or {}).items()),
        banned=sorted(ends),
        banned_until=params.min_tokens,
        prompt=list(prompt) if params.penalised else [],
        logprobs=params.logprobs,
    )
