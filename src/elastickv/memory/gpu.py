"""What is known of NVIDIA GPUs without a CUDA context: names, order, and who uses how much memory, from NVML.

A process that only schedules or watches must not start CUDA: a context costs hundreds of MiB of the GPU, and a child
that was forked after it cannot use the GPU. NVML (libnvidia-ml.so.1, part of NVIDIA's driver) needs none. Sizes are
bytes. All functions may be called from any thread; they raise NotFound where there is no driver or no such device,
and DriverError with NVML's own words for everything else.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from elastickv.config import process_environment
from elastickv.errors import ConfigError, DriverError, ElasticKVError, NotFound

__all__ = ["device_memory", "device_name", "process_memory", "visible_devices"]

_MIG_OF = re.compile(r"MIG-(GPU-[0-9A-Fa-f-]+)/([0-9]{1,3})/([0-9]{1,3})", re.ASCII)

_lock = threading.Lock()
_started_in = 0
"""The process that has started NVML."""


def visible_devices(environ: Mapping[str, str] | None = None) -> list[str]:
    """UUIDs ("GPU-..." or "MIG-...") in the order in which CUDA numbers them for a process of this environment.

    CUDA_VISIBLE_DEVICES is read as CUDA does: indices, UUIDs or beginnings of one, MIG names of both kinds; the first
    entry that names nothing ends the list, and one that comes twice empties it. A process sees whole GPUs, or one MIG
    instance. ConfigError where numbers would mean CUDA's own order of GPUs that differ, which NVML does not know.
    """
    environ = process_environment() if environ is None else environ
    nvml = _start()
    try:
        return _visible(nvml, environ)
    except nvml.NVMLError as error:
        raise _failed("listing the GPUs", error) from None


def device_memory(uuid: str) -> tuple[int, int]:
    """(total, used) of a GPU or MIG instance. Used is all that no process could have, the driver's own part too."""
    nvml = _start()
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, uuid))
    except nvml.NVMLError as error:
        raise _failed(f"reading the memory of {uuid}", error) from None
    return int(info.total), int(info.total) - int(info.free)


def process_memory(uuid: str, pid: int) -> int | None:
    """What a process uses of the device, or None where NVML does not tell.

    It does not in a container with process ids of its own, nor for a process that has no CUDA context there.
    """
    nvml = _start()
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(_handle(nvml, uuid))
    except nvml.NVMLError as error:
        raise _failed(f"listing the processes on {uuid}", error) from None
    found = [process.usedGpuMemory for process in running if process.pid == pid]
    return int(found[0]) if found and found[0] is not None else None


def device_name(uuid: str) -> str:
    """What the maker calls it, such as "NVIDIA H100 80GB HBM3"."""
    nvml = _start()
    try:
        return str(nvml.nvmlDeviceGetName(_handle(nvml, uuid)))
    except nvml.NVMLError as error:
        raise _failed(f"reading the name of {uuid}", error) from None


def _start() -> Any:
    """pynvml, started once a process. It stays started: starting takes milliseconds, and memory is read often."""
    global _started_in
    try:
        import pynvml
    except ImportError:
        raise NotFound(
            "the Python package nvidia-ml-py, which reads GPUs without CUDA, is missing; run: pip install nvidia-ml-py"
        ) from None
    nvml: ModuleType = pynvml
    with _lock:
        if _started_in != os.getpid():
            try:
                nvml.nvmlInit()
            except nvml.NVMLError as error:
                raise NotFound(
                    f"NVIDIA's management library libnvidia-ml.so.1 cannot be used ({error}); install the NVIDIA "
                    "driver, start the container with GPU access, or use the device 'host'"
                ) from None
            _started_in = os.getpid()
    return nvml


def _failed(tried: str, error: Exception) -> ElasticKVError:
    return DriverError(f"{tried} failed: NVML says {error}; look at the output of nvidia-smi")


def _handle(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError_NotFound:
        known = [name for gpu in _gpus(nvml) for name in (_uuid(nvml, gpu), *_instances(nvml, gpu).values())]
        there = f"there are {', '.join(known)}" if known else "there is none"
        raise NotFound(f"there is no GPU {uuid!r} on this machine; {there}", device=uuid) from None


def _uuid(nvml: Any, handle: Any) -> str:
    return str(nvml.nvmlDeviceGetUUID(handle))


def _gpus(nvml: Any) -> list[Any]:
    """Handles of those that this user may use, in the order of their places on the bus."""
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(nvml.NVMLError_NoPermission):  # CUDA does not see it either
            found.append(nvml.nvmlDeviceGetHandleByIndex(index))
    return found


def _is_divided(nvml: Any, gpu: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(gpu)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError_NotSupported:  # a GPU that cannot be divided
        return False


def _instances(nvml: Any, gpu: Any) -> dict[tuple[int, int], str]:
    """UUIDs of the GPU's MIG instances by (GPU instance, compute instance), in CUDA's order; none outside MIG mode."""
    found: dict[tuple[int, int], str] = {}
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if _is_divided(nvml, gpu) else 0):
        with contextlib.suppress(nvml.NVMLError_NotFound):  # fewer are made than could be
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
            place = nvml.nvmlDeviceGetGpuInstanceId(instance), nvml.nvmlDeviceGetComputeInstanceId(instance)
            found[place] = _uuid(nvml, instance)
    return found


def _visible(nvml: Any, environ: Mapping[str, str]) -> list[str]:
    gpus = {_uuid(nvml, gpu): gpu for gpu in _gpus(nvml)}
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        chosen = list(gpus)
        _check_order(nvml, gpus, chosen, environ)
    else:
        chosen = _chosen(nvml, gpus, names, environ)
    whole = [name for name in chosen if name in gpus and not _is_divided(nvml, gpus[name])]
    if whole and not chosen[0].startswith("MIG-"):
        return whole
    instances = [
        name for entry in chosen for name in (_instances(nvml, gpus[entry]).values() if entry in gpus else [entry])
    ]
    return instances[:1]


def _chosen(nvml: Any, gpus: Mapping[str, Any], names: str, environ: Mapping[str, str]) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES up to the first that names nothing."""
    chosen: list[str] = []
    by_number = False
    for entry in names.split(","):
        text = entry.strip()
        number = re.match(r"[+-]?[0-9]+", text, re.ASCII)
        if number:
            index = int(number[0])
            name = list(gpus)[index] if 0 <= index < len(gpus) else None
            by_number = True
        else:
            name = _named(nvml, gpus, text)
        if name is None:
            break
        if name in chosen:
            return []
        chosen.append(name)
    if by_number:
        _check_order(nvml, gpus, chosen, environ)
    return chosen


def _named(nvml: Any, gpus: Mapping[str, Any], text: str) -> str | None:
    """The one device that the text is the UUID of, the beginning of one, or the old name of a MIG instance."""
    old = _MIG_OF.fullmatch(text)
    if old:
        parent = [name for name in gpus if name.lower() == old[1].lower()]
        return _instances(nvml, gpus[parent[0]]).get((int(old[2]), int(old[3]))) if parent else None
    names = list(gpus)
    if text.upper().startswith("MIG-"):
        names = [name for gpu in gpus.values() for name in _instances(nvml, gpu).values()]
    elif not text.upper().startswith("GPU-"):
        return None
    found = [name for name in names if name.lower().startswith(text.lower())]
    return found[0] if len(found) == 1 else None


def _check_order(nvml: Any, gpus: Mapping[str, Any], chosen: list[str], environ: Mapping[str, str]) -> None:
    """Numbers mean places on the bus where all GPUs are alike, or where CUDA is told so."""
    models = {str(nvml.nvmlDeviceGetName(gpu)) for gpu in gpus.values()}
    if len(models) <= 1 or not chosen or environ.get("CUDA_DEVICE_ORDER", "").upper() == "PCI_BUS_ID":
        return
    raise ConfigError(
        f"the GPUs here differ ({', '.join(sorted(models))}), and CUDA numbers them by speed; "
        "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs in CUDA_VISIBLE_DEVICES"
    )
