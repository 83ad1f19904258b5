"""Which device each rank will run on, before there is a worker that could say so."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from elastickv.config import Settings
from elastickv.errors import EngineRefused
from elastickv.memory import gpu

__all__ = ["check", "expected"]


def expected(config: Any, settings: Settings) -> list[str]:
    """The device of each rank of the engine with this VllmConfig. Makes no CUDA context: NVML knows the names."""
    parallel = config.parallel_config
    ranks: int = parallel.world_size
    if current_platform.is_cpu():
        devices = ["host"] * ranks
    elif current_platform.is_cuda():
        devices = _gpus(ranks, getattr(parallel, "assigned_physical_gpu_ids", None))
    else:
        name = current_platform.device_type
        raise EngineRefused(f"elastickv cannot manage a device of the type {name}; it manages cpu and cuda")
    for device in devices:
        if settings.device not in ("auto", device) and not settings.device.isdecimal():
            raise EngineRefused(
                f"elastickv was told to manage {settings.device}, and this engine runs on {device}; "
                "correct ELASTICKV_DEVICE or leave it out"
            )
    return devices


def _gpus(ranks: int, assigned: list[int] | None) -> list[str]:
    # An assignment names places on the bus; without one a rank takes the GPU of its own number in CUDA's order.
    uuids = gpu.visible_devices() if assigned is None else gpu.visible_devices({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    places = list(range(ranks)) if assigned is None else list(assigned[:ranks])
    if len(places) < ranks or any(place >= len(uuids) for place in places):
        raise EngineRefused(
            f"this engine has {ranks} ranks, and {len(uuids)} GPUs are visible to it; "
            "lower --tensor-parallel-size, or correct CUDA_VISIBLE_DEVICES"
        )
    return [uuids[place] for place in places]


def check(devices: list[str], found: list[str]) -> None:
    """Refuses if a worker runs elsewhere than was leased for it. The names' kinds (GPU-, MIG-) are not compared."""
    for rank, (device, other) in enumerate(zip(devices, found, strict=True)):
        if device.partition("-")[2].lower() != other.partition("-")[2].lower():
            raise EngineRefused(
                f"elastickv expected rank {rank} on {device}, and it runs on {other}; "
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs in CUDA_VISIBLE_DEVICES"
            )
