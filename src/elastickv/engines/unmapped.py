"""What an engine that releases its memory waits for: until its ranks have unmapped what was ordered back."""

from __future__ import annotations

import time
from typing import Any, Final

from elastickv.errors import DeadlineExceeded
from elastickv.units import format_size

__all__ = ["wait_unmapped"]

_UNMAP_S: Final = 60.0


def wait_unmapped(pool: Any) -> None:
    """Until nothing of a native pool is on its way out; DeadlineExceeded after 60 s. For the thread that schedules."""
    until = time.monotonic() + _UNMAP_S
    while (stats := pool.stats())["transit"]:
        if time.monotonic() >= until:
            raise DeadlineExceeded(
                f"waited {_UNMAP_S:.0f} s for the ranks to unmap {format_size(stats['transit'])} of the cache of an "
                "engine that gives its memory back; is a step stuck on the device?"
            )
        time.sleep(0.001)
        pool.poll()
