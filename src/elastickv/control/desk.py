"""One device as the control server works with it: blocking calls of its ledger, off the event loop and bounded.

Every device has threads of its own, so a ledger whose lock somebody sits on holds up nobody who asks for another
device, and the event loop never waits. However many clients look at a device, one reading serves all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import Unavailable
from elastickv.ledger import DeviceView, open_ledger, read_device

__all__ = ["MAX_ORDERS", "Desk", "retrieve"]

T = TypeVar("T")

MAX_ORDERS: Final = 64
"""Orders of one device that may be on their way to its ledger at once."""


class Desk:
    """Belongs to one event loop."""

    def __init__(self, settings: Settings, device: str) -> None:
        self.device = device
        self._settings = settings
        self._readers = ThreadPoolExecutor(1, thread_name_prefix=f"elastickv-{device}-read")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix=f"elastickv-{device}-order")
        self._orders = 0
        self._running = asyncio.Lock()
        self._queued: asyncio.Task[DeviceView] | None = None
        self._latest: tuple[float, DeviceView] | None = None

    async def view(self, max_age: float = 0.0) -> DeviceView:
        """The device, read after this call, or not longer than `max_age` seconds before it. Errors of the ledger."""
        if self._latest is not None and time.monotonic() - self._latest[0] <= max_age:
            return self._latest[1]
        if self._queued is None:
            self._queued = asyncio.ensure_future(self._read())
            self._queued.add_done_callback(retrieve)
        return await asyncio.shield(self._queued)

    async def order(self, work: Callable[[_core.Ledger], T]) -> T:
        """Calls `work` with the ledger, in a thread. Unavailable when too many orders are on their way already."""
        if self._orders >= MAX_ORDERS:
            raise Unavailable(f"device '{self.device}': {self._orders} orders are on their way already; try again")
        self._orders += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._writers, lambda: work(self._open()))
        finally:
            self._orders -= 1

    def close(self) -> None:
        """What runs in the threads ends at the ledger's own deadline; what waits for them is dropped."""
        for threads in (self._readers, self._writers):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _read(self) -> DeviceView:
        async with self._running:
            # Whoever asks from here on wants a reading that begins later.
            self._queued = None
            begin = time.monotonic()
            view = await asyncio.get_running_loop().run_in_executor(self._readers, lambda: read_device(self._open()))
            self._latest = (begin, view)
            return view

    def _open(self) -> _core.Ledger:
        # Anew each time, which takes 0.03 ms: the file may have been replaced since the last time.
        return open_ledger(self._settings, self.device)


def retrieve(task: asyncio.Task[T]) -> None:
    """When a task ends that others wait for: they may have left, and an error that nobody takes is no news."""
    if not task.cancelled():
        task.exception()
