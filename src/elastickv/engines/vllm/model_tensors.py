"""The memory behind a model on the CPU: every storage once, whoever shares it, and what oneDNN has packed."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch

from elastickv.engines.weightfile import Region, WeightFile
from elastickv.errors import EngineRefused, OutOfMemory
from elastickv.units import format_size

__all__ = ["Packed", "Saved", "bytes_of", "held_bytes", "release_to_kernel", "storages"]

_HANDLE: Final = "handler_tensor"
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


class Packed:
    """What oneDNN holds behind one of vLLM's handlers, and where the matrix lies that it was packed from."""

    def __init__(
        self, handler: Any, make: Callable[..., Any], weight: torch.Tensor, more: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        address = getattr(handler, _HANDLE, None)
        if not isinstance(address, torch.Tensor) or not callable(getattr(handler, "dtor", None)):
            raise EngineRefused(
                "vLLM's handlers of packed weights are not built as elastickv expects; "
                "start without --enable-sleep-mode, or use a version of vLLM that this elastickv names"
            )
        self._handler = weakref.ref(handler)
        self._make, self._more, self._named = make, more, named
        self._transposed = weight.t().is_contiguous()
        self._dtype = weight.dtype
        flat = self._flat(weight)
        self._shape = tuple(flat.shape)
        self._pointer: torch.Tensor | None = None
        self.size = flat.numel() * flat.element_size()
        self.region: Region | None = None

    def _flat(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self._transposed else weight.contiguous()

    @property
    def gone(self) -> bool:
        """Whether vLLM has thrown the handler away, with what it held."""
        return self._handler() is None

    @property
    def resident(self) -> int:
        """Bytes in memory; what oneDNN adds for alignment is not counted."""
        return 0 if self.gone or self._pointer is not None else self.size

    def keep(self, file: WeightFile, weight: torch.Tensor, until: float) -> None:
        """Writes the matrix."""
        self.region = file.reserve(self.size)
        flat = self._flat(weight).detach().clone()  # of its own: the bytes of a view would be those of all of it
        file.write(self.region, bytes_of(flat.untyped_storage()), until)

    def release(self) -> None:
        """Frees what is packed. vLLM's handler is empty then: a call fails, it reads no freed memory."""
        handler = self._handler()
        if handler is None or self._pointer is not None:
            return
        pointer: torch.Tensor = getattr(handler, _HANDLE)
        setattr(handler, _HANDLE, None)
        handler.dtor(pointer.item())
        with torch.inference_mode():
            pointer.fill_(0)
        self._pointer = pointer

    def restore(self, file: WeightFile, until: float) -> None:
        """Packs it again. The tensor with the address stays the same one, for compiled code that knows it."""
        handler, pointer = self._handler(), self._pointer
        if handler is None or pointer is None or self.region is None:
            return
        flat = torch.empty(self._shape, dtype=self._dtype, device="cpu")
        file.read(self.region, bytes_of(flat.untyped_storage()), until)
        fresh = self._make(flat.t() if self._transposed else flat, *self._more, **self._named)
        with torch.inference_mode():
            pointer.copy_(getattr(fresh, _HANDLE))
        setattr(fresh, _HANDLE, None)
        setattr(handler, _HANDLE, pointer)
        self._pointer = None


def release_to_kernel() -> None:
    """What was freed leaves the process: the C library keeps it otherwise, for whoever allocates next."""
    library = ctypes.CDLL(None)
    if hasattr(library, _TCMALLOC):
        getattr(library, _TCMALLOC)()
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
