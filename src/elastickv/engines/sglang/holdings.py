"""What one rank has besides its cache, on the ledger: its weights, graphs, activations and context.

The first rank leases for all of them before anything is loaded. SGLang runs no step to measure activations by, so an
allowance for them stays in the lease (planning/static.py), on top of what loading has really taken.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from elastickv import _core
from elastickv.engines.footprint import Publisher, on_gpu, storage_bytes
from elastickv.engines.sglang import ranks, weights
from elastickv.engines.static import Footprint, StaticLease
from elastickv.memory import RankMemory, Tenancy
from elastickv.memory.tenancy import attach_member
from elastickv.planning.static import allowance, static_bytes

__all__ = ["Holdings"]

_logger = logging.getLogger("sglang.elastickv")

_EVERY_S: Final = 1.0
"""How often a rank on a GPU says anew what it has: PyTorch's memory grows with the first long prompts."""


class Holdings:
    """Of one rank; used by the scheduler's thread. `lease`: of the rank that decides."""

    def __init__(self, device: str, lease: StaticLease | None, place: dict[str, Any], scheduler: Any) -> None:
        self.lease = lease
        self.memory: RankMemory | None = None
        """The cache, once there is one: its bytes are no part of these."""
        self._device = device
        self._scheduler = scheduler
        self._publishes = bool(place["publishes"])
        self._member: _core.Tenant = attach_member(place)
        self._publisher = Publisher(self._member, self.measure, self._publishes)
        self._say_again = 0.0

    @classmethod
    def begin(
        cls, tenancy: Tenancy | None, devices: list[str], rank: int, scheduler: Any, meanwhile: Callable[[], None]
    ) -> Holdings:
        """Leases what the ranks are going to load, then lets every one of them belong to the tenant: all call this.

        EngineRefused if the bytes cannot be had. A rank that has come this far keeps them until its process ends.
        """
        lease, places = None, list[dict[str, Any]]()
        if tenancy is not None:
            lease = StaticLease(tenancy, devices, meanwhile, _logger)
            if lease.counted:
                lease.reserve(_estimates(lease, devices, scheduler))
            places = tenancy.place(devices, publishes=lease.counted)
        places = ranks.from_first(places)
        made = cls(devices[rank], lease, places[rank], scheduler)
        if made._on_gpu:
            made._publisher.start()
        return made

    @property
    def _on_gpu(self) -> bool:
        return self._device != "host"

    def measure(self) -> Footprint:
        """Now. On the host only the model counts."""
        if not self._on_gpu:
            model = storage_bytes(self._models())
            return {"used": model, "peak": model, "asleep": {}}
        mapped = 0 if self.memory is None else self.memory.mapped_bytes
        return on_gpu(torch.cuda.current_device(), self._device, mapped, {}, _logger)

    def _models(self) -> list[torch.nn.Module]:
        return [self._scheduler.tp_worker.model_runner.model]

    def loaded(self) -> None:
        """Every rank has its weights, and nothing else yet: from here on a peak counts."""
        more = 0
        if self._on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            more = allowance(storage_bytes(self._models()), on_gpu=True)
        found = self.measure()
        reports = ranks.gather({**found, "peak": int(found["used"]) + more})
        if self.lease is not None:
            self.lease.true_up(reports, more_to_come=False)

    def ready(self) -> None:
        """Every rank has its graphs, too."""
        self._publisher.stop()
        reports = ranks.gather(self._publisher.publish())
        if self.lease is not None:
            self.lease.true_up(reports, more_to_come=True)

    def tick(self) -> None:
        """Before each step: says now and then what a rank on a GPU has, so that it is not taken for somebody else's."""
        if self._publishes and self._on_gpu and (now := time.monotonic()) >= self._say_again:
            self._say_again = now + _EVERY_S
            self._publisher.publish()

    def describe(self) -> str:
        """For people: "2 GiB static" or "nothing static"."""
        return "nothing static" if self.lease is None else self.lease.describe()

    def close(self) -> None:
        """Leaves the tenant; called when the rank's process is about to end."""
        self._publisher.stop()
        self._member.close()


def _estimates(lease: StaticLease, devices: list[str], scheduler: Any) -> list[int]:
    """Bytes by rank, before anything is loaded."""
    if lease.fixed is not None:
        return [0] * len(devices)
    arguments = scheduler.server_args
    sizes = weights.of_ranks(
        scheduler.model_config, str(arguments.load_format), int(arguments.tp_size), int(arguments.pp_size), _logger
    )
    return [static_bytes(size, on_gpu=device != "host") for size, device in zip(sizes, devices, strict=True)]
