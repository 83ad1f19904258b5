"""What a worker has on its device besides its cache. Runs in the worker."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.logger import init_logger

from elastickv import _core
from elastickv.engines import footprint

__all__ = ["begin", "device_of", "glance", "measure"]

_logger = init_logger("vllm.elastickv")


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
    return footprint.on_gpu(worker.device, worker.elastickv_device, _mapped(worker), _asleep(), _logger)


def glance(worker: Any) -> int:
    """Bytes used now, on a GPU, asked by a thread while the worker's own may be allocating."""
    return footprint.glance(worker.elastickv_device, _mapped(worker), lambda: _allocated(worker), _logger)


def _mapped(worker: Any) -> int:
    backing = getattr(worker, "elastickv", None)
    return backing.memory.mapped_bytes if backing is not None else 0


def _allocated(worker: Any) -> int:
    """By PyTorch, which may not be asked where vLLM's allocator is on; that one's own list is most of it then."""
    model = worker.vllm_config.model_config
    if model.enable_sleep_mode or getattr(model, "enable_cumem_allocator", False):
        return sum(int(data.handle[1]) for data in _handles())
    return int(torch.cuda.memory_reserved(worker.device))


def _model_bytes(model: torch.nn.Module) -> int:
    return footprint.storage_bytes([model]) + sum(_packed_bytes(module) for module in model.modules())


def _packed_bytes(layer: Any) -> int:
    """Of a linear layer whose weights vLLM has packed for the CPU: the parameter is empty then, and the copy hidden."""
    weight = getattr(layer, "weight", None)
    if not hasattr(layer, "cpu_linear") or weight is None or weight.numel():
        return 0
    rows = getattr(layer, "output_size_per_partition", layer.output_size)
    columns = getattr(layer, "input_size_per_partition", layer.input_size)
    return int(rows * columns * weight.element_size())


def _asleep() -> dict[str, int]:
    """By tag, what vLLM's allocator has unmapped and PyTorch still counts."""
    sizes: dict[str, int] = {}
    for data in _handles():
        if data.is_asleep:
            sizes[data.tag] = sizes.get(data.tag, 0) + int(data.handle[1])
    return sizes


def _handles() -> list[Any]:
    """What vLLM's allocator has, at one moment: another thread may be adding to it."""
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    return list(allocator.pointer_to_data.values()) if allocator is not None else []
