"""A tenant's places on its devices, from before its engine loads until after it has gone.

The places come first: the limit is in force and acknowledged, and what the engine will hold besides its cache is leased
as static bytes, before a byte of the device is touched. A cache is added later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import LimitExceeded, Unavailable
from elastickv.ledger import DeviceView, TenantView, read_device
from elastickv.memory.capacity import open_device_ledger
from elastickv.memory.neighbours import Neighbours
from elastickv.units import format_size

__all__ = ["Tenancy", "attach_member"]

_ASK_AGAIN_US: Final = 50_000
"""A demand on the ledger lapses 0.1 s after its last refresh (ledger/policy.hpp)."""

_SAY_EVERY_S: Final = 5.0
_LOOK_EVERY_US: Final = 50_000

Say = Callable[[str], None]


def attach_member(place: Mapping[str, Any]) -> _core.Tenant:
    """Makes this process one of the tenant's: it lives, with what it leases, until the last of them has ended."""
    return _core.Ledger.open(place["directory"], place["device"]).attach(place["slot"], place["incarnation"])


class Tenancy:
    """The process that schedules holds it. `tenants`: by device. One thread, but for the one it has for limits."""

    def __init__(
        self, settings: Settings, ledgers: Mapping[str, _core.Ledger], tenants: Mapping[str, _core.Tenant]
    ) -> None:
        self.settings = settings
        self.tenants = dict(tenants)
        self._ledgers = dict(ledgers)
        self._neighbours = Neighbours(ledgers, headroom=settings.headroom)
        self._stopping = threading.Event()
        self._porter: threading.Thread | None = None

    @classmethod
    def join(cls, settings: Settings, devices: Sequence[str], *, engine: str = "") -> Tenancy:
        """Joins every device's ledger, or none: the name, floor, limit, weight and priority are the settings'."""
        ledgers = {device: open_device_ledger(device, settings) for device in dict.fromkeys(devices)}
        tenants: dict[str, _core.Tenant] = {}
        try:
            for device, ledger in ledgers.items():
                tenants[device] = ledger.join(
                    settings.tenant_name,
                    floor=settings.floor,
                    limit=settings.limit,
                    set_limit=settings.set_limit,
                    weight=settings.weight,
                    priority=settings.priority,
                    engine=engine,
                    lasting=settings.name is not None,
                )
        except BaseException:  # whatever it was, the names must be free again; it goes on to the caller
            for tenant in tenants.values():
                tenant.close()
            raise
        tenancy = cls(settings, ledgers, tenants)
        tenancy._neighbours.start()
        return tenancy

    def view(self, device: str) -> DeviceView:
        """The device's ledger as it stands."""
        return read_device(self._ledgers[device])

    def place(self, ranks: Sequence[str], *, publishes: bool) -> list[dict[str, Any]]:
        """What each rank's process needs to belong to the tenant (attach_member), as plain data.

        `publishes`: the rank is to say what it has of the static lease.
        """
        return [
            {
                "directory": str(self.settings.directory),
                "device": device,
                "slot": self.tenants[device].slot,
                "incarnation": self.tenants[device].incarnation,
                "publishes": publishes,
            }
            for device in ranks
        ]

    def budget(self, device: str) -> int:
        """The most bytes that a cache may ever hold there: limit or capacity, less what is leased besides."""
        limit = self.tenants[device].limit_wanted[0]
        capacity = self.view(device).capacity
        return max(0, min(capacity, capacity if limit is None else limit) - self.tenants[device].static_bytes)

    # --- limits, while there is no pool yet to answer them

    def acknowledge_limits(self) -> None:
        """A limit counts for new leases from the moment it stands on the ledger; this says so.

        One that is to hold now is acknowledged once it does.
        """
        for device, tenant in self.tenants.items():
            limit, revision = tenant.limit_wanted
            if revision == tenant.limit_held[1]:
                continue
            row = self.view(device).tenant(self.settings.tenant_name)
            if not row.limit_now or limit is None or row.held <= limit:
                tenant.acknowledge_limit(limit, revision)

    def watch_limits(self) -> None:
        """Has a thread acknowledge what is ordered from now on, until stop_watching()."""
        self._porter = threading.Thread(target=self._watch, name="elastickv-porter", daemon=True)
        self._porter.start()

    def stop_watching(self) -> None:
        """Ends that thread; it may be asked twice."""
        porter, self._porter = self._porter, None
        if porter is not None:
            self._stopping.set()
            porter.join(5.0)

    def _watch(self) -> None:
        first = next(iter(self.tenants.values()))
        while not self._stopping.is_set():
            seen = first.bell_word()
            self.acknowledge_limits()
            first.wait_bell(seen, _LOOK_EVERY_US)

    # --- static bytes

    @property
    def static_bytes(self) -> dict[str, int]:
        """What is leased besides the cache now, by device."""
        return {device: tenant.static_bytes for device, tenant in self.tenants.items()}

    def set_static(
        self, wanted: Mapping[str, int], wait_s: float, what: str, say: Say, meanwhile: Callable[[], None]
    ) -> None:
        """Makes the static lease of each device that `wanted` names as many bytes.

        What becomes smaller goes back at once. What becomes larger waits its turn for up to `wait_s` seconds: the
        neighbours are asked to give back, `say` is told every few seconds, and `meanwhile` is called in between.
        All devices get their bytes, or none: Unavailable says who holds what, LimitExceeded what the limit forbids.
        `what` names the bytes in these texts.
        """
        growth: list[tuple[str, int]] = []
        # In one order for everybody, so that two who wait for the same devices do not hold what the other needs.
        for device, size in sorted(wanted.items()):
            have = self.tenants[device].static_bytes
            if size < have:
                self.tenants[device].give_static(have - size)
            elif size > have:
                growth.append((device, size - have))
        if growth:
            self._grow(growth, wait_s, what, say, meanwhile)

    def _grow(
        self, growth: list[tuple[str, int]], wait_s: float, what: str, say: Say, meanwhile: Callable[[], None]
    ) -> None:
        began = time.monotonic()
        say_at = began
        while True:
            seen = {device: self.tenants[device].freed_word() for device, _ in growth}
            refused = self._take(growth)
            if refused is None:
                return
            device, more = refused
            tenant = self.tenants[device]
            self._check_limit(device, more, what)
            now = time.monotonic()
            if now >= began + wait_s:
                tenant.withdraw_demand()
                text = self._who_holds(device)
                raise Unavailable(
                    f"waited {now - began:.0f} s for {format_size(more)} of {device} for {what}: {text}; stop one of "
                    "them, lower its limit, or wait longer (ELASTICKV_START_WAIT)",
                    device=device,
                    bytes=more,
                )
            if now >= say_at:
                say(f"elastickv waits for {format_size(more)} of {device} for {what}: {self._who_holds(device)}")
                say_at = now + _SAY_EVERY_S
            meanwhile()
            tenant.wait_freed(seen[device], _ASK_AGAIN_US)

    def _take(self, growth: list[tuple[str, int]]) -> tuple[str, int] | None:
        """All or nothing; the device that refused, and what was asked of it."""
        for index, (device, more) in enumerate(growth):
            if not self.tenants[device].lease_static(more, ring=True):
                for other, taken in growth[:index]:
                    self.tenants[other].give_static(taken)
                return device, more
        return None

    def _check_limit(self, device: str, more: int, what: str) -> None:
        row = self.view(device).tenant(self.settings.tenant_name)
        limit = row.limit_wanted
        if limit is not None and row.static_bytes + more > limit:
            self.tenants[device].withdraw_demand()
            raise LimitExceeded(
                f"{format_size(row.static_bytes + more)} of {device} are needed for {what}, and this tenant's limit is "
                f"{format_size(limit)}; raise it",
                device=device,
                bytes=more,
                limit=limit,
            )

    def _who_holds(self, device: str) -> str:
        view = self.view(device)
        parts = [_row_text(row, row.name == self.settings.tenant_name) for row in view.living]
        if view.unmanaged:
            parts.append(f"others use {format_size(view.unmanaged)}")
        return f"of {format_size(view.capacity)}, " + ", ".join(parts)

    def close(self) -> None:
        """Gives the static bytes back and leaves. Whoever uses them must have gone."""
        self.stop_watching()
        self._neighbours.stop()
        for tenant in self.tenants.values():
            tenant.give_static(tenant.static_bytes)
            tenant.close()


def _row_text(row: TenantView, own: bool) -> str:
    """One tenant's part in who holds what."""
    name = f"{row.name!r} (this one)" if own else f"{row.name!r}"
    floor = f", of a floor of {format_size(row.floor)}" if row.floor else ""
    parts = f"{format_size(row.static_bytes)} static, {format_size(row.usage.used)} in use{floor}"
    return f"{name} holds {format_size(row.held)} ({parts})"
