"""Would one tenant more fit on a device? A pure function over what stands on its ledger.

It answers as the ledger would: a join is refused where its floor is above what the others' floors and static bytes
leave, and a lease is granted where everything held, the unmet floors of the others and it fit the capacity. What
neighbours would give back (mapped free and cached bytes above their floors) counts as to be had. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from elastickv.errors import InvalidArgument
from elastickv.ledger import DeviceView, TenantView

__all__ = ["MAX_TENANTS", "Fit", "Verdict", "would_fit"]

MAX_TENANTS: Final = 64
"""Rows of a ledger (`kMaxTenants` in the core): so many tenants can run on one device."""

Verdict = Literal["now", "after_give_back", "after_requests", "never"]


@dataclass(frozen=True)
class Fit:
    """The answer, with the figures behind it; bytes."""

    verdict: Verdict
    """`now`; `after_give_back`: neighbours give cached and free memory first, in milliseconds; `after_requests`: only
    once running requests of neighbours have ended; `never`: floors and static bytes of the others leave too little."""
    needed: int
    """The static bytes or the floor, whichever is more."""
    free: int
    """Held by nobody and promised to nobody."""
    reclaimable: int
    """What neighbours could give back without preempting a request or going under a floor."""
    missing: int
    """What lacks after both. 0 where it fits."""
    most: int
    """The most that could ever be had while the others keep their floors and static bytes."""
    share: int
    """The weighted share of the bytes that are neither static nor unmanaged, if all tenants were busy."""

    @property
    def fits(self) -> bool:
        """Whether it can be had without waiting for anybody's running requests."""
        return self.verdict in ("now", "after_give_back")


def would_fit(view: DeviceView, static: int = 0, floor: int = 0, weight: int = 1) -> Fit:
    """Whether a tenant with `static` bytes of weights and graphs and a floor (both in bytes) would find room.

    InvalidArgument for a size under 0 or a weight under 1.
    """
    if static < 0 or floor < 0 or weight < 1:
        raise InvalidArgument(
            f"would it fit: static {static}, floor {floor}, weight {weight}; sizes are 0 or more, a weight 1 or more",
            static=static,
            floor=floor,
            weight=weight,
        )
    others = view.living
    shared = view.capacity - view.unmanaged
    needed = max(static, floor)
    free = max(0, shared - sum(max(other.held, other.floor) for other in others))
    reclaimable = sum(_reclaimable(other) for other in others)
    most = max(0, shared - sum(max(other.floor, other.static_bytes) for other in others))
    if len(others) >= MAX_TENANTS:
        most = 0
    elastic = max(0, shared - static - sum(other.static_bytes for other in others))
    return Fit(
        verdict=_verdict(needed, free, reclaimable, most),
        needed=needed,
        free=free,
        reclaimable=reclaimable,
        missing=max(0, needed - min(most, free + reclaimable)),
        most=most,
        share=elastic * weight // (weight + sum(other.weight for other in others)),
    )


def _reclaimable(tenant: TenantView) -> int:
    loose = tenant.usage.mapped_free + tenant.usage.cached
    return max(0, min(loose, tenant.leased, tenant.held - tenant.floor))


def _verdict(needed: int, free: int, reclaimable: int, most: int) -> Verdict:
    if needed > most:
        return "never"
    if needed <= free:
        return "now"
    return "after_give_back" if needed <= free + reclaimable else "after_requests"
