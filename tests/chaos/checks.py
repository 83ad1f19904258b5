"""What must hold, as pure functions over what was seen. Each returns texts: nothing found is an empty list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from elastickv.ledger import DeviceView

MIB = 1024 * 1024
KNOWN_FILES = re.compile(r"\.lock|host\.(ledger|alive)|\.host\.ledger\.new\.\d+|control\.(sock|lock)")
RECOVERY_S = 1.0
GROWTH_BYTES = 4 * MIB
SETTLED_PART = 0.2
LEAST_SAMPLES = 8


def capacity_holds(what: str, total: int, capacity: int) -> list[str]:
    """The sum of bytes stays within the device."""
    return [] if total <= capacity else [f"{what}: {total} bytes of {capacity}"]


def ledger_holds(view: DeviceView) -> list[str]:
    """The sums of a table that was read in one piece."""
    found = capacity_holds("leases", view.held, view.capacity)
    found += capacity_holds("floors", sum(tenant.floor for tenant in view.living), view.capacity)
    for tenant in view.tenants:
        if not tenant.alive and tenant.held + tenant.mapped + tenant.demand:
            found.append(f"{tenant.name} is dead and holds {tenant.held} bytes, {tenant.mapped} mapped")
        if tenant.limit_held_rev > tenant.limit_wanted_rev:
            found.append(f"{tenant.name} holds revision {tenant.limit_held_rev} of a limit that was never ordered")
    return found


def pages_are_leased(name: str, by_kernel: int, leased: int) -> list[str]:
    """No page without a lease, in a process that stands still."""
    return [] if by_kernel <= leased else [f"{name}: {by_kernel} bytes by the kernel under leases of {leased}"]


def books_agree(name: str, by_kernel: int, view: DeviceView) -> list[str]:
    """At a quiet point: kernel = mapped = leased."""
    rows = [tenant for tenant in view.living if tenant.name == name]
    if len(rows) != 1:
        return [f"{name} lives and has {len(rows)} living rows"]
    row = rows[0]
    if by_kernel == row.mapped == row.leased:
        return []
    return [f"{name}: kernel {by_kernel}, mapped {row.mapped}, leased {row.leased} bytes"]


def limit_holds(name: str, view: DeviceView) -> list[str]:
    """At a quiet point: who holds more than its limit holds nothing but blocks in use."""
    row = view.tenant(name)
    spare = row.usage.cached + row.usage.mapped_free
    if row.limit_wanted is None or row.held <= row.limit_wanted or spare == 0:
        return []
    return [f"{name} holds {row.held} bytes above its limit of {row.limit_wanted}, {spare} of them not in use"]


def files_are_known(names: Iterable[str]) -> list[str]:
    """Nothing in the directory but what belongs there; at most one half-made ledger of a creator who died."""
    listed = sorted(names)
    found = [f"unknown file {name!r}" for name in listed if not KNOWN_FILES.fullmatch(name)]
    half_made = [name for name in listed if ".new." in name]
    return found + ([f"{len(half_made)} half-made ledgers"] if len(half_made) > 1 else [])


def recovered(name: str, seconds: float) -> list[str]:
    """`seconds` after its end a dead tenant was still seen with its leases."""
    return [] if seconds <= RECOVERY_S else [f"{name} held its leases {seconds:.2f} s after its end"]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares, per second."""
    n = len(points)
    mean_t = sum(t for t, _ in points) / n
    mean_v = sum(v for _, v in points) / n
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    return sum((t - mean_t) * (v - mean_v) for t, v in points) / spread if spread else 0.0


Samples = Sequence[tuple[float, Mapping[str, int]]]


def settled(samples: Samples) -> Samples:
    """Without the first fifth of the time."""
    first, last = samples[0][0], samples[-1][0]
    return [(t, values) for t, values in samples if t >= first + SETTLED_PART * (last - first)]


def ends(samples: Samples) -> tuple[Mapping[str, int], Mapping[str, int]] | None:
    """The first and the last of the settled samples; None: too few."""
    kept = settled(samples) if samples else []
    return (kept[0][1], kept[-1][1]) if len(kept) >= LEAST_SAMPLES else None


def grows(who: str, samples: Samples) -> list[str]:
    """Over the last four fifths of the time: no more descriptors or threads at the end, and memory is level.

    Memory counts as growing when its fitted line rises by more than GROWTH_BYTES over that time.
    """
    if not samples:
        return []
    kept = settled(samples)
    if len(kept) < LEAST_SAMPLES:
        return []
    found = []
    half = len(kept) // 2
    for what in sorted(set(kept[0][1]) - {"anon"}):
        before = max(values[what] for _, values in kept[:half])
        after = min(values[what] for _, values in kept[half:])
        if after > before:
            found.append(f"{who}: {what} grew from {before} to {after}")
    if "anon" in kept[0][1]:
        rise = slope([(t, float(values["anon"])) for t, values in kept]) * (kept[-1][0] - kept[0][0])
        if rise > GROWTH_BYTES:
            found.append(f"{who}: memory rose by {rise / MIB:.1f} MiB")
    return found
