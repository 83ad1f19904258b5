"""Wakes a scheduler that sleeps while it is idle (--sleep-on-idle), when neighbours, limits or the idle clock call.

SGLang's idle scheduler polls its sockets. One more file is put among them: a thread that waits for the tenant's bell
writes to it, and the next look at what is asked happens on the scheduler's own thread.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Any, Final

from elastickv._core import Pool

__all__ = ["Bell"]

_LEAST_US: Final = 1_000
_MOST_US: Final = 1_000_000


class Bell:
    """start() once, stop() once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._file = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastickv-bell", daemon=True)

    def hang(self, sleeper: Any) -> Callable[[], None]:
        """Puts the file among those that SGLang's IdleSleeper polls; returns what empties it after each wake."""
        sleeper.poller.register(self._file, select.POLLIN)
        return self._empty

    def start(self) -> None:
        """Begins to listen."""
        self._thread.start()

    def _empty(self) -> None:
        try:
            os.eventfd_read(self._file)
        except BlockingIOError:
            return

    def _run(self) -> None:
        seen = self._pool.bell_word()
        while not self._stopping.is_set():
            due = self._pool.next_deadline_us(True)
            rung = self._pool.wait_bell(seen, min(max(due, _LEAST_US), _MOST_US))
            seen = self._pool.bell_word()
            if rung or due <= _LEAST_US or self._pool.attention():
                os.eventfd_write(self._file, 1)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """True when the thread has ended."""
        self._stopping.set()
        self._pool.stop_bell()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()
