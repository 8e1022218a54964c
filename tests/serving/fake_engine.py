"""An engine without a network: it continues every prompt with a text that is known beforehand."""

import time
from dataclasses import dataclass, field

from dsv3.errors import UserError
from dsv3.inference.engine import Delta, EngineStats
from dsv3.inference.plan import TokenLogprobs

TEXT = "Hello, naïve 😀 world! def add(first, second):\n    return first + second\n"


@dataclass
class Sequence:
    index: int
    ids: list[int]
    done: int = 0
    begun: bool = False
    stream: object = None


@dataclass
class FakeEngine:
    """`texts`: answers for the next requests, before `text`; `width`: tokens of a step, as with speculation; `seconds`: its length."""

    tokenizer: object
    text: str = TEXT
    texts: list[str] = field(default_factory=list)
    width: int = 1
    seconds: float = 0.0
    max_model_len: int = 512
    crash: bool = False
    give_up: bool = False

    def __post_init__(self):
        self.open, self.params, self.prompts, self.admitted, self.aborted, self.added = {}, {}, {}, {}, [], []
        self.counts = EngineStats()

    @property
    def has_work(self):
        return bool(self.open)

    def add(self, request_id, prompt_token_ids, params, *, salt="", return_routing=False):
        if request_id in self.open:
            raise UserError("duplicate id")
        if prompt_token_ids[0] >= self.tokenizer.vocab_size:
            raise UserError("tokens outside the vocabulary")
        ids = self.tokenizer.encode(self.texts.pop(0) if self.texts else self.text, specials=True)
        self.added.append((list(prompt_token_ids), params, salt, return_routing))
        self.admitted[request_id] = time.perf_counter()
        self.params[request_id], self.prompts[request_id] = params, list(prompt_token_ids)
        self.open[request_id] = [Sequence(i, ids[: params.max_tokens]) for i in range(params.n)]
        for each in self.open[request_id]:
            each.stream = self.tokenizer.stream()
        self.counts.prompt_tokens += len(prompt_token_ids)

    def abort(self, request_id):
        if self.open.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def step(self):
        time.sleep(self.seconds)
        self.counts.tokens_read += len(self.open)
        if self.crash:
            raise RuntimeError("the engine is broken")
        out = []
        for name, sequences in list(self.open.items()):
            out += [self.advance(name, each) for each in sequences]
            self.open[name] = [each for each in sequences if each.done < len(each.ids)]
            if not self.open[name]:
                del self.open[name]
        return out

    def advance(self, name, each):
        params = self.params[name]
        new = each.ids[each.done : each.done + self.width]
        each.done += len(new)
        text = "".join(map(each.stream.push, new))
        last = each.done >= len(each.ids)
        reason = ("length" if len(each.ids) == params.max_tokens else "stop") if last else None
        prompt_logprobs = None
        if not each.begun and params.prompt_logprobs is not None:
            prompt_logprobs = [None] + [logprobs(i, params.prompt_logprobs) for i in self.prompts[name][1:]]
        each.begun = True
        self.counts.generation_tokens += len(new)
        return Delta(
            name, each.index, text, new,
            [logprobs(i, params.logprobs) for i in new] if params.logprobs is not None else None,
            "abort" if self.give_up else reason, None, 2, prompt_logprobs, [[[1, 2], [3, 4]]] * len(new),
            self.admitted[name],
        )  # fmt: skip

    def stats(self):
        counts = EngineStats(**vars(self.counts))
        counts.running = len(self.open)
        return counts


def logprobs(token, count):
    top = {token: -0.25} | {i: -1.0 - i for i in range(5, 5 + count - 1)}
    return TokenLogprobs(token, -0.25, 1, dict(list(top.items())[:count]))
