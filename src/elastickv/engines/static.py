"""What an engine holds besides its cache, on the ledger: leased before it loads, corrected when it has loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from elastickv.config import Settings
from elastickv.errors import ElasticKVError, EngineRefused
from elastickv.memory import Tenancy
from elastickv.units import format_size

__all__ = ["Footprint", "StaticLease"]

Footprint = Mapping[str, Any]
"""What a rank has besides its cache; bytes. used: on the device now. peak: the most since it was loaded. asleep: by
the engine's tag, what was given up and comes back when it wakes. See footprint.py."""

_WHAT: Final = "weights, graphs and activations"


class StaticLease:
    """One engine's static bytes. `ranks`: each rank's device. Belongs to the engine's thread."""

    def __init__(
        self, tenancy: Tenancy, ranks: Sequence[str], meanwhile: Callable[[], None], logger: logging.Logger
    ) -> None:
        """`meanwhile`: called again and again while a lease has to wait."""
        self._tenancy = tenancy
        self._settings: Settings = tenancy.settings
        self._ranks = list(ranks)
        self._meanwhile = meanwhile
        self._logger = logger
        self._awake: dict[str, int] = {}

    @property
    def counted(self) -> bool:
        """Whether there is anything to lease: on a GPU yes, on the host only where the settings say so."""
        chosen = self._settings.static
        return chosen == "checkpoint" or (chosen == "auto" and "host" not in self._ranks) or isinstance(chosen, int)

    @property
    def fixed(self) -> int | None:
        """Bytes of a rank, where the settings name them."""
        chosen = self._settings.static
        return chosen if isinstance(chosen, int) else None

    def reserve(self, estimates: Sequence[int]) -> None:
        """Leases `estimates` (bytes by rank), or what the settings name, before anything is loaded.

        EngineRefused if they cannot be had: the text says who holds what.
        """
        if not self.counted:
            return
        amounts = list(estimates) if self.fixed is None else [self.fixed] * len(self._ranks)
        try:
            self._set(self._by_device(amounts))
        except ElasticKVError as error:
            raise EngineRefused(f"elastickv does not start this engine: {error.message}") from error
        self._logger.info("elastickv has leased %s for %s", self.describe(), _WHAT)

    def true_up(self, footprints: Sequence[Footprint], *, more_to_come: bool) -> None:
        """Corrects the lease to what the ranks have taken. `more_to_come`: graphs are captured later."""
        if not self.counted:
            return
        wanted = self._by_device([int(one["peak"]) for one in footprints])
        for device, have in self._tenancy.static_bytes.items():
            if self.fixed is not None and device == "host":
                wanted[device] = have
            elif self.fixed is not None or more_to_come:
                wanted[device] = max(wanted[device], have)
        try:
            self._set(wanted)
        except ElasticKVError as error:
            raise EngineRefused(f"this engine took more than was leased for it: {error.message}") from error
        self._awake = self._tenancy.static_bytes

    def shrink(self, footprints: Sequence[Footprint]) -> None:
        """Gives back what a sleeping engine does not have any more."""
        if self.counted and self.fixed is None:
            used = self._by_device([int(one["used"]) for one in footprints])
            have = self._tenancy.static_bytes
            self._set({device: min(used[device], have[device]) for device in have})

    def grow_to_wake(self, footprints: Sequence[Footprint], *, weights: bool) -> None:
        """Takes what waking needs, first. Unavailable or LimitExceeded, with nothing taken, if it cannot be had.

        `weights`: they come back too; all other tags but the cache's come back in any case.
        """
        if not self.counted or self.fixed is not None:
            return
        have = self._tenancy.static_bytes
        if weights:
            wanted = {device: max(have[device], self._awake[device]) for device in have}
        else:
            others = [
                sum(size for tag, size in one["asleep"].items() if tag not in ("weights", "kv_cache"))
                for one in footprints
            ]
            more = self._by_device(others)
            wanted = {device: min(have[device] + more[device], self._awake[device]) for device in have}
        self._set(wanted)

    def _set(self, wanted: Mapping[str, int]) -> None:
        self._tenancy.set_static(wanted, self._settings.start_wait, _WHAT, self._logger.warning, self._meanwhile)

    def _by_device(self, amounts: Sequence[int]) -> dict[str, int]:
        return {
            device: sum(size for size, rank in zip(amounts, self._ranks, strict=True) if rank == device)
            for device in self._tenancy.tenants
        }

    def describe(self) -> str:
        """For people: "2 GiB static" or "nothing static"."""
        total = sum(self._tenancy.static_bytes.values())
        return f"{format_size(total)} static" if total else "nothing static"
