"""What oneDNN has packed for vLLM's kernels on the CPU: freed, and packed again from what it was made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final

import torch

from elastickv.engines.model_tensors import bytes_of
from elastickv.engines.weightfile import Region, WeightFile
from elastickv.errors import EngineRefused

__all__ = ["Packed"]

_HANDLE: Final = "handler_tensor"


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
