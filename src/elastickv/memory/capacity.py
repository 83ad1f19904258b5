"""What a device offers: its ledger, how many bytes its tenants share, and in which pages."""

from __future__ import annotations

from elastickv import _core
from elastickv.config import Settings, default_host_capacity
from elastickv.memory import gpu

__all__ = ["CUDA_PAGE", "device_page", "open_device_ledger"]

CUDA_PAGE = 2 * 1024 * 1024
"""Minimum and recommended granularity of cuMemCreate on NVIDIA GPUs so far; the driver is asked again on attach."""

HOST_PAGE = 64 * 1024
HOST_RANGES = 16384
"""Ranges that a host cache is mapped in at most: the kernel allows a process 65,530 (vm.max_map_count), and the host
driver takes less than half of them, for splitting a range to unmap it needs more."""


def device_page(device: str, settings: Settings, capacity: int) -> int:
    """The page of the device, in bytes.

    On the host it is 64 KiB, or the power of two that cuts the virtual size (or the capacity, bytes) into HOST_RANGES.
    """
    if device != "host":
        return CUDA_PAGE
    if settings.page is not None:
        return settings.page
    reach = settings.virtual or capacity
    return max(HOST_PAGE, 1 << max(0, (reach // HOST_RANGES - 1).bit_length()))


def open_device_ledger(device: str, settings: Settings) -> _core.Ledger:
    """The ledger of a device; it is made if nobody has.

    The settings' capacity counts. Without one whoever came first has decided it, and who comes first takes half of
    the machine's memory on the host, and all of a GPU but the settings' headroom.
    """
    wanted = settings.capacity
    if wanted is None and not (settings.directory / f"{device}.ledger").exists():
        wanted = default_host_capacity() if device == "host" else _gpu_capacity(device, settings.headroom)
    return _core.Ledger.open(str(settings.directory), device, capacity=wanted or 0)


def _gpu_capacity(device: str, headroom: int) -> int:
    total, _ = gpu.device_memory(device)
    return max(CUDA_PAGE, (total - headroom) // CUDA_PAGE * CUDA_PAGE)
