"""How often a pool asks the neighbours for one that is short of blocks, and when it waits for them."""

from __future__ import annotations

import time
from typing import Final

from elastickv._core import Pool

__all__ = ["QUEUE_SEEN", "Asking"]

QUEUE_SEEN: Final = 256
"""Of the requests that wait behind a refused one, those that are counted: enough for neighbours to begin to give."""

_RING_EVERY_S: Final = 0.05
"""A demand on the ledger lapses 0.1 s after its last refresh (ledger/policy.hpp)."""

_PAUSE_S: Final = (0.25, 8.0)
"""After a wait for the neighbours that gained nothing, the shortest and the longest pause before the next one."""

_WAITED_S: Final = 0.001
"""A call that took longer than this and was served has waited for it."""


class Asking:
    """Of one pool; belongs to the thread that allocates."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.starved = False
        """Whether the last ensure() found fewer blocks than it was asked for."""
        self._freed_seen = 0
        self._ring_again = 0.0
        self._wait_again = 0.0
        self._pause = _PAUSE_S[0]

    def ensure(self, num_blocks: int, *, patient: bool, growing: bool = False) -> None:
        """Has `num_blocks` blocks available if it can. A patient call may wait for the neighbours (give_back_wait). One
        for a request that runs already (`growing`) may take what is withheld for them.

        Waiting costs the requests that run, so a wait that gained nothing is not repeated soon. Nor is an impatient
        call that was refused a moment ago, unless somebody has freed memory since or its demand would lapse.
        """
        pool = self._pool
        began = time.monotonic()
        patient = patient and began >= self._wait_again
        again = self.starved and not patient and not growing
        if again and began < self._ring_again and pool.freed_word() == self._freed_seen:
            return
        self._freed_seen = pool.freed_word()
        self.starved = pool.ensure(num_blocks, patient, growing) < num_blocks
        if self.starved:
            self._ring_again = began + _RING_EVERY_S
            if patient:
                self._pause = min(2 * self._pause, _PAUSE_S[1])
                self._wait_again = began + self._pause
        elif patient and time.monotonic() - began > _WAITED_S:
            self._pause = _PAUSE_S[0]
