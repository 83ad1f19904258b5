"""Limits of tenants: order one, wait for the tenant, and say truthfully how things stand. All sizes are bytes.

What was asked (`wanted`) and what the tenant goes by (`applied`) are two things: a limit is in force for new leases
from the moment it is written; the tenant acknowledges it once it works by it, and one ordered with `now` once it
holds no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import DeadlineExceeded, InvalidArgument, NotFound
from elastickv.ledger import DeviceView, Limit, TenantView, read_device
from elastickv.ledgers import open_chosen_ledger
from elastickv.units import MAX_SIZE, format_seconds, format_size, parse_size_or_none

__all__ = ["LimitOrder", "State", "late", "limit_order", "place_order", "set_limit", "wait_for_order"]

State = Literal["acknowledged", "pending", "kept"]


@dataclass(frozen=True)
class LimitOrder:
    """One order, and how it stood when it was looked at."""

    device: str
    tenant: str
    wanted: Limit
    """What was ordered, with the order's revision."""
    applied: Limit
    """What the tenant has acknowledged. Revision 0: nothing yet."""
    now: bool
    """Whether running requests are to be preempted for it."""
    state: State
    """`acknowledged`; `pending`: the tenant runs and has not acknowledged, no new lease goes above the limit even so;
    `kept`: it does not run, and its next start is under this limit."""
    held: int
    above: int
    """Bytes held above the limit that was ordered."""
    used: int
    """Of what is held, pages that requests use: only `now` takes those from an engine."""
    capacity: int
    least: int
    """What the tenant keeps while its engine runs, whatever the limit: static bytes and the cache's null block."""


def set_limit(
    name: str,
    limit: int | str | None,
    *,
    now: bool = False,
    timeout: float = 5.0,
    device: str | None = None,
    directory: str | None = None,
) -> LimitOrder:
    """Orders a limit (bytes, a text such as "8GiB", or None for none) and waits `timeout` seconds for the tenant.

    `now`: preempt running requests for it. Returns an order in state `acknowledged`, or `kept` where the name is known
    and does not run. NotFound for a name that the ledger does not have; InvalidArgument under the tenant's floor and,
    with `now`, under what it keeps while its engine runs; DeadlineExceeded when the tenant does not acknowledge: the
    order stands, and no lease goes above it even so.
    """
    settings = Settings.load(arguments={"device": device, "directory": directory})
    size = parse_size_or_none(limit, "limit") if isinstance(limit, str) else limit
    ledger = open_chosen_ledger(settings)
    revision = place_order(ledger, name, size, now)
    return wait_for_order(ledger, name, revision, timeout)


def place_order(ledger: _core.Ledger, name: str, limit: int | None, now: bool = False) -> int:
    """Writes the order and returns its revision; does not wait. Errors as those of set_limit()."""
    if limit is not None and not 0 <= limit <= MAX_SIZE:
        raise InvalidArgument(f"a limit of {limit} bytes; give 0 or more, up to {MAX_SIZE}, or none", limit=limit)
    return ledger.order_limit(name, limit, now)


def wait_for_order(ledger: _core.Ledger, name: str, revision: int, timeout: float) -> LimitOrder:
    """Waits for that revision, or one after it; `timeout` in seconds. Errors as those of set_limit()."""
    order = limit_order(read_device(ledger), name, revision)
    if order.state != "pending":
        return order
    try:
        ledger.wait_limit(name, revision, round(timeout * 1000))
    except (DeadlineExceeded, NotFound):
        order = limit_order(read_device(ledger), name, revision)
        if order.state == "pending":
            raise late(order, timeout) from None
        return order
    return limit_order(read_device(ledger), name, revision)


def limit_order(view: DeviceView, name: str, revision: int) -> LimitOrder:
    """How the order of that revision stands in a view. NotFound where the name has gone since."""
    tenant = _ordered(view, name)
    state: State = "kept"
    if tenant.alive:
        state = "acknowledged" if tenant.limit_held_rev >= revision else "pending"
    most = tenant.limit_wanted
    return LimitOrder(
        device=view.device,
        tenant=name,
        wanted=tenant.wanted,
        applied=tenant.applied,
        now=tenant.limit_now,
        state=state,
        held=tenant.held,
        above=0 if most is None else max(0, tenant.held - most),
        used=tenant.usage.used,
        capacity=view.capacity,
        least=tenant.least,
    )


def late(order: LimitOrder, seconds: float) -> DeadlineExceeded:
    """The error for an order that is still pending after so many seconds."""
    held = format_size(order.held)
    if order.now:
        held += f" ({format_size(order.used)} of it in use)"
    if order.above:
        held += f", {format_size(order.above)} above the limit"
    return DeadlineExceeded(
        f"limit: {order.tenant} did not acknowledge within {format_seconds(seconds)}: it has acknowledged "
        f"{format_size(order.applied.bytes)} and holds {held}; the order stands (revision "
        f"{order.wanted.revision}) and it gets nothing above the limit, see `elastickv status`",
        tenant=order.tenant,
        device=order.device,
        revision=order.wanted.revision,
        wanted=order.wanted.bytes,
        applied=order.applied.bytes,
        held=order.held,
        above=order.above,
        used=order.used,
        seconds=seconds,
    )


def _ordered(view: DeviceView, name: str) -> TenantView:
    try:
        return view.tenant(name)
    except NotFound:
        raise NotFound(
            f"limit: {name} ended before it acknowledged, and its name, which was made up for it, went with it: "
            "nothing is kept; start engines with --name",
            tenant=name,
        ) from None
