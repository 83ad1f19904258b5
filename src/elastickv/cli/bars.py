"""Bars and numbers of tenants and devices: what `status` and `top` show, as text and as Rich renderables."""

from __future__ import annotations

from typing import Final

from rich.text import Text

from elastickv.ledger import DeviceView, Parts, TenantView
from elastickv.units import format_size

__all__ = ["LEGEND", "bar", "device_parts", "number_line", "short", "state_of"]


_LOOKS: Final = {
    "static": ("■", "magenta"),
    "used": ("█", "green"),
    "cached": ("▓", "cyan"),
    "mapped_free": ("▒", "yellow"),
    "transit": ("░", "blue"),
}
LEGEND: Final = "■ weights  █ used  ▓ cached  ▒ mapped, free  ░ in transit  | limit"


def bar(parts: Parts, scale: int, width: int, limit: int | None = None) -> Text:
    """A bar of `width` cells that stand for `scale` bytes, with `|` where the limit is."""
    text = Text(no_wrap=True)
    done, below = 0, 0
    for name, (mark, style) in _LOOKS.items():
        below += getattr(parts, name)
        end = min(width, round(below * width / scale)) if scale else 0
        text.append(mark * (end - done), style=style)
        done = max(done, end)
    text.append("·" * (width - done), style="dim")
    if limit is None or not scale or limit >= scale:
        return text
    at = min(width - 1, round(limit * width / scale))
    return Text.assemble(text[:at], ("|", "bold red"), text[at + 1 :], no_wrap=True)


def short(size: int | None) -> str:
    """A size in at most ten characters, eight from 1 KiB on."""
    if size == 0:
        return "0"
    text = format_size(size, decimals=1)
    return text if len(text) <= 8 else format_size(size, decimals=0)


def number_line(parts: Parts) -> str:
    """The parts in numbers, at most 63 characters."""
    return (
        f"used {short(parts.used)}  cached {short(parts.cached)}  "
        f"free {short(parts.mapped_free)}  transit {short(parts.transit)}"
    )


def state_of(tenant: TenantView) -> str:
    """One word, and what is pending: "running", "asleep, wants 64 MiB", "not running, limit kept"."""
    if not tenant.alive:
        return "not running, limit kept" if tenant.limit_wanted_rev else "not running"
    words = ["asleep" if tenant.asleep else "running"]
    if tenant.demand:
        words.append(f"wants {short(tenant.demand)}")
    if tenant.limit_wanted_rev != tenant.limit_held_rev:
        words.append(f"limit {short(tenant.limit_wanted)} not yet applied")
    elif tenant.limit_held is not None and tenant.held > tenant.limit_held:
        words.append(f"{short(tenant.held - tenant.limit_held)} above its limit")
    if tenant.counters.late:
        words.append(f"answered late {tenant.counters.late}x")
    return ", ".join(words)


def device_parts(view: DeviceView) -> Parts:
    """The sum over the tenants."""
    total = Parts(0, 0, 0, 0, 0)
    for tenant in view.tenants:
        total += tenant.parts
    return total
