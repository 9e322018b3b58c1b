"""What is measured, under the names that dashboards and load generators read."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vlcache_jax.serving.engine import Engine
from vlcache_jax.serving.ticket import Ticket

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server.

    Args:
        engine: what answers.
        model: its name, the label of all of them.
    """

    def __init__(self, engine: Engine, model: str):
        self.registry, self._model = CollectorRegistry(), model

        def made(kind: type, name: str, about: str, *labels: str, **options: object):
            return kind(name, about, ["model_name", *labels], registry=self.registry, **options)

        def count(name: str, about: str, *labels: str) -> Counter:
            return made(Counter, name, about, *labels)

        def seconds(name: str, about: str) -> Histogram:
            return made(Histogram, name, about, buckets=SECONDS).labels(model)

        def gauge(name: str, about: str, value: Callable[[], float]) -> None:
            made(Gauge, name, about).labels(model).set_function(value)

        self._prompt = count("vllm:prompt_tokens_total", "tokens of prompts").labels(model)
        self._generated = count("vllm:generation_tokens_total", "tokens of answers").labels(model)
        self._success = count(
            "vllm:request_success_total", "requests that were answered", "finished_reason"
        )
        self._cached = count(
            "vllm:prefix_cache_hits_total", "tokens of prompts that were kept from others"
        ).labels(model)
        self._e2e = seconds("vllm:e2e_request_latency_seconds", "from its coming to its end")
        self._first = seconds("vllm:time_to_first_token_seconds", "from its coming")
        self._between = seconds("vllm:inter_token_latency_seconds", "between two tokens")
        self._per_token = seconds(
            "vllm:request_time_per_output_token_seconds", "mean of an answer behind its first token"
        )
        self._queued = seconds("vllm:request_queue_time_seconds", "in the queue")
        self._prefill = seconds("vllm:request_prefill_time_seconds", "from the queue to the token")
        self._decode = seconds("vllm:request_decode_time_seconds", "behind the first token")
        self._full = count(
            "vlcache:full_cache_bytes_total", "what the prompts' whole caches would have taken"
        ).labels(model)
        self._kept = count("vlcache:kept_cache_bytes_total", "what was kept of them").labels(model)
        self._refused = count("vlcache:requests_refused_total", "requests with an error", "status")
        gauge("vllm:num_requests_running", "slots in use", lambda: engine.load.running)
        gauge("vllm:num_requests_waiting", "in the queue", lambda: engine.load.waiting)
        gauge(
            "vllm:kv_cache_usage_perc",
            "share of the slots in use",
            lambda: engine.load.running / engine.load.slots,
        )
        gauge("vlcache:prefix_bytes", "kept of prompts", lambda: engine.prefixes.bytes)

    def answered(self, ticket: Ticket) -> None:
        """Count an answer that is whole."""
        answer, times = ticket.answer, ticket.times
        tokens, decode = len(answer.tokens), times.ended - times.first
        self._prompt.inc(answer.prompt_tokens)
        self._generated.inc(tokens)
        self._cached.inc(ticket.cached_tokens)
        self._success.labels(self._model, answer.finish_reason).inc()
        self._e2e.observe(times.ended - times.submitted)
        self._first.observe(times.first - times.submitted)
        self._queued.observe(times.began - times.submitted)
        self._prefill.observe(times.first - times.began)
        self._decode.observe(decode)
        if tokens > 1:
            self._per_token.observe(decode / (tokens - 1))
            for _ in range(tokens - 1):
                self._between.observe(decode / (tokens - 1))
        self._full.inc(answer.cache.full_bytes)
        self._kept.inc(answer.cache.kept_bytes)

    def refused(self, status: int) -> None:
        """Count a request that ended with an error."""
        self._refused.labels(self._model, status).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
