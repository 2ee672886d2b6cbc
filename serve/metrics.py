"""What a monitor may know of the service, as Prometheus metrics (ADR 0012): names, meanings and buckets.

Knows nothing of how they are scraped. Counts of tokens, pages and sequences are the engine's own, read at each scrape; times are
observed as requests go on. Label values come from closed sets: no request, client or text is ever one.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.engine_client import EngineStats
from jaxserve.outputs import RequestTimings

LATENCY_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0
)  # fmt: skip
"""From 1 ms: a small model answers its first token within a few [s]."""

TOKEN_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0)
"""Between two tokens [s]."""

FINISH_REASONS = ("stop", "length", "repetition", "abort", "error")


class ServiceMetrics:
    """Every metric of one service, in a registry of its own.

    Args:
        model_name: value of the label that all of them carry.
        stats: reads the engine.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, stats))
        self._calls = Counter(
            "jaxserve_calls",
            "Calls of a front door that ended, refused ones included, by the status that the client got.",
            ("model_name", "endpoint", "status"),
            registry=self.registry,
        )
        self._model_name = model_name
        finished = Counter(
            "vllm:request_success",
            "Requests that the engine took and that ended, by reason: abort is a client that left or a server that stopped.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._finished = {reason: finished.labels(model_name, reason) for reason in FINISH_REASONS}
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From a call's arrival to its first token.", LATENCY_BUCKETS_S
        )
        self._inter_token = self._histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a request, as the engine made them.",
            TOKEN_BUCKETS_S,
        )
        self._end_to_end = self._histogram(
            "vllm:e2e_request_latency_seconds",
            "From a call's arrival to the last token of a complete answer.",
            LATENCY_BUCKETS_S,
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds",
            "From the engine's taking a request to the first step with it; of complete answers.",
            LATENCY_BUCKETS_S,
        )

    def observe_call(self, endpoint: str, status: str) -> None:
        self._calls.labels(self._model_name, endpoint, status).inc()

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def observe_end(self, finish_reason: str, arrived_s: float, timings: RequestTimings | None) -> None:
        """Counts a request that the engine took.

        Args:
            finish_reason: one of FINISH_REASONS.
            arrived_s: of the call it belongs to [s, time.monotonic].
            timings: the engine's, where it delivered the last token.
        """
        self._finished[finish_reason].inc()
        if finish_reason in ("abort", "error") or timings is None or timings.finished is None:
            return
        self._end_to_end.observe(timings.finished - arrived_s)
        if timings.scheduled is not None and timings.arrived is not None:
            self._queue.observe(timings.scheduled - timings.arrived)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, documentation, ("model_name",), buckets=buckets, registry=self.registry)
        return metric.labels(self._model_name)


class _EngineCollector(Collector):
    """The engine's books, read once a scrape."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]):
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        used_pages = stats.num_pages - stats.num_free_pages
        gauges = (
            ("vllm:num_requests_running", "Requests in the engine's batch.", stats.num_running),
            ("vllm:num_requests_waiting", "Requests that the engine took and has no room for yet.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", used_pages / max(stats.num_pages, 1)),
            (
                "jaxserve_compilations_since_ready",
                "Programs compiled since the server was ready; anything but 0 is a bug.",
                stats.num_compilations_since_ready,
            ),
        )
        counters = (
            ("vllm:prompt_tokens", "Tokens of the prompts that the engine took.", stats.num_prompt_tokens),
            ("vllm:prompt_tokens_cached", "Of these, tokens that the prefix cache spared.", stats.num_cached_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("vllm:num_preemptions", "Requests put back to wait, to be computed again.", stats.num_preemptions),
            ("jaxserve_steps", "Steps of the engine.", stats.num_steps),
        )
        for family, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, documentation, value in metrics:
                metric = family(name, documentation, labels=("model_name",))
                metric.add_metric((self._model_name,), value)
                yield metric
