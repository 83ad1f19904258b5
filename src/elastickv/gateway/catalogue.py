"""Every metric that the gateway exports beside those of the ledgers. docs/watching.md shows this list.

The label `model` is the name that requests use; at most 256 are told apart. `code` is the HTTP status, 499 where the
client went away before its answer ended.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from elastickv.telemetry.catalogue import Metric

__all__ = ["GATEWAY_METRICS", "Series"]

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_MODEL: Final = ("model",)

_REQUESTS: Final = Metric(
    "elastickv_gateway_requests", "counter", ("model", "code"), "Requests that ended, by the status the client got."
)
_PROMPT_TOKENS: Final = Metric(
    "elastickv_gateway_prompt_tokens", "counter", _MODEL, "Tokens of prompts, as estimated from the requests' bodies."
)
_OUTPUT_TOKENS: Final = Metric(
    "elastickv_gateway_output_tokens", "counter", _MODEL, "Tokens of answers that passed to clients."
)
_TTFT: Final = Metric(
    "elastickv_gateway_ttft_seconds",
    "histogram",
    _MODEL,
    "From a request's arrival to the first byte of its streamed answer, waiting and waking included.",
)
_TPOT: Final = Metric(
    "elastickv_gateway_tpot_seconds", "histogram", _MODEL, "Time of a streamed answer per token after the first."
)
_REQUEST: Final = Metric(
    "elastickv_gateway_request_seconds", "histogram", _MODEL, "From a request's arrival to the end of its answer."
)

GATEWAY_METRICS: Final[tuple[Metric, ...]] = (
    _REQUESTS,
    _PROMPT_TOKENS,
    _OUTPUT_TOKENS,
    _TTFT,
    _TPOT,
    _REQUEST,
    Metric("elastickv_gateway_waiting", "gauge", _MODEL, "Requests that wait in the gateway."),
    Metric("elastickv_gateway_running", "gauge", _MODEL, "Requests that engines work on."),
    Metric("elastickv_gateway_replicas", "gauge", _MODEL, "Engines that the model has."),
    Metric("elastickv_gateway_replicas_ready", "gauge", _MODEL, "Of them, those that can take requests."),
    Metric(
        "elastickv_gateway_state",
        "gauge",
        ("model", "state"),
        "1 for the model's state, 0 for the other states.",
    ),
    Metric(
        "elastickv_gateway_state_since_seconds", "gauge", _MODEL, "When it came into that state, in seconds since 1970."
    ),
)


class Series:
    """The counters and histograms of requests, registered in `registry`. Thread-safe, as prometheus-client's are."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = _counter(_REQUESTS, registry)
        self.prompt_tokens = _counter(_PROMPT_TOKENS, registry)
        self.output_tokens = _counter(_OUTPUT_TOKENS, registry)
        self.ttft = _histogram(_TTFT, registry, _SECONDS)
        self.tpot = _histogram(_TPOT, registry, _TOKEN_SECONDS)
        self.request = _histogram(_REQUEST, registry, _SECONDS)


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.text, metric.labels, registry=registry)


def _histogram(metric: Metric, registry: CollectorRegistry, bounds: tuple[float, ...]) -> Histogram:
    return Histogram(metric.name, metric.text, metric.labels, registry=registry, buckets=bounds)
