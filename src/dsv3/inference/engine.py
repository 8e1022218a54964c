"""The engine: requests in, pieces of continuations out, one forward pass a step."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import torch

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.inference.blocks import BlockPool
from dsv3.inference.cache import PagedCache, token_bytes
from dsv3.inference.params import SamplingParams
from dsv3.inference.plan import Found, TokenLogprobs, Work
from dsv3.inference.request import Request
from dsv3.inference.runner import Runner
from dsv3.inference.scheduler import Scheduler
from dsv3.inference.text import TextSoFar
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.latent_pages import PAGE
from dsv3.ops.tiles import TILE

SHARE_OF_FREE = 0.85
"""What the cache takes of a GPU's free memory by default; the rest is for activations."""
CPU_CACHE_BYTES = 1 << 28
FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. Without `num_blocks` and `cache_bytes` the cache takes most of a GPU's free memory, or 256 MiB."""

    num_blocks: int | None = None
    cache_bytes: int | None = None
    max_num_seqs: int = 256
    """Requests in one pass."""
    max_num_batched_tokens: int = 8192
    """Tokens in one pass."""
    num_speculative_tokens: int = 0
    """Drafts a pass; beyond the number of MTP modules the last one drafts again."""
    prefix_caching: bool = True
    max_model_len: int | None = None
    """Tokens of a prompt and its continuation."""
    cuda_graphs: bool = True
    """Whether decoding on a GPU is recorded, where no pass waits for the host."""
    fp8_cache: bool = False
    """Keeps latents in E4M3: 656 bytes a token and layer instead of 1152. Meant for GPUs."""


@dataclass
class Delta:
    """What one step adds to one continuation."""

    request_id: str
    index: int
    """Among the continuations of the prompt."""
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    """`stop`: an end token, a stop text or the end of the grammar; `length`: max_tokens; `abort`: logits not finite, or a failed grammar."""
    stop_reason: int | str | None = None
    """The token of `stop_token_ids`, the stop text, or the reason of an abort."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the cache."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Only in the first delta of a continuation; None for the first token."""
    routing: list[list[list[int]]] | None = None
    """For each token, by MoE block, the experts that the token before it chose."""
    admitted: float = 0.0
    """When the continuation joined the batch, by `time.perf_counter`."""


@dataclass
class EngineStats:
    """Totals since the start, and the present load."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    """0 to 1."""
    prompt_tokens: int = 0
    """Of all continuations' prompts, computed or cached."""
    generation_tokens: int = 0
    tokens_read: int = 0
    """Tokens of all passes: prompts', continuations' and drafts."""
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the cache."""
    prefix_cache_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    """How often drafts were verified."""
    draft_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()

    @property
    def accepted_tokens(self) -> int:
        """Of all positions."""
        return sum(self.accepted_per_position)


class Engine:
    """For a single thread: `add`, `abort` and `step` must not overlap. Without a tokenizer, deltas have no text."""

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer | None, config: EngineConfig = EngineConfig()):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        drafts = config.num_speculative_tokens
        check(model, config)
        reach = model.config.max_position_embeddings
        layers = [block.name for block in (model.blocks() if drafts else model.layers)]
        dtype = model.compute_dtype or model.lm_head.weight.dtype
        dtype = torch.uint8 if config.fp8_cache else dtype
        device = model.lm_head.weight.device
        most = config.max_num_seqs * (-(-(min(config.max_model_len or reach, reach) + 2 * drafts) // PAGE))
        blocks = config.num_blocks or min(most, affordable(model, config, len(layers), dtype))
        self.max_model_len = min(config.max_model_len or reach, reach, blocks * PAGE - 2 * drafts)
        if self.max_model_len < 2:
            raise UserError(f"a cache of {blocks} blocks of {PAGE} tokens is too small: give it more blocks or bytes")
        self.runner = Runner(model, PagedCache(model.config, layers, blocks, dtype, device), config.cuda_graphs)
        self.scheduler = Scheduler(
            BlockPool(blocks, PAGE), config.max_num_seqs, config.max_num_batched_tokens, drafts, len(model.mtp),
            config.prefix_caching,
        )  # fmt: skip
        self.numbers = count()
        self.requests: dict[str, list[Request]] = {}
        """By id, the continuations that have not ended."""
        self.counts = EngineStats(accepted_per_position=(0,) * drafts)

    def add(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, salt: str = "",
        return_routing: bool = False,
    ) -> None:  # fmt: skip
        """Queues the continuations of one prompt. Prompts with different salts share no cached prefix.

        Raises `UserError` for an id in use, tokens outside the vocabulary, an empty prompt, and one too long together with
        `max_tokens`.
        """
        if request_id in self.requests:
            raise UserError(f"there is a request {request_id!r} already: give each its own id")
        self.check_prompt(prompt_token_ids, params)
        eos = {self.model.config.eos_token_id} | ({self.tokenizer.eos_id} if self.tokenizer else set())
        ends = frozenset(params.stop_token_ids) if params.ignore_eos else frozenset(params.stop_token_ids) | eos
        seed = secrets.randbits(63) if params.seed is None else params.seed
        first, *others = self.requests[request_id] = [
            Request(
                next(self.numbers), request_id, index, list(prompt_token_ids), params,
                (seed + 0x9E3779B97F4A7C15 * 0x5851F42D * index) % 2**64, salt, ends, TextSoFar(self.tokenizer, params),
                return_routing, None if params.grammar is None else params.grammar.copy(),
            )
            for index in range(params.n)
        ]  # fmt: skip
        first.siblings = others
        self.scheduler.waiting.append(first)

    def check_prompt(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raises `UserError` for a prompt that cannot be continued."""
        vocab_size = self.model.config.vocab_size
        if not tokens:
            raise UserError("the prompt is empty: give it at least one token, such as the beginning-of-sentence token")
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise UserError(f"the prompt holds tokens outside the vocabulary: expected 0 to {vocab_size - 1}")
        named = [*params.stop_token_ids, *(params.logit_bias or {})]
        if named and not 0 <= min(named) <= max(named) < vocab_size:
            raise UserError(f"stop_token_ids and logit_bias name tokens of the vocabulary: 0 to {vocab_size - 1}")
        if len(tokens) + params.max_tokens > self.max_model_len:
            raise UserError(
                f"a prompt of {len(tokens)} tokens and max_tokens = {params.max_tokens} are more than the {self.max_model_len} "
                "tokens that this engine continues: shorten the prompt or max_tokens"
            )

    def abort(self, request_id: str) -> None:
        """Drops a request in any state, also one that has ended; there are no more deltas of it."""
        for request in self.requests.pop(request_id, []):
            self.scheduler.remove(request)

    def weights_changed(self) -> None:
        """To be called after the model's weights were changed in place: drops recordings and cached prefixes.

        Running requests keep their cache.
        """
        self.runner.passes.forget()
        for number in list(self.scheduler.pool.known.values()):
            self.scheduler.pool.forget(number)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.requests)

    def step(self) -> list[Delta]:
        """Schedules, runs and publishes one pass. Empty when it gives no tokens."""
        plan = self.scheduler.plan()
        if plan is None:
            return []
        works = {work.sequence: work for work in plan.works}
        self.counts.tokens_read += sum(len(work.tokens) for work in plan.works)
        running = self.scheduler.running
        deltas = [
            self.publish(running[found.sequence], works[found.sequence], found) for found in self.runner.run(plan)
        ]
        return [delta for delta in deltas if delta is not None]

    def publish(self, request: Request, work: Work, found: Found) -> Delta | None:
        """Applies a pass's results to one continuation."""
        # After a preemption, the prompt is scored again.
        request.scores += found.scores[max(len(request.scores) - work.start, 0) :]
        if work.choice is None:
            self.scheduler.advance(request, work, found)
            return None
        if work.choice.drafts:
            self.count_drafts(work.choice.drafts, max(len(found.tokens) - 1, 0))
        delta = Delta(
            request.request_id, request.index, "", [], num_cached_tokens=request.cached or 0, admitted=request.admitted
        )
        if not request.generated and request.params.prompt_logprobs is not None:
            delta.prompt_logprobs = [None, *request.scores]
        fault = "the logits are not finite" if found.failed else request.grammar.failed if request.grammar else ""
        if fault:
            delta.finish_reason, delta.stop_reason = "abort", fault
        for token in found.tokens:
            if delta.finish_reason is not None:
                break
            request.tokens.append(token)
            delta.token_ids.append(token)
            self.read(request, token, delta)
        told = len(delta.token_ids)
        self.counts.generation_tokens += told
        delta.logprobs = None if request.params.logprobs is None else found.logprobs[:told]
        delta.routing = found.routing[:told] if request.routing else None
        self.scheduler.advance(request, work, found)
        if request.grammar is not None and delta.finish_reason is None:
            request.drafts = request.grammar.right(request.drafts)
        self.scheduler.waiting += request.siblings
        request.siblings = []
        if delta.finish_reason is not None:
            self.scheduler.remove(request, found.failed)
            self.requests[request.request_id].remove(request)
            if not self.requests[request.request_id]:
                del self.requests[request.request_id]
        return delta

    def read(self, request: Request, token: int, delta: Delta) -> None:
        """Adds one token's text to a delta, and whether the continuation ends."""
        params, text = request.params, request.text
        search = request.generated >= params.min_tokens
        if search and token in request.ends:
            delta.finish_reason = "stop"
            delta.stop_reason = token if token in params.stop_token_ids else None
            delta.text += text.flush()
            return
        delta.text += text.push(token, search)
        if request.grammar is not None:
            request.grammar.accept(token)
        if text.stopped is not None:
            delta.finish_reason, delta.stop_reason = "stop", text.stopped
        elif request.grammar is not None and request.grammar.ended:
            delta.finish_reason = "stop"
            delta.text += text.flush()
        elif request.generated == params.max_tokens:
            delta.text += text.flush()
            delta.finish_reason, delta.stop_reason = ("length" if text.stopped is None else "stop"), text.stopped

    def count_drafts(self, drafts: int, accepted: int) -> None:
        """Updates the statistics."""
        self.counts.drafts += 1
        self.counts.draft_tokens += drafts
        self.counts.accepted_per_position = tuple(
            number + (k < accepted) for k, number in enumerate(self.counts.accepted_per_position)
        )

    def stats(self) -> EngineStats:
        """A snapshot."""
        scheduler = self.scheduler
        return replace(
            self.counts, running=len(scheduler.running),
            waiting=sum(map(len, self.requests.values())) - len(scheduler.running),
            kv_cache_usage=scheduler.pool.usage, prompt_tokens=scheduler.queries,
            prefix_cache_queries=scheduler.queries if self.config.prefix_caching else 0,
            prefix_cache_hits=scheduler.hits, preemptions=scheduler.preemptions,
        )  # fmt: skip


def continuations(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    """The tokens that continue each prompt."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, params)
    while engine.has_work:
        for delta in engine.step():
            tokens[int(delta.request_id)] += delta.token_ids
    return tokens


def check(model: DeepSeekV3, config: EngineConfig) -> None:
    """Raises `UserError` for sizes that are out of range, or that this model does not allow."""
    if config.num_speculative_tokens and not model.mtp:
        raise UserError(
            "the model has no MTP modules (num_nextn_predict_layers = 0), so nothing drafts: num_speculative_tokens = 0"
        )
    for name, right, expected in (
        ("max_num_seqs", config.max_num_seqs >= 1, "1 or more"),
        ("max_num_batched_tokens", config.max_num_batched_tokens >= 1, "1 or more"),
        ("num_speculative_tokens", 0 <= config.num_speculative_tokens <= 16, "0 to 16"),
    ):
        if not right:
            raise UserError(f"{name} = {getattr(config, name)}: expected {expected}")
    if config.fp8_cache and model.config.kv_lora_rank % TILE:
        raise UserError(
            f"an FP8 cache has a scale for every {TILE} elements of a latent, and kv_lora_rank = {model.config.kv_lora_rank} is no "
            "multiple of that: leave fp8_cache (--fp8-cache) out"
        )


def affordable(model: DeepSeekV3, config: EngineConfig, layers: int, dtype: torch.dtype) -> int:
    """The number of blocks that fit in the cache's memory."""
    device = model.lm_head.weight.device
    size = config.cache_bytes
    if size is None:
        size = int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE) if device.type == "cuda" else CPU_CACHE_BYTES
    return max(size // (layers * PAGE * token_bytes(model.config, dtype)), 1)
