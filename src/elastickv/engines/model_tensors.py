"""The memory behind a model on the CPU: every storage once, whoever shares it, and its bytes in a file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import Final

import torch

from elastickv.engines.weightfile import Region, WeightFile
from elastickv.errors import OutOfMemory
from elastickv.units import format_size

__all__ = ["Saved", "bytes_of", "held_bytes", "release_to_kernel", "storages"]

_TCMALLOC: Final = "MallocExtension_ReleaseFreeMemory"


def bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The storage's bytes themselves, no copy; not to be used once the storage has been resized.

    Not through Tensor.numpy(): that forbids the storage to be resized from then on.
    """
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def storages(models: Iterable[torch.nn.Module]) -> list[tuple[torch.UntypedStorage, list[torch.Tensor]]]:
    """Each storage with bytes, and the tensors known to lie in it.

    Parameters and buffers; further tensors that a layer keeps, or the function that it calls, if PyTorch's allocator
    made them (the KV cache, which layers keep too, is not of that kind).
    """
    found: dict[int, tuple[torch.UntypedStorage, dict[int, torch.Tensor]]] = {}

    def add(tensor: torch.Tensor, *, own: bool) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() and (own or storage.resizable()):
            found.setdefault(storage.data_ptr(), (storage, {}))[1][id(tensor)] = tensor

    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            add(tensor, own=True)
        for module in model.modules():
            for tensor in _kept(module):
                add(tensor, own=False)
    return [(storage, list(tensors.values())) for storage, tensors in found.values()]


def _kept(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for value in vars(module).values():
        if isinstance(value, torch.Tensor):
            yield value
        for cell in getattr(value, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.Tensor):
                yield cell.cell_contents


def held_bytes(models: Iterable[torch.nn.Module]) -> int:
    """Of all storages together; what is asleep has none."""
    return sum(storage.nbytes() for storage, _ in storages(models))


class Saved:
    """One storage whose bytes are in a file. It may be released and restored again and again."""

    def __init__(self, storage: torch.UntypedStorage, tensors: list[torch.Tensor], region: Region) -> None:
        self.region = region
        self._storage: torch.UntypedStorage | None = storage if storage.resizable() else None
        self._places = [] if storage.resizable() else [(t, t.storage_offset(), t.size(), t.stride()) for t in tensors]

    def release(self) -> None:
        """Gives the memory up. A storage that was mapped from a file is let go by the tensors that are known."""
        if self._storage is not None:
            self._storage.resize_(0)
        for tensor, *_ in self._places:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device="cpu")

    def restore(self, file: WeightFile, until: float) -> None:
        """Takes memory and reads the bytes back. OutOfMemory, DeadlineExceeded, Unavailable: release() then."""
        storage = self._storage
        try:
            if storage is None:
                storage = torch.UntypedStorage(self.region.size, device="cpu")
            else:
                storage.resize_(self.region.size)
        except RuntimeError as error:  # PyTorch has no class of its own for it
            size = format_size(self.region.size)
            raise OutOfMemory(f"the machine has no {size} for weights: {error}", bytes=self.region.size) from None
        file.read(self.region, bytes_of(storage), until)
        for tensor, offset, size, stride in self._places:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage, offset, size, stride)


def release_to_kernel() -> None:
    """What was freed leaves the process: the C library keeps it otherwise, for whoever allocates next."""
    library = ctypes.CDLL(None)
    if hasattr(library, _TCMALLOC):
        getattr(library, _TCMALLOC)()
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
