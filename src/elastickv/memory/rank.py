"""A rank's side of a cache: the reserved range, its tensor, and the fence for orders that arrive with a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastickv import _core
from elastickv.memory.reclaim import Reclaimer

__all__ = ["RankMemory", "RankSpec"]


@dataclass(frozen=True)
class RankSpec:
    """What a rank needs to attach, as plain data: it is pickled and travels with the engine's own messages."""

    directory: str
    device: str
    slot: int
    incarnation: int
    table: str
    rank: int
    spans: int
    span_bytes: int
    page_bytes: int
    driver_page: int
    """Page of the host driver; 0 where the driver decides."""


class RankMemory:
    """One rank's memory. Close it once no work touches the tensor any more; threads may share it."""

    def __init__(self, spec: RankSpec, tenant: _core.Tenant, rank: _core.Rank, driver: _core.Driver) -> None:
        self.spec = spec
        self._tenant = tenant
        self._rank = rank
        self._driver = driver
        self._reclaimer: Reclaimer | None = None

    @classmethod
    def attach(cls, spec: RankSpec, *, allow_context: bool = False) -> RankMemory:
        """Joins the tenant, reserves the range and starts the mapper. Errors say what is wrong with which part.

        `allow_context`: make a CUDA context if this process has none yet; it costs hundreds of MiB of the GPU.
        """
        ledger = _core.Ledger.open(spec.directory, spec.device)
        tenant = ledger.attach(spec.slot, spec.incarnation)
        driver = _core.open_driver(spec.device, page_bytes=spec.driver_page, allow_context=allow_context)
        table = _core.PageTable.open(spec.table, spec.incarnation)
        rank = _core.Rank.attach(driver, table, tenant, spec.rank, spec.spans, spec.span_bytes, spec.page_bytes)
        return cls(spec, tenant, rank, driver)

    @property
    def address(self) -> int:
        """Where the range starts."""
        return self._rank.address

    @property
    def tensor_bytes(self) -> int:
        """The exact virtual size: spans x blocks x bytes of a block."""
        return self._rank.bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes that have memory behind them now."""
        return self._rank.mapped_bytes

    def wait_block0(self, timeout_s: float) -> None:
        """Waits until block 0 may be touched. DeadlineExceeded, or OutOfMemory with the driver's text."""
        self._rank.wait_first_page(int(timeout_s * 1000))

    def fence(self, ticket: int, stream: int = 0) -> None:
        """Orders to unmap up to `ticket` have arrived; call it before launching the work they came with.

        `stream`: the CUstream that all work on the cache goes through, as an integer. Returns at once.
        """
        self._rank.fence(ticket, stream)

    def set_reclaimer(self, give_up: Callable[[], object] | None) -> None:
        """What to call, on a thread of its own, when the device has no memory for a page that is leased; None: nothing.

        It gives back what this process caches for itself, such as torch.cuda.empty_cache; the mapping is tried once
        more after it, or after 0.2 s. It is called once a second at most.
        """
        if self._reclaimer is not None:
            self._reclaimer.stop()
        self._reclaimer = Reclaimer(self._rank, give_up) if give_up is not None else None

    def __dlpack__(self, **options: Any) -> Any:
        return self._rank.array().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, ordinal = self._rank.array().__dlpack_device__()
        return int(kind), int(ordinal)

    def close(self) -> None:
        """Unmaps everything and leaves the tenant. A tensor that is still held faults when it is touched."""
        self.set_reclaimer(None)
        self._rank.close()
        self._tenant.close()
