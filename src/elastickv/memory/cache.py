"""A cache as the process that schedules sees it: tenant, pool and page table, and what each rank needs to attach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import InvalidArgument
from elastickv.memory.capacity import device_page
from elastickv.memory.geometry import PoolGeometry, RankGeometry
from elastickv.memory.rank import RankSpec
from elastickv.memory.tenancy import Tenancy
from elastickv.units import format_size

__all__ = ["Cache"]

CUDA_EXTENT = 128 * 1024 * 1024
"""Growing by 8 GiB and giving it back takes 4.1 + 4.5 ms in such extents, 8.1 + 7.9 ms in extents of 64 MiB, and no
less in larger ones (H100, driver 580; benchmarks/gpu/growth.py)."""


class Cache:
    """The scheduling process's hold on an elastic cache. `pool` is thread-safe; the rest belongs to one thread."""

    def __init__(
        self,
        tenancy: Tenancy,
        geometry: PoolGeometry,
        table: _core.PageTable,
        pool: _core.Pool,
        layout: str,
        *,
        owns_tenancy: bool,
    ) -> None:
        self.tenancy = tenancy
        self.settings = tenancy.settings
        self.geometry = geometry
        self.layout = layout
        self.pool = pool
        self.tenants = tenancy.tenants
        self._table = table
        self._owns_tenancy = owns_tenancy

    @classmethod
    def create(
        cls, settings: Settings, *, num_blocks: int, ranks: Sequence[RankGeometry], engine: str = "", layout: str = ""
    ) -> Cache:
        """Joins every device's ledger, then leases and orders the pages of block 0.

        Raises an ElasticKVError, with nothing joined, where names, sizes or budgets do not work.
        """
        if not ranks:
            raise InvalidArgument("a cache needs at least one rank", ranks=0)
        tenancy = Tenancy.join(settings, [rank.device for rank in ranks], engine=engine)
        try:
            return cls.within(tenancy, num_blocks=num_blocks, ranks=ranks, layout=layout, owns_tenancy=True)
        except BaseException:  # whatever it was, the names must be free again; it goes on to the caller
            tenancy.close()
            raise

    @classmethod
    def within(
        cls,
        tenancy: Tenancy,
        *,
        num_blocks: int,
        ranks: Sequence[RankGeometry],
        layout: str = "",
        owns_tenancy: bool = False,
    ) -> Cache:
        """The cache of a tenant that is on the ledgers already; leases and orders the pages of block 0.

        Raises an ElasticKVError, and the tenant is as it was, where sizes or budgets do not work. `owns_tenancy`:
        close() leaves the ledgers too.
        """
        if not ranks:
            raise InvalidArgument("a cache needs at least one rank", ranks=0)
        settings = tenancy.settings
        capacity = tenancy.view(ranks[0].device).capacity
        geometry = PoolGeometry.of(num_blocks, device_page(ranks[0].device, settings, capacity), ranks)
        for device in geometry.devices:
            _check_budget(tenancy, device, geometry)
        for device, tenant in tenancy.tenants.items():
            tenant.describe(layout=layout, page_bytes=geometry.page_cost(device))
        table, pool = cls._pool(settings, geometry, tenancy.tenants)
        return cls(tenancy, geometry, table, pool, layout, owns_tenancy=owns_tenancy)

    @classmethod
    def _pool(
        cls, settings: Settings, geometry: PoolGeometry, tenants: dict[str, _core.Tenant]
    ) -> tuple[_core.PageTable, _core.Pool]:
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
            cache_limit_pages=_core.NEVER if settings.cache_limit is None else cls._whole_pages(settings, geometry),
        )
        return table, pool

    @staticmethod
    def _whole_pages(settings: Settings, geometry: PoolGeometry) -> int:
        return (settings.cache_limit or 0) // geometry.page_cost(geometry.devices[0])

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
            f"page {format_size(geometry.page_cost(device))}, extent up to {format_size(extent)}, "
            f"strict (no scratch pages)"
        )

    def rank_stats(self) -> list[dict[str, Any]]:
        """What each rank's mapper has done: mapped bytes, calls and their nanoseconds, failures."""
        return [self._table.rank_stats(rank) for rank in range(len(self.geometry.ranks))]

    def close(self) -> None:
        """Tells the ranks to unmap everything. The pool must not be used afterwards.

        What it has leased goes back when the tenant leaves: here, if the cache was made with a tenant of its own.
        """
        self.pool.close()
        if self._owns_tenancy:
            self.tenancy.close()


def _check_budget(tenancy: Tenancy, device: str, geometry: PoolGeometry) -> None:
    budget = tenancy.budget(device)
    # The page of block 0, which is always held, and the pages of one block more.
    least = geometry.block_cost(device) + -(-geometry.block_bytes // geometry.page_bytes) * geometry.page_cost(device)
    if least > budget:
        raise InvalidArgument(
            f"a block of this engine takes {format_size(geometry.block_cost(device))} on {device} and two are needed, "
            f"the budget is {format_size(budget)}; raise --limit or --capacity, or lower the engine's block size",
            block_bytes=geometry.block_cost(device),
            budget=budget,
        )
