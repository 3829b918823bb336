"""Metrics for Prometheus under vLLM's names, so that its dashboards and autoscalers work (vLLM's
vllm/v1/metrics/loggers.py)."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
TO_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
CHOICES = (1, 2, 5, 10, 20)
REASONS = {"end": "stop", "stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
LABELS = ("model_name", "engine")


@dataclasses.dataclass
class Progress:
    """What has been counted of a generation.

    Attributes:
      arrived: when its request came, `time.perf_counter()` seconds.
      n: answers of the request.
    """

    arrived: float
    n: int = 1
    tokens: int = 0
    last: float = 0.0


class Metrics:
    """The metrics of a server, in a registry of their own."""

    def __init__(self, model: str, scheduler: Any, context: int):
        """
        Args:
          scheduler: whose gauges and counters are read when metrics are.
          context: the largest number of tokens of a request, for the buckets of numbers of tokens.
        """
        self.registry = CollectorRegistry()
        self._model, self._scheduler = model, scheduler
        tokens = _series(context)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, image positions included.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._success = Counter(
            "vllm:request_success", "Requests by reason of their end.", (*LABELS, "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        seconds = self._histogram
        self._first_token = seconds("time_to_first_token_seconds", "From arrival to first token.", TO_FIRST_TOKEN)
        self._between = seconds("inter_token_latency_seconds", "Between tokens.", BETWEEN_TOKENS)
        self._per_token = seconds("request_time_per_output_token_seconds", "Mean between tokens.", BETWEEN_TOKENS)
        self._whole = seconds("e2e_request_latency_seconds", "From arrival to end.", LATENCY)
        self._queue = seconds("request_queue_time_seconds", "Waiting for a slot.", LATENCY)
        self._prefill = seconds("request_prefill_time_seconds", "From a slot to first token.", LATENCY)
        self._decode = seconds("request_decode_time_seconds", "From first token to end.", LATENCY)
        self._inference = seconds("request_inference_time_seconds", "In a slot.", LATENCY)
        self._request_prompt = seconds("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._request_generation = seconds("request_generation_tokens", "Generated tokens of a request.", tokens)
        self._max_tokens = seconds("request_params_max_tokens", "max_tokens of a request.", tokens)
        self._n = seconds("request_params_n", "n of a request.", CHOICES)
        self.registry.register(self)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def update(self, progress: Progress, generation: Any) -> None:
        """Count what is new of a generation. Called on the scheduler's thread, for each of its updates."""
        now, new = time.perf_counter(), len(generation.tokens) - progress.tokens
        if new and not progress.tokens:
            self._first_token.observe(now - progress.arrived)
            self._prompt_tokens.inc(generation.prompt.length)
            progress.last = now
        if between := new if progress.tokens else new - 1:
            for _ in range(between):  # tokens of one dispatch arrive together
                self._between.observe((now - progress.last) / between)
        if new > 0:
            self._generation_tokens.inc(new)
            progress.tokens, progress.last = progress.tokens + new, now
        if generation.done:
            self._finish(progress, generation, now)

    def _finish(self, progress: Progress, generation: Any, now: float) -> None:
        reason = REASONS[generation.stopped_by]
        self._success.labels(self._model, "0", reason).inc()
        self._whole.observe(now - progress.arrived)
        self._request_prompt.observe(generation.prompt.length)
        self._request_generation.observe(progress.tokens)
        self._n.observe(progress.n)
        self._max_tokens.observe(generation.sampling.max_new_tokens)
        queued, started, first = generation.queued_at, generation.started_at, generation.first_token_at
        if started is None:
            return
        self._queue.observe(started - queued)
        self._inference.observe(now - started)
        if first is not None:
            self._prefill.observe(first - started)
            self._decode.observe(now - first)
            if progress.tokens > 1:
                self._per_token.observe((now - first) / (progress.tokens - 1))

    def collect(self) -> Iterable[Metric]:
        """The scheduler's own numbers, as they are now."""
        scheduler, values = self._scheduler, (self._model, "0")
        counts = scheduler.statistics
        gauges = {
            "num_requests_running": ("Requests in a slot.", scheduler.running),
            "num_requests_waiting": ("Requests waiting for a slot.", scheduler.waiting),
            "kv_cache_usage_perc": ("The used part of the KV cache, 1 for all of it.", scheduler.cache_usage),
        }
        for name, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", about, labels=LABELS)
            gauge.add_metric(values, value)
            yield gauge
        counters = {
            "num_preemptions": ("Requests that lost their slot: this server takes none.", 0),
            "prefix_cache_queries": ("Prompt tokens looked up in the KV cache.", counts.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens whose KV were reused.", counts.cached_tokens),
            "mm_cache_queries": ("Images whose features were looked up.", counts.image_queries),
            "mm_cache_hits": ("Images whose features were reused.", counts.image_hits),
        }
        for name, (about, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", about, labels=LABELS)
            counter.add_metric(values, value)
            yield counter

    def _counter(self, name: str, about: str) -> Counter:
        counter = Counter(f"vllm:{name}", about, LABELS, registry=self.registry)
        return counter.labels(self._model, "0")

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", about, LABELS, registry=self.registry, buckets=buckets)
        return histogram.labels(self._model, "0")


def _series(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to a limit."""
    series = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]
    return tuple(n for n in series if n <= limit)
