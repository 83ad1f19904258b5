"""The library without an engine: open a device, join it, and use a cache as one array and a pool of blocks."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from elastickv.config import Settings
from elastickv.errors import InvalidArgument, NotFound
from elastickv.ledger import DeviceView
from elastickv.memory import gpu
from elastickv.memory.cache import Cache
from elastickv.memory.capacity import open_device_ledger
from elastickv.memory.geometry import RankGeometry
from elastickv.memory.rank import RankMemory
from elastickv.memory.steward import Steward

__all__ = ["BlockCache", "Device", "Membership", "open_device"]

READY_S = 10.0

Evicted = Callable[[Sequence[int]], None]
Preempt = Callable[[int], object]


def open_device(device: str = "host", *, capacity: str | int | None = None, directory: str | None = None) -> Device:
    """Opens a device's ledger, making it if nobody has.

    `device`: "host", a GPU's UUID, or its number in this process ("0", "cuda:0"). `capacity` (bytes, or a text such
    as "1GiB") is what the tenants share; without it the ledger's own counts, or half of the machine's memory on the
    host. `directory` replaces ELASTICKV_DIR.
    """
    arguments: dict[str, object] = {"device": device, "capacity": capacity, "directory": directory}
    settings = Settings.load(arguments=arguments)
    return Device(dataclasses.replace(settings, device=_lasting_name(settings.device)))


def _lasting_name(device: str) -> str:
    """The UUID in place of a GPU's number: processes number the same GPUs differently, and share a ledger by name."""
    if device == "auto" or device == "host" or "-" in device:
        return device
    number, names = int(device.removeprefix("cuda:")), gpu.visible_devices()
    if number >= len(names):
        there = f"it sees {', '.join(names)}" if names else "it sees none"
        raise NotFound(f"there is no GPU {number} in this process; {there} (CUDA_VISIBLE_DEVICES chooses what it sees)")
    return names[number]


class Device:
    """One device that tenants share. A context manager; closing it closes what was joined through it."""

    def __init__(self, settings: Settings) -> None:
        if settings.device == "auto":
            raise InvalidArgument("name the device: host, a GPU's number or its UUID", device="auto")
        self.settings = settings
        self._ledger = open_device_ledger(settings.device, settings)
        self._members: list[Membership] = []

    def join(self, name: str, **options: object) -> Membership:
        """A tenant's place on the device: floor, limit (bytes or texts), weight, priority and other settings."""
        arguments: dict[str, object] = {
            "device": self.settings.device,
            "capacity": self.settings.capacity,
            "directory": str(self.settings.directory),
            "name": name,
            **options,
        }
        member = Membership(Settings.load(arguments=arguments))
        self._members.append(member)
        return member

    def view(self) -> DeviceView:
        """Everybody on the device, as it stands."""
        return DeviceView.from_dict(self._ledger.view())

    def close(self) -> None:
        """Closes what was joined through this object."""
        for member in self._members:
            member.close()
        self._members.clear()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Membership:
    """A name and its settings; the ledger knows it once its cache is made."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._caches: list[BlockCache] = []

    def cache(
        self,
        *,
        num_blocks: int,
        block_bytes: int,
        spans: int = 1,
        on_evict: Evicted | None = None,
        on_preempt: Preempt | None = None,
        stream: int = 0,
    ) -> BlockCache:
        """Reserves `num_blocks` blocks of `block_bytes` bytes in each of `spans` stripes; maps block 0 alone.

        `on_evict` is told, on any thread, which cached blocks have lost their contents. `on_preempt` is told, on the
        cache's own thread, how many blocks in use have to be freed for a limit that was ordered to hold now, and
        again until they are; without it such an order waits for the blocks' users. `stream`: on a GPU, the
        CUstream (as an integer, 0: the default one) behind which freed blocks are done with; memory is unmapped once
        it has passed the work that was in it when the blocks were given up.
        """
        cache = BlockCache(self.settings, num_blocks, block_bytes, spans, on_evict, stream, on_preempt)
        self._caches.append(cache)
        return cache

    def close(self) -> None:
        """Closes its caches."""
        for cache in self._caches:
            cache.close()
        self._caches.clear()


class BlockCache:
    """Blocks of memory by number, mapped while they are held. Thread-safe. An int8 array through DLPack."""

    def __init__(
        self,
        settings: Settings,
        num_blocks: int,
        block_bytes: int,
        spans: int,
        on_evict: Evicted | None,
        stream: int = 0,
        on_preempt: Preempt | None = None,
    ) -> None:
        shape = RankGeometry(settings.device, spans, block_bytes)
        self._on_evict = on_evict
        self._on_preempt = on_preempt
        self._stream = stream
        self._close_lock = threading.Lock()
        self._closed = False
        self._delivered = 0
        self._cache = Cache.create(settings, num_blocks=num_blocks, ranks=[shape], engine="bare")
        try:
            self._memory = RankMemory.attach(self._cache.rank_spec(0), allow_context=True)
            self._cache.wait_ready(READY_S)
        except BaseException:  # not ours to judge: leave the ledger as it was, and let it go on
            self._cache.close()
            raise
        self._steward = Steward(self._cache.pool, self._maintain, settings.tenant_name)
        self._steward.start()

    def alloc(self, n: int) -> list[int] | None:
        """n blocks with memory behind them (it reads as zero when it is new), or None: none now."""
        if n < 0:
            raise InvalidArgument(f"{n} blocks cannot be allocated; ask for 0 or more", n=n)
        got = self._cache.pool.alloc(n)
        self._deliver()  # under pressure it may have ordered free pages back first
        if got is None:
            return None
        ids, evicted = got
        if evicted and self._on_evict is not None:
            self._on_evict(ids[len(ids) - evicted :])
        return ids

    def free(self, ids: Sequence[int], *, cached: bool = False) -> None:
        """Gives blocks back. `cached` ones keep their contents until somebody needs the memory; see reuse()."""
        self._cache.pool.release(list(ids), cached)

    def reuse(self, block: int) -> None:
        """Takes a cached block into use again. InvalidArgument if it is not cached any more."""
        self._cache.pool.touch(block)

    def stats(self) -> dict[str, Any]:
        """Bytes and blocks by state, and counters."""
        return dict(self._cache.pool.stats())

    def check_integrity(self) -> None:
        """IntegrityError if the books do not add up."""
        self._cache.pool.check_integrity()

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the range that have memory behind them now."""
        return self._memory.mapped_bytes

    def set_reclaimer(self, give_up: Callable[[], object] | None) -> None:
        """What gives back memory that this process caches for itself; see RankMemory.set_reclaimer()."""
        self._memory.set_reclaimer(give_up)

    def _maintain(self) -> None:
        self._give_back()
        if self._on_preempt is not None and (blocks := self._cache.pool.preempt_blocks()):
            self._on_preempt(blocks)
            self._give_back()  # what was freed for the order goes at once

    def _give_back(self) -> None:
        evicted = self._cache.pool.maintain(True)
        if evicted and self._on_evict is not None:
            self._on_evict(evicted)
        self._deliver()

    def _deliver(self) -> None:
        # Nothing else runs on this memory: whatever its users did with freed blocks was done before they freed them.
        ticket = self._cache.pool.ticket()
        if ticket > self._delivered:
            self._delivered = ticket
            self._memory.fence(ticket, self._stream)

    def __dlpack__(self, **options: Any) -> Any:
        return self._memory.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._memory.__dlpack_device__()

    def close(self) -> None:
        """Unmaps everything and leaves the device. Arrays that are still held fault when they are touched."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        self._steward.stop()
        self._memory.close()
        self._cache.close()

    def __enter__(self) -> BlockCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def settings(self) -> Settings:
        """What it was made with."""
        return dataclasses.replace(self._cache.settings)
