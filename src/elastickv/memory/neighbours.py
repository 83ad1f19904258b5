"""Memory of a GPU that processes outside elastickv use, measured again and again and subtracted on the ledger.

Used on the device, less what tenants have mapped and what they have of their static leases: the rest is somebody
else's, and the tenants share what is left. A capacity that leaves part of the device out has left it to the others
already, so there only what they use beyond that part is subtracted. Whoever schedules on the device measures; several
may, for all write the same. Nothing is measured on the host, where the capacity says what tenants share.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import ElasticKVError
from elastickv.ledger import DeviceView, read_device
from elastickv.memory import gpu

__all__ = ["Neighbours", "outside_bytes"]

_logger = logging.getLogger("elastickv")

EVERY_S = 0.5
_FIRST_PAUSE_S: Final = 0.02
_UNIT: Final = 2 * 1024 * 1024

Read = Callable[[str], tuple[int, int]]


def outside_bytes(view: DeviceView, used: int) -> int:
    """Bytes of the device that are used and that no tenant holds under a lease, in whole units of 2 MiB.

    A tenant that has not said yet how much of its static lease it has is taken to have all of it: it is loading.
    """
    covered = sum(
        tenant.mapped + (min(tenant.static_used, tenant.static_bytes) if tenant.static_used else tenant.static_bytes)
        for tenant in view.living
    )
    return -(-max(0, used - covered) // _UNIT) * _UNIT


class Neighbours:
    """Measures the devices of `ledgers` that are GPUs, on a thread of its own, until stop()."""

    def __init__(
        self, ledgers: Mapping[str, _core.Ledger], read: Read | None = None, headroom: int = Settings.headroom
    ) -> None:
        """`read` replaces gpu.device_memory(). `headroom`: bytes of the device that stay free beside the capacity."""
        self._headroom = headroom
        self._ledgers = {device: ledger for device, ledger in ledgers.items() if device != "host"}
        self._read = read or gpu.device_memory
        self._last: dict[str, int] = {}
        self._silent: set[str] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Measures at once, so that the first lease knows, and goes on from there. Once."""
        if not self._ledgers:
            return
        self.measure()
        time.sleep(_FIRST_PAUSE_S)
        self.measure()
        self._thread = threading.Thread(target=self._run, name="elastickv-neighbours", daemon=True)
        self._thread.start()

    def measure(self) -> None:
        """One look at every device. A device that cannot be read keeps its last figure; the first failure is logged."""
        for device, ledger in self._ledgers.items():
            try:
                self._measure(device, ledger)
            except ElasticKVError as error:
                if device not in self._silent:
                    self._silent.add(device)
                    _logger.warning(
                        "cannot measure what others use of %s, so it is taken to stay as it was: %s", device, error
                    )
            else:
                self._silent.discard(device)

    def _measure(self, device: str, ledger: _core.Ledger) -> None:
        total, used = self._read(device)
        view = read_device(ledger)
        left_out = max(0, total - view.capacity - self._headroom) // _UNIT * _UNIT
        now = max(0, outside_bytes(view, used) - left_out)
        # Between a mapping and its entry on the ledger a page looks like somebody else's: what two looks agree on is.
        agreed = min(now, self._last.get(device, view.unmanaged))
        self._last[device] = now
        if agreed > view.unmanaged or now < view.unmanaged:
            ledger.set_unmanaged(agreed)
        elif view.held + view.unmanaged > view.capacity:
            ledger.set_unmanaged(view.unmanaged)  # rings again those who can still give

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            self.measure()

    def stop(self) -> None:
        """Within the time of one measurement. The last figure stays on the ledger until the next one measures."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
