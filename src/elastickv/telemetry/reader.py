"""Reads every ledger of a directory, whatever state their files are in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elastickv import _core
from elastickv.errors import ElasticKVError
from elastickv.ledger import DeviceView, read_device
from elastickv.ledgers import device_names

__all__ = ["LOCK_DEADLINE_MS", "LedgerReader"]

LOCK_DEADLINE_MS: Final = 500
"""How long a reading waits for a ledger's lock. Holders keep it for microseconds."""

_logger = logging.getLogger("elastickv.telemetry")


class LedgerReader:
    """Opens and reads the ledgers anew each time, so that files which come, go or are replaced need no care.

    Thread-safe. `purpose` is what a ledger that cannot be read leaves its device without, in the log: "metrics".
    """

    def __init__(self, directory: Path, purpose: str) -> None:
        self._directory = directory
        self._purpose = purpose
        self._unreadable: dict[str, str] = {}  # device: the reason that was logged

    def read(self) -> Iterator[tuple[str, DeviceView | None]]:
        """Each device and what stands on its ledger, None where it cannot be read: that is logged once."""
        for device in device_names(self._directory):
            yield device, self._one(device)

    def _one(self, device: str) -> DeviceView | None:
        try:
            view = read_device(_core.Ledger.open(str(self._directory), device, 0, LOCK_DEADLINE_MS))
        except ElasticKVError as error:
            if self._unreadable.get(device) != str(error):
                self._unreadable[device] = str(error)
                _logger.warning("no %s of device %s: %s", self._purpose, device, error)
            return None
        if self._unreadable.pop(device, None) is not None:
            _logger.warning("the ledger of device %s can be read again", device)
        return view
