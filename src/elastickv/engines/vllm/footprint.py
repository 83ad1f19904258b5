"""What a worker has on its device besides its cache. Runs in the worker."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, Final

import torch
from vllm.logger import init_logger

from elastickv import _core
from elastickv.errors import ElasticKVError
from elastickv.memory import gpu

__all__ = ["Publisher", "begin", "device_of", "measure"]

_logger = init_logger("vllm.elastickv")

_EVERY_S: Final = 0.25

_CONTEXT: Final = 640 * 1024 * 1024
"""Of a process outside of PyTorch's allocator, where NVML does not say: CUDA's context, kernels, NCCL, workspaces."""


def device_of(worker: Any) -> str:
    """The name of the rank's device: host, or the UUID of the GPU or of its MIG instance."""
    if worker.device.type == "cpu":
        return "host"
    return _gpu_name(worker.device.index or 0)


@functools.cache
def _gpu_name(number: int) -> str:
    """The driver knows MIG instances by their own names, and numbers devices as PyTorch does."""
    return _core.open_driver(f"cuda:{number}").device_id


def begin(worker: Any) -> None:
    """From here on a peak counts: what loading took for a moment is over."""
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(worker.device)


def measure(worker: Any) -> dict[str, Any]:
    """Bytes: used now, the peak since begin(), and asleep by vLLM's tag. On the host only the model counts."""
    if worker.device.type == "cpu":
        sleeper = worker.elastickv_sleeper
        model = _model_bytes(worker.model_runner.get_model()) if sleeper is None else sleeper.resident_bytes
        return {"used": model, "peak": model, "asleep": {}}
    return _on_gpu(worker)


def _on_gpu(worker: Any) -> dict[str, Any]:
    asleep = _asleep()
    reserved = torch.cuda.memory_reserved(worker.device) - sum(asleep.values())
    outside = _outside(worker, reserved)
    peak = torch.cuda.max_memory_reserved(worker.device)
    return {"used": reserved + outside, "peak": max(reserved, peak) + outside, "asleep": asleep}


def _model_bytes(model: torch.nn.Module) -> int:
    storages: dict[int, int] = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values()) + sum(_packed_bytes(module) for module in model.modules())


def _packed_bytes(layer: Any) -> int:
    """Of a linear layer whose weights vLLM has packed for the CPU: the parameter is empty then, and the copy hidden."""
    weight = getattr(layer, "weight", None)
    if not hasattr(layer, "cpu_linear") or weight is None or weight.numel():
        return 0
    rows = getattr(layer, "output_size_per_partition", layer.output_size)
    columns = getattr(layer, "input_size_per_partition", layer.input_size)
    return int(rows * columns * weight.element_size())


def _outside(worker: Any, reserved: int) -> int:
    """What the process has besides PyTorch's and the cache's memory."""
    try:
        seen = gpu.process_memory(worker.elastickv_device, os.getpid())
    except ElasticKVError as error:
        _logger.warning("elastickv estimates what this rank has besides PyTorch's memory: %s", error)
        seen = None
    if seen is None:
        return _CONTEXT
    backing = getattr(worker, "elastickv", None)
    return max(0, seen - reserved - (backing.memory.mapped_bytes if backing is not None else 0))


def _asleep() -> dict[str, int]:
    """By tag, what vLLM's allocator has unmapped and PyTorch still counts."""
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    sizes: dict[str, int] = {}
    for data in allocator.pointer_to_data.values() if allocator is not None else ():
        if data.is_asleep:
            sizes[data.tag] = sizes.get(data.tag, 0) + int(data.handle[1])
    return sizes


class Publisher:
    """Says on the ledger what this rank has of the static lease, so that it is not taken for somebody else's.

    On a GPU a thread says it again and again while the engine loads and captures its graphs; afterwards it changes
    only when the engine sleeps or wakes.
    """

    def __init__(self, worker: Any, member: _core.Tenant, wanted: bool) -> None:
        self._worker = worker
        self._member = member
        self._wanted = wanted
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to publish from a thread, on a GPU."""
        if self._wanted and self._worker.device.type == "cuda":
            self._thread = threading.Thread(target=self._run, name="elastickv-footprint", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            self._member.publish_static_used(_on_gpu(self._worker)["used"])

    def stop(self) -> None:
        """Ends the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            thread.join(5.0)

    def publish(self) -> dict[str, Any]:
        """Measures, publishes, and returns what was measured."""
        found = measure(self._worker)
        if self._wanted:
            self._member.publish_static_used(found["used"])
        return found
