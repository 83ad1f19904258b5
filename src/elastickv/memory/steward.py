"""The thread that looks after a cache whose user has no engine: answers neighbours, limits and the idle clock."""

from __future__ import annotations

import threading
from collections.abc import Callable

from elastickv import _core

__all__ = ["Steward"]


class Steward:
    """Calls `work()` when the tenant's bell rings or the idle clock is due. Stops within `stop()`'s deadline."""

    def __init__(self, pool: _core.Pool, work: Callable[[], None], name: str) -> None:
        self._pool = pool
        self._work = work
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"elastickv-{name}", daemon=True)

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def _run(self) -> None:
        seen = self._pool.bell_word()
        while not self._stopping.is_set():
            due = self._pool.next_deadline_us(True)
            rung = due > 0 and self._pool.wait_bell(seen, due)
            seen = self._pool.bell_word()
            if self._stopping.is_set():
                return
            if rung or due == 0 or self._pool.next_deadline_us(True) == 0 or self._pool.attention():
                self._work()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """True when the thread has ended."""
        self._stopping.set()
        self._pool.stop_bell()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()
