"""What a run is made of: its options, and where every choice comes from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
PAGE = 64 * 1024


@dataclass(frozen=True)
class Options:
    """One run. It ends when either figure is reached."""

    seed: int
    directory: Path
    seconds: float
    kills: int | None = None
    tenants: int = 4
    capacity: int = 96 * MIB
    soak: bool = False
    """Half of the tenants live through the whole run, so that growth shows in them."""
    pace: float = 0.004
    """Seconds that a tenant rests between two operations."""
    gap: float = 0.25
    """Seconds between two actions of the conductor, on average."""
    rogue: bool = False
    """Starts a tenant that maps more than it leases: the run must fail."""
    control: bool = True


def stream(seed: int, *names: object) -> random.Random:
    """The source of the choices of one part: the same for the same seed, whatever the other parts do."""
    return random.Random("/".join(map(str, (seed, *names))))


@dataclass(frozen=True)
class TenantSpec:
    """One life of one tenant; everything that it decides follows from here."""

    directory: str
    name: str
    life: int
    """Counts the lives of all tenants of the run; part of every pattern that this one writes."""
    seed: int
    capacity: int
    floor: int
    weight: int
    priority: int
    blocks: int
    block_bytes: int
    most: int
    """Blocks that it wants in use at once."""
    pace: float
    cached_share: float
    extent: int = PAGE
    """Most bytes of one mapping; only where it is more than a block can one in use hold others back."""
    steady: bool = False
    clock_offset: int = 0
    """Seconds by which its CLOCK_MONOTONIC differs (a time namespace)."""
    faults: tuple[tuple[str, str, int], ...] = ()
    """Set before it opens anything: point, action, after."""


def tenant_spec(
    options: Options,
    name: str,
    life: int,
    faults: tuple[tuple[str, str, int], ...] = (),
    clock_offset: int = 0,
    steady: bool = False,
) -> TenantSpec:
    """The `life`th life. Floors fit together, and the wishes of all together are more than there is."""
    choose = stream(options.seed, "tenant", name, life)
    block_bytes = choose.choice((PAGE, PAGE, 2 * PAGE, 3 * PAGE // 2))
    share = options.capacity // options.tenants
    return TenantSpec(
        directory=str(options.directory),
        name=name,
        life=life,
        seed=options.seed,
        capacity=options.capacity,
        floor=choose.choice((0, share // 8, share // 4)),
        weight=choose.choice((1, 1, 2, 4)),
        priority=choose.choice((0, 0, 1)),
        blocks=2 * options.capacity // block_bytes,
        block_bytes=block_bytes,
        most=int(share * choose.uniform(0.5, 1.1)) // block_bytes,
        pace=options.pace * choose.uniform(0.5, 1.5),
        cached_share=choose.uniform(0.2, 0.8),
        extent=choose.choice((1, 4, 16)) * PAGE,
        steady=steady,
        clock_offset=clock_offset,
        faults=faults,
    )
