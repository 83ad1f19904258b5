"""Every metric that elastickv exports. docs/metrics.md shows this list, and the dashboard uses only what is in it.

Base units, as Prometheus has them: bytes and seconds. The labels are few: at most 64 tenants are on a device's ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["DEVICE", "EVICTED_BY", "METRICS", "Metric", "TENANT"]

DEVICE: Final = ("device",)
TENANT: Final = ("device", "tenant")
EVICTED_BY: Final = ("need", "neighbour", "limit", "idle", "budget")
"""Values of the label `cause`: why a cached block was dropped."""


@dataclass(frozen=True)
class Metric:
    """`name` without the `_total` of a counter and the `_bucket` of a histogram; `text` is its HELP line."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    text: str

    @property
    def exposed(self) -> str:
        """The name that a query for its value uses."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _gauge(name: str, text: str, labels: tuple[str, ...] = TENANT) -> Metric:
    return Metric(f"elastickv_{name}", "gauge", labels, text)


def _counter(name: str, text: str, labels: tuple[str, ...] = TENANT) -> Metric:
    return Metric(f"elastickv_{name}", "counter", labels, text)


def _histogram(name: str, text: str) -> Metric:
    return Metric(f"elastickv_{name}", "histogram", TENANT, text)


METRICS: Final[tuple[Metric, ...]] = (
    _gauge("up", "1 if the ledgers' directory could be read, 0 if not.", ()),
    _gauge("ledger_up", "1 if the device's ledger could be read, 0 if not: then nothing else of it is here.", DEVICE),
    _gauge("device_capacity_bytes", "Bytes that the tenants of the device may hold together.", DEVICE),
    _gauge("device_unmanaged_bytes", "Bytes of the device that processes outside elastickv hold.", DEVICE),
    _gauge(
        "device_free_bytes", "Bytes of the device that nobody holds; unmet floors may have a claim on them.", DEVICE
    ),
    _gauge("alive", "1 if the tenant runs, 0 if only its name and limit are kept."),
    _gauge("info", "1, with the engine, the cache's layout and the process id.", (*TENANT, "engine", "layout", "pid")),
    _gauge("start_time_seconds", "When the tenant joined, in seconds since 1970."),
    _gauge("virtual_bytes", "Addresses reserved for the tenant's cache."),
    _gauge("leased_bytes", "Bytes leased for the cache."),
    _gauge("static_reserved_bytes", "Bytes leased for what is no cache: weights, graphs."),
    _gauge("static_used_bytes", "Of these, bytes that are on the device now; less while the engine sleeps."),
    _gauge("mapped_bytes", "Cache bytes with device memory behind them."),
    _gauge("used_bytes", "Mapped bytes of pages that running requests use."),
    _gauge("cached_bytes", "Mapped bytes of pages that hold cached prefixes only: evicting gives them back."),
    _gauge("mapped_free_bytes", "Mapped bytes with nothing on them: given back at once."),
    _gauge("transit_bytes", "Leased bytes that are being mapped or unmapped."),
    _gauge("floor_bytes", "Bytes that stay promised to the tenant."),
    _gauge("limit_wanted_bytes", "The limit that was ordered; absent without a limit."),
    _gauge("limit_held_bytes", "The limit that the tenant has acknowledged; absent without a limit."),
    _gauge("limit_agreed", "1 if the ordered limit is acknowledged, 0 if not yet."),
    _gauge("trim_wanted_bytes", "Bytes of a trim that is not answered yet."),
    _gauge("weight", "The tenant's weight when memory is short."),
    _gauge("priority", "The tenant's priority: a higher one keeps its cache longer."),
    _gauge("demand_bytes", "Bytes asked for, refused and still waited for."),
    _gauge("backlog_bytes", "Bytes that the engine would take after these: requests that wait behind."),
    _gauge("demand_age_seconds", "For how long they have been waited for."),
    _counter("lease_misses", "Allocations that found no memory to lease at first."),
    _counter("evicted_blocks", "Cached blocks dropped, by cause.", (*TENANT, "cause")),
    _counter("give_backs_asked", "Times that a neighbour asked the tenant for memory."),
    _counter("give_backs_answered", "Of these, how many it answered."),
    _counter("give_backs_late", "Of these, how many it did not answer in time."),
    _histogram("lease_wait_seconds", "How long allocations waited for the neighbours, granted in the end or not."),
    _histogram("map_seconds", "How long mapping one extent took, with all its driver calls."),
    _histogram("unmap_seconds", "How long unmapping one extent took, with all its driver calls."),
)
