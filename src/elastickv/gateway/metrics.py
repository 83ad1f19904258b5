"""The gateway's page for Prometheus: its own series, and those that telemetry/ reads from the ledgers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from elastickv.gateway.base import ModelView
from elastickv.gateway.catalogue import GATEWAY_METRICS
from elastickv.gateway.states import State
from elastickv.gateway.stats import Stats
from elastickv.telemetry import LedgerCollector

__all__ = ["MetricsPage"]

_GAUGES: Final = tuple(metric for metric in GATEWAY_METRICS if metric.kind == "gauge")


class MetricsPage:
    """Renders /metrics. `directory`: of the ledgers. Thread-safe."""

    def __init__(self, directory: Path, stats: Stats) -> None:
        self._stats = stats
        self._ledgers = LedgerCollector(directory)

    def render(self, models: Sequence[ModelView], accept: str) -> tuple[bytes, str]:
        """The page and its content type, in the format that the header Accept asks for.

        Reads the ledgers, which may take as long as their locks are held: not for an event loop's thread.
        """
        encode, content_type = choose_encoder(accept)
        return encode(_Scrape(models, self._stats, self._ledgers)), content_type


class _Scrape(Collector):
    def __init__(self, models: Sequence[ModelView], stats: Stats, ledgers: LedgerCollector) -> None:
        self._models, self._stats, self._ledgers = models, stats, ledgers

    def collect(self) -> Iterable[Family]:
        return chain(self._stats.registry.collect(), _gauges(self._models), self._ledgers.collect())


def _gauges(models: Sequence[ModelView]) -> Iterator[Family]:
    """States, queues and replicas."""
    families = {metric.name: GaugeMetricFamily(metric.name, metric.text, labels=metric.labels) for metric in _GAUGES}

    def put(name: str, labels: tuple[str, ...], value: float) -> None:
        families[f"elastickv_gateway_{name}"].add_metric(labels, value)

    for model in models:
        put("waiting", (model.name,), model.queued)
        put("running", (model.name,), model.outstanding)
        put("replicas", (model.name,), len(model.replicas))
        put("replicas_ready", (model.name,), sum(replica.ready for replica in model.replicas))
        put("state_since_seconds", (model.name,), model.since)
        for state in State:
            put("state", (model.name, state.value), int(model.state is state))
    yield from families.values()
