"""Numbers for Prometheus, under the names that dashboards of other servers use, with the prefix `kangaroo_`."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kangaroo_jax.inference.requests import Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# What the engine counts and has: (its name, ours, help).
_COUNTS = (
    ("tokens_cached", "prefix_tokens_hit", "Tokens of prompts that were remembered"),
    ("tokens_prefilled", "prefill_tokens", "Tokens of prompts that were read"),
    ("tokens_generated", "generation_tokens", "Tokens of answers"),
    ("frames_decoded", "frames_decoded", "Frames decoded"),
    ("frames_encoded", "frames_encoded", "Frames looked at by the ViT"),
    ("frames_reused", "frames_reused", "Frames whose vision tokens were remembered"),
    ("programs_compiled", "compilations", "Programs compiled"),
    ("decode_workers_replaced", "decode_workers_replaced", "Decoding processes that crashed or took too long"),
)


class Metrics:
    """Counts and times of requests, and what `now` says there is."""

    def __init__(self, now: Callable[[], Mapping[str, float]]) -> None:
        """`now`: the engine's numbers (`Engine.stats`) and the server's own; called when somebody asks."""
        self._registry = CollectorRegistry()
        self._now = now
        self._registry.register(self)  # type: ignore[arg-type]
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Requests by what became of them", ("status",))
        self._queried = self._counter("prefix_tokens_queried", "Tokens of prompts that were looked for in the memory")
        self._hits = self._counter("media_cache_hits", "Requests' media whose vision tokens were remembered")
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token")
        self.between = self._histogram("inter_token_latency_seconds", "Between two tokens", _SHORT_SECONDS)
        self.total = self._histogram("e2e_request_latency_seconds", "From a request to the end of its answer")
        self.queued = self._histogram("request_queue_time_seconds", "From a request to its place in the model")
        self.lag = self._histogram("loop_lag_seconds", "How late the event loop is", _SHORT_SECONDS)

    def status(self, status: int) -> None:
        """A request has ended."""
        self._requests.labels(str(status)).inc()

    def answered(self, usage: Usage) -> None:
        """An answer is whole."""
        self._queried.inc(usage.prompt_tokens)
        self.total.observe(usage.total)
        self.queued.observe(usage.queue)
        self.first_token.observe(usage.first_token)
        if usage.completion_tokens > 1:
            self.between.observe((usage.total - usage.first_token) / (usage.completion_tokens - 1))
        if usage.frames_reused:
            self._hits.inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What there is now; called by the registry."""
        now = self._now()
        for name, ours, what in _COUNTS:
            if name in now:
                yield CounterMetricFamily(f"kangaroo_{ours}", what, value=now[name])
        for name, what in (("running", "Requests that are being answered"), ("waiting", "Requests that wait")):
            value = now.get(name, 0) + (now.get("prefilling", 0) if name == "running" else 0)
            yield GaugeMetricFamily(f"kangaroo_requests_{name}", what, value=value)
        yield _labelled("slots", "Places for conversations, by what they do", "state", "slots_", now)
        yield _labelled(
            "slots_used", "Places in use, by the tokens that a conversation has there", "class", "used_", now
        )
        sizes = GaugeMetricFamily("kangaroo_cache_bytes", "What is remembered", labels=["level"])
        for level, name in (("conversations", "host_bytes"), ("vision", "bytes"), ("media_files", "media_bytes")):
            sizes.add_metric([level], now.get(name, 0))
        yield sizes

    def _counter(self, name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"kangaroo_{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"kangaroo_{name}", what, buckets=buckets, registry=self._registry)


def _labelled(name: str, what: str, label: str, prefix: str, now: Mapping[str, float]) -> GaugeMetricFamily:
    """Those of the numbers whose names begin with `prefix`; what comes after it is the value of the label."""
    family = GaugeMetricFamily(f"kangaroo_{name}", what, labels=[label])
    for key, value in now.items():
        if key.startswith(prefix):
            family.add_metric([key.removeprefix(prefix)], value)
    return family
