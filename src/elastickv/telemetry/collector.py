"""Reads ledgers when Prometheus asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from elastickv.ledger import DeviceView, Histogram, TenantView
from elastickv.telemetry.catalogue import EVICTED_BY, METRICS
from elastickv.telemetry.reader import LedgerReader

__all__ = ["LedgerCollector"]


class LedgerCollector(Collector):
    """The metrics of all ledgers in a directory, or of the tenants that `select` takes and the devices they are on.

    Thread-safe. A ledger that cannot be read is reported as such and hides no other.
    """

    def __init__(self, directory: Path, select: Callable[[TenantView], bool] | None = None) -> None:
        self.directory = directory
        self._select = select
        self._reader = LedgerReader(directory, "metrics")

    def describe(self) -> Iterable[Family]:
        """The metrics without values: registering needs no ledger."""
        return _Families().all()

    def collect(self) -> Iterator[Family]:
        """One scrape. Raises nothing of elastickv's."""
        families = _Families()
        families.gauge("up", (), int(self.directory.is_dir()))
        for device, view in self._reader.read():
            if view is None:
                families.gauge("ledger_up", (device,), 0)
                continue
            chosen = [tenant for tenant in view.tenants if self._select is None or self._select(tenant)]
            if chosen or self._select is None:
                families.gauge("ledger_up", (device,), 1)
                _add_device(families, view)
            for tenant in chosen:
                _add_tenant(families, device, tenant)
        yield from families.all()


class _Families:
    """The metrics of one scrape, as they fill up."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._histograms: dict[str, HistogramMetricFamily] = {}
        for metric in METRICS:
            if metric.kind == "histogram":
                family = HistogramMetricFamily(metric.name, metric.text, labels=metric.labels)
                self._families[metric.name] = self._histograms[metric.name] = family
            else:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                self._families[metric.name] = kind(metric.name, metric.text, labels=metric.labels)

    def all(self) -> list[Family]:
        return list(self._families.values())

    def gauge(self, name: str, labels: tuple[str, ...], value: float) -> None:
        family = self._families[f"elastickv_{name}"]
        family.add_sample(family.name, self._named(name, labels), value)

    def counter(self, name: str, labels: tuple[str, ...], value: float) -> None:
        family = self._families[f"elastickv_{name}"]
        family.add_sample(f"{family.name}_total", self._named(name, labels), value)

    def histogram(self, name: str, labels: tuple[str, ...], value: Histogram) -> None:
        bounds = [*(str(bound / 1e6) for bound in value.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(value.counts), strict=True))
        self._histograms[f"elastickv_{name}"].add_metric(labels, buckets, sum_value=value.sum / 1e6)

    def _named(self, name: str, values: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(_LABELS[f"elastickv_{name}"], values, strict=True))


_LABELS: Final = {metric.name: metric.labels for metric in METRICS}


def _add_device(families: _Families, view: DeviceView) -> None:
    labels = (view.device,)
    families.gauge("device_capacity_bytes", labels, view.capacity)
    families.gauge("device_unmanaged_bytes", labels, view.unmanaged)
    families.gauge("device_free_bytes", labels, view.free)


def _add_tenant(families: _Families, device: str, tenant: TenantView) -> None:
    labels = (device, tenant.name)
    families.gauge("alive", labels, int(tenant.alive))
    for name, limit in (("limit_wanted_bytes", tenant.wanted), ("limit_held_bytes", tenant.applied)):
        if limit.bytes is not None and (tenant.alive or name == "limit_wanted_bytes"):
            families.gauge(name, labels, limit.bytes)
    if not tenant.alive:  # nothing else of a name that is only kept means anything
        return
    families.gauge("limit_agreed", labels, int(tenant.wanted == tenant.applied))
    families.gauge("info", (*labels, tenant.engine, tenant.layout, str(tenant.pid)), 1)
    families.gauge("start_time_seconds", labels, tenant.since_unix_ns / 1e9)
    _add_sizes(families, labels, tenant)
    families.gauge("weight", labels, tenant.weight)
    families.gauge("priority", labels, tenant.priority)
    families.gauge("demand_bytes", labels, tenant.demand)
    families.gauge("backlog_bytes", labels, tenant.backlog)
    families.gauge("demand_age_seconds", labels, tenant.demand_age_ns / 1e9)
    counters, measured = tenant.counters, tenant.histograms
    families.counter("lease_misses", labels, counters.misses)
    for cause in EVICTED_BY:
        families.counter("evicted_blocks", (*labels, cause), getattr(counters, f"evicted_{cause}"))
    families.counter("give_backs_asked", labels, counters.asked)
    families.counter("give_backs_answered", labels, counters.answered)
    families.counter("give_backs_late", labels, counters.late)
    families.histogram("lease_wait_seconds", labels, measured.lease_wait)
    families.histogram("map_seconds", labels, measured.map)
    families.histogram("unmap_seconds", labels, measured.unmap)


def _add_sizes(families: _Families, labels: tuple[str, ...], tenant: TenantView) -> None:
    usage = tenant.usage
    for name, size in (
        ("virtual", usage.virtual_bytes),
        ("leased", tenant.leased),
        ("static_reserved", tenant.static_bytes),
        ("static_used", tenant.static_used),
        ("mapped", tenant.mapped),
        ("used", usage.used),
        ("cached", usage.cached),
        ("mapped_free", usage.mapped_free),
        ("transit", usage.transit),
        ("floor", tenant.floor),
        ("trim_wanted", tenant.trim_wanted),
    ):
        families.gauge(f"{name}_bytes", labels, size)
