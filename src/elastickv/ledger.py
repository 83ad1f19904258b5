"""The ledger as frozen values: what stands on one device's table of tenants, read in one piece.

The table itself is native (`elastickv._core.Ledger`). Reading it buries the dead first, so what is here was true when
it was read. All sizes are bytes; a limit of None is no limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import NotFound

__all__ = [
    "Counters",
    "DeviceView",
    "Histogram",
    "Histograms",
    "Limit",
    "Parts",
    "TenantView",
    "Usage",
    "open_ledger",
    "order_limit",
    "order_trim",
    "read_device",
]


@dataclass(frozen=True)
class Limit:
    """A limit and its revision. Revision 0: none was ever ordered."""

    bytes: int | None
    revision: int


@dataclass(frozen=True)
class Usage:
    """What a tenant's pool says of its pages, in bytes. `pinned`, the null block's, are among those used."""

    virtual_bytes: int = 0
    used: int = 0
    cached: int = 0
    mapped_free: int = 0
    transit: int = 0
    pinned: int = 0


@dataclass(frozen=True)
class Parts:
    """What a tenant holds, in bytes. The parts add up to what it has leased, weights and graphs included."""

    static: int
    used: int
    cached: int
    mapped_free: int
    transit: int

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True)
class Counters:
    """Since the tenant joined: leases refused, cached blocks dropped, give-backs asked, answered and answered late.

    Blocks are dropped for the tenant's own need, for a neighbour, for an order (a lowered limit, a trim), because the
    engine was idle for long, or because the cache was above its own byte budget.
    """

    misses: int = 0
    evicted_need: int = 0
    evicted_neighbour: int = 0
    evicted_limit: int = 0
    evicted_idle: int = 0
    evicted_budget: int = 0
    asked: int = 0
    answered: int = 0
    late: int = 0

    @property
    def evicted(self) -> int:
        """Cached blocks dropped, for whatever cause."""
        return self.evicted_need + self.evicted_neighbour + self.evicted_limit + self.evicted_idle + self.evicted_budget


@dataclass(frozen=True)
class Histogram:
    """How long something took, since the tenant joined, in microseconds.

    `counts` has one more element than `bounds`: what took longer than the last bound. Not cumulative.
    """

    counts: tuple[int, ...]
    sum: float

    @property
    def bounds(self) -> tuple[int, ...]:
        """Upper bounds of the buckets, inclusive."""
        return _core.LATENCY_BOUNDS_US

    @property
    def count(self) -> int:
        """Samples in all."""
        return sum(self.counts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Histogram:
        """One of a row's `histograms`."""
        return cls(counts=tuple(values["counts"]), sum=values["sum_ns"] / 1000)


@dataclass(frozen=True)
class Histograms:
    """What a tenant's processes measure.

    `lease_wait`: an allocation's wait for the neighbours, granted in the end or not. `map`, `unmap`: one extent, with
    all driver calls it took.
    """

    lease_wait: Histogram
    map: Histogram
    unmap: Histogram


@dataclass(frozen=True)
class TenantView:
    """One tenant, or the name of one that is gone (`alive` is false) and whose limit is kept for its restart."""

    slot: int
    name: str
    engine: str
    layout: str
    alive: bool
    incarnation: int
    pid: int
    since_unix_ns: int
    floor: int
    leased: int
    static_bytes: int
    static_used: int
    mapped: int
    limit_wanted: int | None
    limit_wanted_rev: int
    limit_now: bool
    limit_held: int | None
    limit_held_rev: int
    trim_wanted: int
    weight: int
    priority: int
    demand: int
    backlog: int
    demand_ticket: int
    demand_age_ns: int
    page_bytes: int
    usage: Usage
    counters: Counters
    histograms: Histograms

    @property
    def held(self) -> int:
        """Leased and static bytes: what counts against the device, the floor and the limit."""
        return self.leased + self.static_bytes

    @property
    def least(self) -> int:
        """What it cannot hold less than while its engine runs and does not sleep: static bytes and the null block."""
        return self.static_bytes + self.usage.pinned

    @property
    def parts(self) -> Parts:
        """What it holds, by use. Numbers that were published a moment apart are cut to what is leased."""
        usage, rest = self.usage, self.leased
        used = min(usage.used, rest)
        cached = min(usage.cached, rest - used)
        mapped_free = min(usage.mapped_free, rest - used - cached)
        return Parts(self.static_bytes, used, cached, mapped_free, rest - used - cached - mapped_free)

    @property
    def limit(self) -> int | None:
        """The limit that counts: what a running tenant goes by, or what is kept for the start of another."""
        return self.limit_held if self.alive else self.limit_wanted

    @property
    def asleep(self) -> bool:
        """Whether its engine says that it sleeps: "vllm 0.32.0, asleep: kv_cache, weights"."""
        return self.alive and ", asleep" in self.engine

    @property
    def wanted(self) -> Limit:
        """The limit that was ordered: no lease goes above it."""
        return Limit(self.limit_wanted, self.limit_wanted_rev)

    @property
    def applied(self) -> Limit:
        """The limit that the tenant has acknowledged."""
        return Limit(self.limit_held, self.limit_held_rev)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> TenantView:
        """One element of `_core.Ledger.view()["tenants"]`."""
        values = {field.name: row[field.name] for field in fields(cls)}
        measured = {name: Histogram.from_dict(one) for name, one in row["histograms"].items()}
        return cls(
            **{
                **values,
                "usage": Usage(**row["usage"]),
                "counters": Counters(**row["counters"]),
                "histograms": Histograms(**measured),
            }
        )


@dataclass(frozen=True)
class DeviceView:
    """One device: its capacity, what others than tenants hold, and its tenants in slot order."""

    device: str
    capacity: int
    unmanaged: int
    revision: int
    tenants: tuple[TenantView, ...]

    @property
    def living(self) -> tuple[TenantView, ...]:
        """The tenants that run; the others are names whose limit is kept."""
        return tuple(tenant for tenant in self.tenants if tenant.alive)

    @property
    def held(self) -> int:
        """The sum over the tenants."""
        return sum(tenant.held for tenant in self.tenants)

    @property
    def free(self) -> int:
        """What nobody holds; floors that are not met yet may have a claim on it."""
        return max(0, self.capacity - self.unmanaged - self.held)

    def tenant(self, name: str) -> TenantView:
        """The tenant of that name, alive or kept. NotFound otherwise."""
        for tenant in self.tenants:
            if tenant.name == name:
                return tenant
        names = ", ".join(tenant.name for tenant in self.tenants)
        there = f"there are: {names}" if names else "there is none"
        raise NotFound(f"no tenant named '{name}' on device '{self.device}'; {there}", tenant=name)

    @classmethod
    def from_dict(cls, view: Mapping[str, Any]) -> DeviceView:
        """What `_core.Ledger.view()` returns."""
        return cls(
            device=view["device"],
            capacity=view["capacity"],
            unmanaged=view["unmanaged"],
            revision=view["revision"],
            tenants=tuple(TenantView.from_dict(row) for row in view["tenants"]),
        )


def open_ledger(settings: Settings, device: str, capacity: int = 0) -> _core.Ledger:
    """Opens the device's ledger in the settings' directory, making it if `capacity` (bytes) is given.

    Raises NotFound without a ledger and a capacity, AccessDenied where the directory or a file is not private and
    ours, LedgerCorrupt for a damaged file or one of another version, AlreadyExists where tenants run at another
    capacity.
    """
    return _core.Ledger.open(str(settings.directory), device, capacity)


def read_device(ledger: _core.Ledger) -> DeviceView:
    """Reads the whole table now. DeadlineExceeded when another process sits on its lock."""
    return DeviceView.from_dict(ledger.view())


def order_limit(ledger: _core.Ledger, name: str, limit: int | None, timeout_ms: int, *, now: bool = False) -> Limit:
    """Orders a limit in bytes (None: no limit) and waits until the tenant has acknowledged it.

    Running requests above it are left to end, unless `now`: then they are preempted, and the acknowledgement says that
    the tenant holds no more than the limit.

    Raises NotFound for an unknown name, and for one that does not run: then the limit is kept for its restart.
    InvalidArgument under the floor; DeadlineExceeded when the tenant does not answer: no lease goes above it even so.
    """
    revision = ledger.order_limit(name, limit, now)
    ledger.wait_limit(name, revision, timeout_ms)
    return Limit(limit, revision)


def order_trim(ledger: _core.Ledger, name: str, size: int, timeout_ms: int) -> int:
    """Has a tenant give back `size` bytes once: free pages first, then cached ones, never used ones or its floor.

    Returns the bytes that it gives, which may be less or (whole extents) more; the device has them once the tenant's
    running step is through. Raises NotFound for a name that is unknown or does not run, InvalidArgument for no bytes,
    DeadlineExceeded when the tenant does not answer: the order stays open.
    """
    return ledger.wait_trim(name, ledger.order_trim(name, size), timeout_ms)
