"""What one rank has on its device besides its cache, and how the ledger learns of it. Runs in the rank's process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from elastickv import _core
from elastickv.engines.static import Footprint
from elastickv.errors import ElasticKVError
from elastickv.memory import gpu

__all__ = ["Publisher", "glance", "on_gpu", "storage_bytes"]

_EVERY_S: Final = 0.25

_CONTEXT: Final = 640 * 1024 * 1024
"""Of a process outside of PyTorch's allocator, where NVML does not say: CUDA's context, kernels, NCCL, workspaces."""


def on_gpu(
    device: torch.device | str | int, uuid: str, mapped: int, asleep: dict[str, int], logger: logging.Logger
) -> dict[str, Any]:
    """Bytes: used now, and the peak since PyTorch's statistics were reset; `asleep` is passed on.

    `uuid`: the device's name on the ledger; `mapped`: of the cache; `asleep`: by tag, what PyTorch still counts and
    the device does not have any more.
    """
    reserved = torch.cuda.memory_reserved(device) - sum(asleep.values())
    seen = _seen(uuid, logger)
    if seen is None:
        used = reserved + _CONTEXT
    elif asleep:  # more may have gone than is known by size
        used = max(0, seen - mapped)
    else:
        used = max(reserved, seen - mapped)
    more = max(0, torch.cuda.max_memory_reserved(device) - reserved)
    return {"used": used, "peak": used + more, "asleep": asleep}


def glance(uuid: str, mapped: int, otherwise: Callable[[], int], logger: logging.Logger) -> int:
    """Bytes used now, for a thread beside the one that allocates; the rest as in on_gpu().

    PyTorch is asked for nothing where NVML knows: reading its counters takes its allocator's lock and keeps Python's,
    and an allocator that calls Python under that lock, as vLLM's for sleep does, then never ends. `otherwise`: what
    the process has through PyTorch, where NVML does not say.
    """
    seen = _seen(uuid, logger)
    return otherwise() + _CONTEXT if seen is None else max(0, seen - mapped)


def _seen(uuid: str, logger: logging.Logger) -> int | None:
    """What NVML says that the process has, or None."""
    try:
        return gpu.process_memory(uuid, os.getpid())
    except ElasticKVError as error:
        logger.warning("elastickv estimates what this rank has besides PyTorch's memory: %s", error)
        return None


def storage_bytes(models: Iterable[torch.nn.Module]) -> int:
    """Of all parameters and buffers, each storage once, whoever shares it."""
    storages: dict[int, int] = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


class Publisher:
    """Says on the ledger what this rank has of the static lease, so that it is not taken for somebody else's.

    On a GPU a thread says it again and again while the engine loads and captures its graphs.
    """

    def __init__(
        self, member: _core.Tenant, measure: Callable[[], Footprint], glance: Callable[[], int], wanted: bool
    ) -> None:
        """`measure()` is asked by the thread that allocates, `glance()` by the one of start(), for bytes in use.

        `wanted`: there is a static lease.
        """
        self._member = member
        self._measure = measure
        self._glance = glance
        self._wanted = wanted
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to publish from a thread."""
        if self._wanted:
            self._thread = threading.Thread(target=self._run, name="elastickv-footprint", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            self._member.publish_static_used(self._glance())

    def stop(self) -> None:
        """Ends the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            thread.join(5.0)

    def publish(self) -> Footprint:
        """Measures, publishes, and returns what was measured."""
        found = self._measure()
        if self._wanted:
            self._member.publish_static_used(int(found["used"]))
        return found
