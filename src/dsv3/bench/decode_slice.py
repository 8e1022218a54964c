"""Decoding and prefill of a full-width slice of DeepSeek-V3 on one GPU (`dsv3 bench decode --slice`): all 256 experts of each layer in
FP8, through the engine's own passes, beside what memory and arithmetic allow and beside `transformers`.

Layers are timed by differences between slices of other depths; what 3 dense and 58 MoE layers and the rest (embedding, head) would
take together is extrapolated: no GPU holds them all, and communication between several is not in it.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from dsv3.bench.limits import Rates, least
from dsv3.bench.measure import Progress, Work, clear, synchronize, take_turns, track
from dsv3.bench.peers import continuation, import_transformers
from dsv3.bench.slices import DEPTHS, Layers, layers_of, of_depth, stored_network
from dsv3.errors import RunError, UserError
from dsv3.inference.batch import lay_out
from dsv3.inference.engine import Engine, EngineConfig
from dsv3.inference.params import SamplingParams
from dsv3.inference.passes import STEADY
from dsv3.inference.plan import Work as Reading
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.latent_pages import PAGE

GOAL = 1.5
"""Times the limit that a pass over the largest batch may take."""
PUBLISHED = {
    "DeepSeek online, H800, 5K tokens, EP144 (open-infra-index, day 6)": 14_800 / 8,
    "SGLang, 96 H100, 2K tokens, 256 sequences a GPU (lmsys.org, 2025-05-05)": 22_282 / 8,
    "vLLM, H200 cluster, wide EP (blog.vllm.ai, 2025-12-17)": 2_200.0,
    "TensorRT-LLM, 8 H200, 1K + 2K tokens, 1,024 at once (its DeepSeek-R1 guide)": 11_489 / 8,
    "TensorRT-LLM, 8 H200 for one sequence, with three drafts (same)": 158.0,
    "prefill: SGLang, 96 H100, 4K tokens (as above)": 50_302 / 8,
}
"""Whole systems, tokens a second and GPU (for one sequence: of all eight). Their experts are spread over many GPUs, so that each
reads few and computes them for the tokens of all; here one GPU reads all experts for the tokens of its own batch."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    batches: Sequence[int] = (1, 32, 128)
    contexts: Sequence[int] = (1024, 4096)
    prompt: int = 4096
    """Tokens of the prefill, in one pass."""
    calls: int = 30
    """Of each pass; and steps of the engine."""
    peer_batches: Sequence[int] = (1, 32)
    """Batches of `transformers`, with the shortest context."""
    peer_tokens: tuple[int, int] = (4, 20)
    """New tokens of its two runs: their difference is free of the prompt."""


@dataclass(frozen=True)
class Point:
    """One pass on the first slice, milliseconds."""

    name: str
    tokens: int
    """Of the pass: sequences, or the prompt."""
    context: int
    """Tokens of each sequence in the cache; 0 for a prompt."""
    milliseconds: float
    """The pass of the model."""
    limit: float
    bound: str
    experts: float
    """Chosen by some token, a layer, on average."""
    step: float | None = None
    """A whole step of the engine; its contexts end at `context`."""
    theirs: float | None = None
    """A token of `transformers.generate`, weights in BF16."""

    @property
    def times_the_limit(self) -> float:
        """1 is the fastest possible."""
        return self.milliseconds / self.limit


@dataclass(frozen=True)
class Whole:
    """The 61 layers, extrapolated: one GPU, no communication. Milliseconds."""

    name: str
    dense_layer: float
    moe_layer: float
    rest: float
    total: float
    limit: float
    tokens_per_second: float


@dataclass(frozen=True)
class SliceResult:
    """All of it."""

    shapes: Mapping[str, Any]
    rates: Rates
    points: list[Point]
    whole: list[Whole]
    peak_memory: int
    """Bytes of ours."""


def bench_slice(
    rates: Rates,
    device: torch.device,
    progress: Progress = lambda **_: None,
    config: ModelConfig | None = None,
    settings: Settings = Settings(),
) -> SliceResult:
    """On a GPU whose `rates` were measured; `config` stands for another network, which a CPU runs as well.

    Raises `UserError` where a context is too short for the steps of the engine, or `transformers` is missing.
    """
    base = config or ModelConfig.preset("deepseek-v3")
    reach = max(base.max_position_embeddings, *settings.contexts, settings.prompt)
    dense, moe = map(max, zip(*DEPTHS, strict=True))
    cut = of_depth(base, dense, moe).replace(max_position_embeddings=reach)
    progress(stage="weights in FP8", done=0, total=1)
    model = stored_network(cut, device)
    synchronize(device)
    progress(stage="weights in FP8", done=1, total=1)
    shapes = {"layers of the slices": DEPTHS, "batches": settings.batches, "contexts": settings.contexts}
    points, times = list[Point](), list[dict[str, float]]()
    for depth in DEPTHS:
        timed = Timed(layers_of(model, *depth), settings, device)
        times.append(timed.passes(progress))
        if depth == DEPTHS[0]:
            steps, config = timed.steps(progress), timed.model.config
            for name, (tokens, context) in timed.workloads.items():
                limit, experts = least(config, tokens, context, rates), timed.experts[name]
                of_limit = times[0][name], limit.milliseconds, limit.bound
                points.append(Point(name, tokens, context, *of_limit, experts, steps.get(name)))
        del timed
        clear()
    wholes = [whole(point, [each[point.name] for each in times], base, rates) for point in points]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    del model
    clear()
    theirs = transformers_times(of_depth(cut, *DEPTHS[0]), settings, device, progress)
    points = [replace(point, theirs=theirs.get(point.name)) for point in points]
    return SliceResult(shapes, rates, points, wholes, peak)


def name_of(batch: int, context: int) -> str:
    """A workload of decoding, in tables."""
    return f"batch {batch}, context {context:,}"


class Timed:
    """One slice on an engine of its own."""

    def __init__(self, model: DeepSeekV3, settings: Settings, device: torch.device):
        self.model, self.settings, self.device = model, settings, device
        largest = max(settings.batches)
        blocks = largest * (max(settings.contexts) // PAGE + 1)
        self.engine = Engine(
            model, None,
            EngineConfig(
                num_blocks=max(blocks, settings.prompt // PAGE + 1), max_num_seqs=largest, prefix_caching=False,
                max_num_batched_tokens=settings.prompt, cuda_graphs=device.type == "cuda",
            ),
        )  # fmt: skip
        for held in self.engine.runner.cache.held.values():
            held.normal_()
        self.workloads = {name_of(b, context): (b, context) for context in settings.contexts for b in settings.batches}
        self.workloads[f"prefill of {settings.prompt:,}"] = settings.prompt, 0
        self.experts: dict[str, float] = {}

    @torch.inference_mode()
    def passes(self, progress: Progress) -> dict[str, float]:
        """Milliseconds of the model's pass, by workload: replayed, as the engine decodes; prefill as it is."""
        found, passes, config = {}, self.engine.runner.passes, self.model.config
        stage = f"passes of {config.num_dense_layers} + {config.num_hidden_layers - config.num_dense_layers} layers"
        for name, (tokens, context) in track(self.workloads.items(), stage, progress):
            batch = lay_out(self.reads(tokens, context), config, self.device)
            row_N = torch.arange(0 if context else tokens - 1, tokens, device=self.device)
            for _ in range(STEADY):
                chosen = passes.main(batch, row_N)[2]
            touched = [float(len(expert.unique())) for expert in chosen]
            self.experts[name] = statistics.mean(touched) if touched else 0.0
            calls = self.settings.calls if context else max(3, self.settings.calls // 6)
            found[name] = milliseconds(partial(passes.main, batch, row_N), calls, self.device)
        passes.forget()
        return found

    def reads(self, tokens: int, context: int) -> list[Reading]:
        """One token behind a context for each of some sequences, or one prompt; random tokens."""
        drawn = torch.randint(self.model.config.vocab_size, (tokens,)).tolist()
        if not context:
            return [Reading(0, drawn, 0, list(range(-(-tokens // PAGE))))]
        pages = -(-context // PAGE)
        return [
            Reading(k, [token], context - 1, list(range(k * pages, (k + 1) * pages))) for k, token in enumerate(drawn)
        ]

    def steps(self, progress: Progress) -> dict[str, float]:
        """Milliseconds of a whole step of the engine, by workload: scheduling, pass, sampling and output."""
        found = {}
        decoding = {name: sizes for name, sizes in self.workloads.items() if sizes[1]}
        for name, (batch, context) in track(decoding.items(), "steps of the engine", progress):
            # Those read first go on while the others are read.
            reading = -(-batch * context // self.settings.prompt)
            count = self.settings.calls + 2 * STEADY + 1
            length = context - reading - count - 4
            if length < 1:
                raise UserError(
                    f"a context of {context} tokens is too short for {count} steps: take longer ones, or fewer calls"
                )
            params = SamplingParams(temperature=0, max_tokens=context - length, ignore_eos=True)
            prompts = torch.randint(self.model.config.vocab_size, (batch, length)).tolist()
            for k, prompt in enumerate(prompts):
                self.engine.add(str(k), prompt, params)
            begun: set[str] = set()
            while len(begun) < batch:
                begun |= {delta.request_id for delta in self.engine.step()}
            for _ in range(2 * STEADY):
                self.engine.step()
            seconds = take_turns({"step": self.engine.step}, self.settings.calls)["step"]
            if (still := self.engine.stats().running) != batch:
                raise RunError(f"{still} of {batch} sequences went on to the end of what was timed")
            found[name] = 1000 * statistics.median(seconds)
            for k in range(batch):
                self.engine.abort(str(k))
            self.engine.runner.passes.forget()
        return found


def milliseconds(work: Work, calls: int, device: torch.device) -> float:
    """Median of one call; on a GPU calls are queued, so that the host stays ahead."""
    work()
    if device.type != "cuda":
        return 1000 * statistics.median(take_turns({"": work}, calls)[""])
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(marks))


def whole(point: Point, times: Sequence[float], config: ModelConfig, rates: Rates) -> Whole:
    """From the times of the slices of `DEPTHS`."""
    layers, limit = Layers.of(times), least(config, point.tokens, point.context, rates).milliseconds
    total = layers.whole(config)
    return Whole(point.name, *layers, total, limit, 1000 * point.tokens / total)


def transformers_times(
    config: ModelConfig, settings: Settings, device: torch.device, progress: Progress
) -> dict[str, float]:
    """Milliseconds a token of `generate` with random weights in BF16, its cache growing, by workload."""
    library = import_transformers()
    content = library.DeepseekV3Config.from_dict(config.to_hf())
    with torch.device(device):
        peer = library.DeepseekV3ForCausalLM._from_config(
            content, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).eval()
    context, found = min(settings.contexts), {}
    few, many = settings.peer_tokens
    for batch in track(settings.peer_batches, "transformers", progress):
        prompts = torch.randint(config.vocab_size, (batch, context - many), device=device)
        spent = []
        for count in (few, few, many):  # the first does not count
            synchronize(device)
            started = time.perf_counter()
            continuation(peer, prompts, count)
            synchronize(device)
            spent.append(time.perf_counter() - started)
        found[name_of(batch, context)] = 1000 * (spent[2] - spent[1]) / (many - few)
    return found
