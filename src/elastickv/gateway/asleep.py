"""What tenants hold before and after they go to sleep, as the ledger has it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from elastickv.ledger import DeviceView
from elastickv.units import format_size

__all__ = ["Held", "HeldRow", "held_rows", "held_text", "settled"]

_SETTLE_S: Final = 10.0
_LOOK_S: Final = 0.05


@dataclass(frozen=True)
class HeldRow:
    """One tenant on one device. Bytes."""

    tenant: str
    device: str
    leased: int
    static_bytes: int
    cached: int
    """Prefixes that are held, and what is on its way out of the cache."""
    asleep: bool

    @property
    def held(self) -> int:
        """All of it."""
        return self.leased + self.static_bytes

    @property
    def clean(self) -> bool:
        """Whether it says that it sleeps, and its cache has gone back. What is leased then is the page of its null
        block; what it keeps as static bytes is what its engine still has on the device, by its own measurement."""
        return self.asleep and not self.cached


Held = Callable[[Sequence[str]], Awaitable[list[HeldRow]]]
"""Reads the rows of these tenants."""


def held_rows(devices: dict[str, DeviceView], tenants: Sequence[str]) -> list[HeldRow]:
    """Of each of `tenants` that lives, on each device."""
    return [
        HeldRow(row.name, device, row.leased, row.static_bytes, row.usage.cached + row.usage.transit, row.asleep)
        for device, view in devices.items()
        for row in view.living
        if row.name in tenants
    ]


async def settled(held: Held, tenants: Sequence[str]) -> list[HeldRow]:
    """What they hold once it has gone back, or after _SETTLE_S seconds."""
    until = time.monotonic() + _SETTLE_S
    while True:
        rows = await held(tenants)
        if all(row.clean for row in rows) or time.monotonic() >= until:
            return rows
        await asyncio.sleep(_LOOK_S)


def held_text(before: Sequence[HeldRow], after: Sequence[HeldRow]) -> str:
    """For people, and for the log."""
    if not after:
        return "it is on no ledger"
    was, now = sum(row.held for row in before), sum(row.held for row in after)
    text = f"gave back {format_size(max(0, was - now))} and holds {format_size(now)}"
    unclean = [row.tenant for row in after if not row.clean]
    return text if not unclean else f"{text}: {', '.join(unclean)} did not give its cache back"
