"""What one rank has besides its cache, on the ledger: its weights, graphs, activations and context.

The first rank leases for all of them before anything is loaded. SGLang runs no step to measure activations by, so an
allowance for them stays in the lease (planning/static.py), on top of what loading has really taken.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Final

import torch

from elastickv import _core
from elastickv.config import Settings
from elastickv.engines.footprint import Publisher, glance, on_gpu, storage_bytes
from elastickv.engines.sglang import ranks, weights
from elastickv.engines.sleeper import Sleeper
from elastickv.engines.static import Footprint, StaticLease
from elastickv.engines.weightfile import choose_directory
from elastickv.errors import ElasticKVError, EngineRefused
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
        self.sleeper: Sleeper | None = None
        """What puts the weights into a file, on a CPU where SGLang's memory saver was asked for."""
        self._device = device
        # Of this thread: another one, such as the publisher's, begins on the first GPU.
        self._ordinal = torch.cuda.current_device() if device != "host" else 0
        self._scheduler = scheduler
        self._asleep: dict[str, int] = {}
        self._publishes = bool(place["publishes"])
        self._member: _core.Tenant = attach_member(place)
        self._publisher = Publisher(self._member, self.measure, self.glance, self._publishes)
        self._say_again = 0.0
        self._said = 0
        self._reserved = 0

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
        elif scheduler.server_args.enable_memory_saver:
            made.sleeper = _sleeper(made._models)
        return made

    @property
    def _on_gpu(self) -> bool:
        return self._device != "host"

    def measure(self) -> Footprint:
        """Now. On the host only the model counts."""
        if not self._on_gpu:
            model = storage_bytes(self._models()) if self.sleeper is None else self.sleeper.resident_bytes
            return {"used": model, "peak": model, "asleep": {}}
        return on_gpu(self._ordinal, self._device, self._mapped, self._asleep, _logger)

    def glance(self) -> int:
        """Bytes used now, on a GPU, asked by a thread while the scheduler's may be allocating."""
        return glance(self._device, self._mapped, lambda: int(torch.cuda.memory_reserved(self._ordinal)), _logger)

    @property
    def _mapped(self) -> int:
        return 0 if self.memory is None else self.memory.mapped_bytes

    def _models(self) -> list[torch.nn.Module]:
        return [self._scheduler.tp_worker.model_runner.model]

    @property
    def saver_on(self) -> bool:
        """Whether SGLang's own memory saver frees what is released."""
        return bool(self._scheduler.tp_worker.model_runner.memory_saver_adapter.enabled)

    def loaded(self) -> None:
        """Every rank has its weights, and nothing else yet: from here on a peak counts."""
        more = 0
        if self._on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._ordinal)
            more = allowance(storage_bytes(self._models()), on_gpu=True)
        found = self.measure()
        reports = ranks.gather({**found, "peak": int(found["used"]) + more})
        if self.lease is not None:
            self.lease.true_up(reports, more_to_come=False)

    def ready(self) -> None:
        """Every rank has its graphs, too."""
        self._publisher.stop()
        reports = ranks.gather(self._publish())
        if self.lease is not None:
            self.lease.true_up(reports, more_to_come=True)

    def publish(self, gone: Collection[str]) -> Footprint:
        """Measures and says it; `gone`: tags of what SGLang has released and not resumed."""
        # PyTorch goes on counting what the memory saver has unmapped. Graphs are not told apart: NVML knows.
        released = "weights" in gone and self._on_gpu and self.saver_on
        self._asleep = {"weights": storage_bytes(self._models())} if released else {}
        return self._publish()

    def shrink(self, gone: Collection[str]) -> None:
        """Gives back what no rank has any more; all of them call this."""
        if self.sleeper is None and not self.saver_on:
            return  # the weights are there, and steps may go on
        reports = ranks.gather(self.publish(gone))
        if self.lease is not None:
            self.lease.shrink(reports)

    def tick(self) -> None:
        """Before each step: says now and then what a rank on a GPU has, so that it is not taken for somebody else's.

        Only PyTorch's memory grows by then; asking NVML for the rest would hold a step up.
        """
        if self._publishes and self._on_gpu and (now := time.monotonic()) >= self._say_again:
            self._say_again = now + _EVERY_S
            reserved = torch.cuda.memory_reserved(self._ordinal)
            if reserved != self._reserved:
                self._member.publish_static_used(max(0, self._said + reserved - self._reserved))

    def _publish(self) -> Footprint:
        found = self._publisher.publish()
        if self._on_gpu:
            self._said, self._reserved = int(found["used"]), torch.cuda.memory_reserved(self._ordinal)
        return found

    def describe(self) -> str:
        """For people: "2 GiB static" or "nothing static"."""
        return "nothing static" if self.lease is None else self.lease.describe()

    def close(self) -> None:
        """Leaves the tenant; called when the rank's process is about to end."""
        self._publisher.stop()
        if self.sleeper is not None:
            self.sleeper.close()
        self._member.close()


def _sleeper(models: Callable[[], list[torch.nn.Module]]) -> Sleeper:
    try:
        return Sleeper(models, choose_directory(Settings.load().sleep_dir), _logger)
    except ElasticKVError as error:
        raise EngineRefused(f"elastickv cannot let this engine sleep: {error.message}") from None


def _estimates(lease: StaticLease, devices: list[str], scheduler: Any) -> list[int]:
    """Bytes by rank, before anything is loaded."""
    if lease.fixed is not None:
        return [0] * len(devices)
    arguments = scheduler.server_args
    sizes = weights.of_ranks(
        scheduler.model_config, str(arguments.load_format), int(arguments.tp_size), int(arguments.pp_size), _logger
    )
    return [static_bytes(size, on_gpu=device != "host") for size, device in zip(sizes, devices, strict=True)]
