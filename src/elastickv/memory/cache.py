"""A cache as the process that schedules sees it: tenant, pool and page table, and what each rank needs to attach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastickv import _core
from elastickv.config import Settings, default_host_capacity
from elastickv.errors import InvalidArgument
from elastickv.memory.geometry import PoolGeometry, RankGeometry
from elastickv.memory.rank import RankSpec
from elastickv.units import format_size

__all__ = ["CUDA_PAGE", "Cache", "device_page", "open_device_ledger"]

CUDA_PAGE = 2 * 1024 * 1024
"""Minimum and recommended granularity of cuMemCreate on NVIDIA GPUs so far; the driver is asked again on attach."""

CUDA_EXTENT = 128 * 1024 * 1024
"""Growing by 8 GiB and giving it back takes 4.1 + 4.5 ms in such extents, 8.1 + 7.9 ms in extents of 64 MiB, and no
less in larger ones (H100, driver 580; benchmarks/gpu/growth.py)."""


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


def open_device_ledger(device: str, settings: Settings, capacity: int | None = None) -> _core.Ledger:
    """The ledger of a device; the settings' capacity beats `capacity`, which beats what the ledger says."""
    wanted = settings.capacity or capacity or (default_host_capacity() if device == "host" else 0)
    if settings.capacity is None:
        # Nobody asked for a size here: whoever came first has decided it.
        existing = _existing_capacity(device, settings)
        wanted = existing or wanted
    return _core.Ledger.open(str(settings.directory), device, capacity=wanted)


def _existing_capacity(device: str, settings: Settings) -> int:
    if not (settings.directory / f"{device}.ledger").exists():
        return 0
    return int(_core.Ledger.open(str(settings.directory), device).view()["capacity"])


class Cache:
    """The scheduling process's hold on an elastic cache. `pool` is thread-safe; the rest belongs to one thread."""

    def __init__(
        self,
        settings: Settings,
        geometry: PoolGeometry,
        tenants: Mapping[str, _core.Tenant],
        table: _core.PageTable,
        pool: _core.Pool,
        layout: str,
    ) -> None:
        self.settings = settings
        self.geometry = geometry
        self.layout = layout
        self.pool = pool
        self.tenants = dict(tenants)
        self._table = table

    @classmethod
    def create(
        cls,
        settings: Settings,
        *,
        num_blocks: int,
        ranks: Sequence[RankGeometry],
        engine: str = "",
        layout: str = "",
        capacity: Mapping[str, int] | None = None,
    ) -> Cache:
        """Joins every device's ledger, then leases and orders the pages of block 0.

        `capacity`: bytes of a device, by device, for a ledger that is made now and settings that name none. Raises
        an ElasticKVError, with nothing joined, where names, sizes or budgets do not work.
        """
        devices = tuple(dict.fromkeys(rank.device for rank in ranks))
        if not devices:
            raise InvalidArgument("a cache needs at least one rank", ranks=0)
        ledgers = {device: open_device_ledger(device, settings, (capacity or {}).get(device)) for device in devices}
        page = device_page(devices[0], settings, int(ledgers[devices[0]].view()["capacity"]))
        geometry = PoolGeometry.of(num_blocks, page, ranks)
        tenants: dict[str, _core.Tenant] = {}
        try:
            for device, ledger in ledgers.items():
                tenants[device] = _join(ledger, device, settings, geometry, engine, layout)
            return cls._over(settings, geometry, tenants, layout)
        except BaseException:  # whatever it was, the names must be free again; it goes on to the caller
            for tenant in tenants.values():
                tenant.close()
            raise

    @classmethod
    def _over(cls, settings: Settings, geometry: PoolGeometry, tenants: dict[str, _core.Tenant], layout: str) -> Cache:
        first = next(iter(tenants.values()))
        table = _core.PageTable.create(geometry.pages, len(geometry.ranks), first.incarnation)
        pool = _core.Pool.make(
            table,
            [(tenant, geometry.page_cost(device)) for device, tenant in tenants.items()],
            geometry.num_blocks,
            geometry.block_bytes,
            geometry.page_bytes,
            max_extent_pages=cls._extent_pages(settings, geometry),
            stock_pages=_core.NEVER if settings.stock is None else cls._pages(settings.stock, geometry),
            idle_release_us=int(settings.idle_release * 1e6),
            cache_release_us=_core.NEVER if settings.cache_release is None else int(settings.cache_release * 1e6),
            give_back_wait_us=settings.give_back_wait * 1000,
        )
        return cls(settings, geometry, tenants, table, pool, layout)

    @staticmethod
    def _pages(size: int, geometry: PoolGeometry) -> int:
        return -(-size // geometry.page_cost(geometry.devices[0]))

    @staticmethod
    def _extent_pages(settings: Settings, geometry: PoolGeometry) -> int:
        on_host = geometry.devices[0] == "host"
        largest = max(geometry.rank_page_bytes(rank) for rank in range(len(geometry.ranks)))
        size = settings.max_extent or (largest if on_host else CUDA_EXTENT)
        return max(1, size // largest)

    def rank_spec(self, rank: int) -> RankSpec:
        """What rank `rank` needs to attach."""
        shape = self.geometry.ranks[rank]
        tenant = self.tenants[shape.device]
        return RankSpec(
            directory=str(self.settings.directory),
            device=shape.device,
            slot=tenant.slot,
            incarnation=tenant.incarnation,
            table=self._table.path,
            rank=rank,
            spans=shape.spans,
            span_bytes=self.geometry.num_blocks * shape.block_bytes,
            page_bytes=self.geometry.rank_page_bytes(rank),
            driver_page=self.geometry.page_bytes if shape.device == "host" else 0,
        )

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until every rank is attached and block 0 is mapped on all of them. DeadlineExceeded otherwise."""
        self.pool.wait_ready(int(timeout_s * 1000))

    def describe(self) -> str:
        """The one line that an engine logs at its start."""
        geometry, settings = self.geometry, self.settings
        device = geometry.devices[0]
        virtual = sum(geometry.virtual_bytes(rank) for rank in range(len(geometry.ranks)))
        limit = self.tenants[device].limit_wanted[0]
        extent = self._extent_pages(settings, geometry) * geometry.page_cost(device)
        return (
            f"elastickv manages the KV cache of {settings.tenant_name!r} on {', '.join(geometry.devices)}: "
            f"{format_size(virtual)} virtual in {geometry.num_blocks} blocks, floor {format_size(settings.floor)}, "
            f"limit {format_size(limit)}, layout {self.layout or 'one span'}, "
            f"page {format_size(geometry.page_cost(device))}, extent up to {format_size(extent)}"
        )

    def rank_stats(self) -> list[dict[str, Any]]:
        """What each rank's mapper has done: mapped bytes, calls and their nanoseconds, failures."""
        return [self._table.rank_stats(rank) for rank in range(len(self.geometry.ranks))]

    def close(self) -> None:
        """Tells the ranks to unmap everything and leaves the ledger. The pool must not be used afterwards."""
        self.pool.close()
        for tenant in self.tenants.values():
            tenant.close()


def _join(
    ledger: _core.Ledger, device: str, settings: Settings, geometry: PoolGeometry, engine: str, layout: str
) -> _core.Tenant:
    capacity = int(ledger.view()["capacity"])
    budget = min(capacity, settings.limit if settings.limit is not None else capacity)
    # The page of block 0, which is always held, and the pages of one block more.
    least = geometry.block_cost(device) + -(-geometry.block_bytes // geometry.page_bytes) * geometry.page_cost(device)
    if least > budget:
        raise InvalidArgument(
            f"a block of this engine takes {format_size(geometry.block_cost(device))} on {device} and two are needed, "
            f"the budget is {format_size(budget)}; raise --limit or --capacity, or lower the engine's block size",
            block_bytes=geometry.block_cost(device),
            budget=budget,
        )
    return ledger.join(
        settings.tenant_name,
        floor=settings.floor,
        limit=settings.limit,
        set_limit=settings.set_limit,
        weight=settings.weight,
        priority=settings.priority,
        engine=engine,
        layout=layout,
        page_bytes=geometry.page_cost(device),
    )
