"""`/metrics` for Prometheus, under vLLM's names, so that its dashboards work.

The engine's own figures are read from its last statistics; a request's are observed as it runs.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dsv3.inference.engine import Delta, EngineStats

SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
ENGINE: dict[str, tuple[Any, str, str]] = {
    "num_requests_running": (GaugeMetricFamily, "running", "Requests in the batch."),
    "num_requests_waiting": (GaugeMetricFamily, "waiting", "Requests that wait for a place in it."),
    "kv_cache_usage_perc": (GaugeMetricFamily, "kv_cache_usage", "Share of the cache's blocks in use, 0 to 1."),
    "prompt_tokens": (CounterMetricFamily, "prompt_tokens", "Tokens of prompts that were computed or found."),
    "prompt_tokens_cached": (
        CounterMetricFamily,
        "prefix_cache_hits",
        "Tokens of prompts that were found in the cache.",
    ),
    "generation_tokens": (CounterMetricFamily, "generation_tokens", "Tokens generated."),
    "prefix_cache_queries": (CounterMetricFamily, "prefix_cache_queries", "Tokens looked for in the cache."),
    "prefix_cache_hits": (CounterMetricFamily, "prefix_cache_hits", "Tokens found in it."),
    "num_preemptions": (CounterMetricFamily, "preemptions", "Requests put back for want of blocks."),
    "spec_decode_num_drafts": (CounterMetricFamily, "drafts", "Times that tokens were drafted."),
    "spec_decode_num_draft_tokens": (CounterMetricFamily, "draft_tokens", "Tokens drafted."),
    "spec_decode_num_accepted_tokens": (CounterMetricFamily, "accepted_tokens", "Drafted tokens that were accepted."),
}
"""By vLLM's name: kind, field of the engine's statistics, help."""

HISTOGRAMS = {
    "time_to_first_token_seconds": "From the request to its first token.",
    "inter_token_latency_seconds": "Between two deltas of a sequence.",
    "request_time_per_output_token_seconds": "Mean time of a sequence's tokens after the first.",
    "e2e_request_latency_seconds": "From the request to its last token.",
    "request_queue_time_seconds": "From the request to its place in the batch.",
    "request_prefill_time_seconds": "From there to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_inference_time_seconds": "From the place in the batch to the last token.",
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of a continuation.",
    "iteration_tokens_total": "Tokens read in a step.",
}
"""Names that end in `seconds` are of times, others of counts."""


class Metrics:
    """All metrics of a server; `stats`: the engine's at its start."""

    def __init__(self, name: str, stats: EngineStats):
        self.registry = CollectorRegistry()
        self.labels = {"model_name": name, "engine": "0"}
        self._stats = stats
        self.registry.register(self)
        self._histograms = {
            name: Histogram(
                f"vllm:{name}", text, list(self.labels), buckets=SECONDS if name.endswith("seconds") else COUNTS,
                registry=self.registry,
            ).labels(**self.labels)
            for name, text in HISTOGRAMS.items()
        }  # fmt: skip
        self._success = Counter(
            "vllm:request_success",
            "Continuations that ended.",
            [*self.labels, "finished_reason"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "vllm:admission_rejections", "Requests refused with 429.", list(self.labels), registry=self.registry
        ).labels(**self.labels)

    def observe(self, **figures: float) -> None:
        """Adds one observation to each of these histograms."""
        for name, figure in figures.items():
            self._histograms[name].observe(figure)

    def step(self, stats: EngineStats) -> None:
        """Takes the engine's statistics after a step."""
        if stats.tokens_read > self._stats.tokens_read:
            self.observe(iteration_tokens_total=stats.tokens_read - self._stats.tokens_read)
        self._stats = stats

    def success(self, reason: str) -> None:
        """Counts a continuation that ended."""
        self._success.labels(**self.labels, finished_reason=reason).inc()

    def collect(self) -> Iterator[Metric]:
        """The engine's own figures, as `prometheus_client` asks for them."""
        labels, values = list(self.labels), list(self.labels.values())
        for name, (kind, field, text) in ENGINE.items():
            family = kind(f"vllm:{name}", text, labels=labels)
            family.add_metric(values, getattr(self._stats, field))
            yield family
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted drafts by position.", labels=[*labels, "position"]
        )
        for position, count in enumerate(self._stats.accepted_per_position):
            positions.add_metric([*values, str(position)], count)
        yield positions

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)


class Meter:
    """Times one request's sequences; `began`: when it arrived, by `time.perf_counter` as all times."""

    def __init__(self, metrics: Metrics, prompts: Sequence[list[int]], began: float):
        self._metrics, self._prompts, self._began = metrics, prompts, began
        self._seen: dict[tuple[int, int], tuple[float, float | None, int]] = {}
        """Of each sequence: times of its first and last delta, and its tokens so far."""

    def observe(self, number: int, delta: Delta) -> None:
        """One delta of the prompt with that number."""
        observe, now, key = self._metrics.observe, time.perf_counter(), (number, delta.index)
        first, last, tokens = self._seen.get(key, (now, None, 0))
        if last is None:
            observe(
                time_to_first_token_seconds=now - self._began,
                request_queue_time_seconds=delta.admitted - self._began,
                request_prefill_time_seconds=now - delta.admitted,
            )
        else:
            observe(inter_token_latency_seconds=now - last)
        tokens += len(delta.token_ids)
        self._seen[key] = (first, now, tokens)
        if delta.finish_reason is not None:
            self._metrics.success(delta.finish_reason)
            observe(
                e2e_request_latency_seconds=now - self._began,
                request_decode_time_seconds=now - first,
                request_inference_time_seconds=now - delta.admitted,
                request_prompt_tokens=len(self._prompts[number]),
                request_generation_tokens=tokens,
            )
            if tokens > 1:
                observe(request_time_per_output_token_seconds=(now - first) / (tokens - 1))
