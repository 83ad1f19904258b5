"""Memory that this process caches for itself is given back before a mapping fails for want of memory.

PyTorch keeps freed blocks for its next tensors. Where the device has no memory for pages that are leased, the rank's
mapper asks for them, waits a moment, and tries once more; then "none now" is the answer. The mapper runs no Python:
a thread here does what was registered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from elastickv import _core

__all__ = ["Reclaimer"]

_logger = logging.getLogger("elastickv")

_LOOK_US = 1_000_000


class Reclaimer:
    """Calls `give_up()` each time that the rank's mapper finds no memory on the device, once a second at most."""

    def __init__(self, rank: _core.Rank, give_up: Callable[[], object]) -> None:
        self._rank = rank
        self._give_up = give_up
        self._stopping = threading.Event()
        self._seen = rank.wait_reclaim(0, 0)
        self._thread = threading.Thread(target=self._run, name="elastickv-reclaim", daemon=True)
        self._thread.start()
        rank.offer_reclaim(True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            request = self._rank.wait_reclaim(self._seen, _LOOK_US)
            if request == self._seen or self._stopping.is_set():
                continue
            try:
                self._give_up()
            except Exception:  # a thread's border: whatever it raises, the mapper waits for the answer
                _logger.warning("giving back memory that this process caches has failed", exc_info=True)
            finally:
                self._seen = request
                self._rank.reclaimed(request)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """No request is taken any more; True when the thread has ended."""
        self._stopping.set()
        self._rank.offer_reclaim(False)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
