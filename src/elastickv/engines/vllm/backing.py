"""The cache's backing memory: the one allocation of vLLM's KV cache is answered with the elastic range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from elastickv.errors import EngineRefused
from elastickv.memory import RankMemory, RankSpec
from elastickv.units import format_size

__all__ = ["ATTACH_S", "Backing"]

ATTACH_S = 30.0
"""How long block 0 may take to be mapped, in seconds."""


class _Answer(TorchFunctionMode):  # type: ignore[misc]
    """Answers torch.zeros(size, dtype=int8) with `tensor`, once; everything else goes through."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.answered = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.int8 and args == (self.tensor.numel(),):
            self.answered += 1
            return self.tensor
        return func(*args, **kwargs)


class Backing:
    """A rank's memory in the process that owns it. Used by the worker's thread."""

    def __init__(self, spec: RankSpec) -> None:
        """Attaches. Raises an ElasticKVError where the ledger, the driver or the page table cannot be had."""
        self.memory = RankMemory.attach(spec)
        self.tickets = 0
        """How many steps or calls have brought an order, for the check that they arrive at all."""
        self.last_ticket = 0
        self._answered = 0

    @contextmanager
    def allocation(self) -> Iterator[None]:
        """Within it, the allocation of the cache is answered with the elastic range."""
        tensor = torch.from_dlpack(self.memory)
        self.memory.wait_block0(ATTACH_S)
        with _Answer(tensor) as mode:
            yield
        self._answered += mode.answered

    def check_allocated(self, size: int) -> None:
        """Refuses if the cache did not ask for exactly this memory; `size` is what vLLM planned, in bytes."""
        if self._answered != 1 or size != self.memory.tensor_bytes:
            raise EngineRefused(
                f"elastickv answered {self._answered} allocations of {format_size(self.memory.tensor_bytes)}, and vLLM "
                f"planned one of {format_size(size)}: the cache is not managed; please report this with vLLM's version"
            )

    def fence(self, ticket: int, device: torch.device) -> None:
        """Orders up to `ticket` have arrived, before the next work is launched."""
        self.tickets += 1
        self.last_ticket = max(self.last_ticket, ticket)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self.memory.fence(ticket, stream)

    def reclaim_from_torch(self, device: torch.device) -> None:
        """Where the device has no memory for a page, PyTorch's free blocks are given back first."""
        if device.type != "cuda":
            return

        def give_up() -> None:
            with torch.cuda.device(device):
                torch.cuda.empty_cache()

        self.memory.set_reclaimer(give_up)

    def holds(self, tensors: list[torch.Tensor]) -> bool:
        """Whether every one of the tensors lies in the elastic range, and there is one at all."""
        low, high = self.memory.address, self.memory.address + self.memory.tensor_bytes
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not (low <= storage.data_ptr() and storage.data_ptr() + storage.nbytes() <= high):
                return False
        return bool(tensors)

    def report(self) -> dict[str, Any]:
        """Plain numbers for the engine's check."""
        return {"tickets": self.tickets, "last_ticket": self.last_ticket, "mapped": self.memory.mapped_bytes}

    def close(self) -> None:
        """Unmaps everything. The tensors fault from here on."""
        self.memory.close()
