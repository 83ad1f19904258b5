"""vLLM's BlockPool over an elastic pool: the free list is native and holds only blocks with memory behind them.

Hash maps, events, metrics and the block objects stay vLLM's own. An existing pool is adopted by changing its class, so
that constructor arguments of later versions pass through untouched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from vllm.distributed.kv_events import AllBlocksCleared
from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool

from elastickv._core import BlockObjects, Pool
from elastickv.errors import EngineRefused, InvalidArgument
from elastickv.memory.asking import Asking

__all__ = ["ElasticBlockPool", "adopt"]

_logger = init_logger("vllm.elastickv")


def adopt(pool: Any, native: Pool, budget_blocks: Callable[[], int]) -> ElasticBlockPool:
    """Makes vLLM's `pool` elastic, in place. It must be fresh: nothing allocated but the null block.

    `budget_blocks`: how many blocks the tenant may hold now, for the usage that vLLM reports.
    """
    if type(pool) is not BlockPool:
        raise EngineRefused(
            f"elastickv cannot manage the block pool {type(pool).__qualname__}; it was written for vLLM's BlockPool"
        )
    pool.__class__ = ElasticBlockPool
    pool.elastic_init(native, budget_blocks)
    elastic: ElasticBlockPool = pool
    return elastic


class _NoQueue:
    """Stands where vLLM's free list was, for whoever reads it directly."""

    def __getattr__(self, name: str) -> NoReturn:
        raise EngineRefused(
            f"something read BlockPool.free_block_queue.{name}: elastickv keeps the free blocks itself, and cannot "
            "manage an engine with a part that walks vLLM's own list"
        )


class ElasticBlockPool(BlockPool):  # type: ignore[misc]
    """Block ids are handed out only with memory behind them. Belongs to the engine's thread, like its base."""

    def elastic_init(self, native: Pool, budget_blocks: Callable[[], int]) -> None:
        """Replaces the free list. Called once, by adopt()."""
        self.native = native
        self.objects = BlockObjects(native)
        self.free_block_queue = _NoQueue()
        for block in self.blocks:
            block.prev_free_block = block.next_free_block = None
        self._budget_blocks = budget_blocks
        self._asking = Asking(native)
        self.blocks_per_token = 0.0
        """Of the waiting request that was refused last."""

    # --- allocation

    @property
    def starved(self) -> bool:
        """Whether the last ensure() found fewer blocks than it was asked for."""
        return self._asking.starved

    def ensure(self, num_blocks: int, *, patient: bool, growing: bool = False) -> None:
        """Has `num_blocks` blocks available if it can. A patient call may wait for the neighbours (give_back_wait)."""
        self._asking.ensure(num_blocks, patient=patient, growing=growing)

    def get_new_blocks(self, num_blocks: int) -> list[Any]:
        """Takes blocks; what they cached is forgotten. ValueError, as vLLM's, if the caller did not check first."""
        blocks: list[Any]
        try:
            blocks, evicted = self.objects.take(self.blocks, num_blocks)
        except InvalidArgument:
            blocks, evicted = self._take_unannounced(num_blocks)
        if self._reuse_watchers:
            self._notify_reuse(blocks)
        if self.metrics_collector:
            for block in blocks:
                self._maybe_evict_cached_block(block)  # also ends the record of a block without a hash
                self.metrics_collector.on_block_allocated(block)
        elif evicted:
            for block in blocks[-evicted:]:
                self._maybe_evict_cached_block(block)
        return blocks

    def _take_unannounced(self, num_blocks: int) -> tuple[list[Any], int]:
        """For a caller that did not ask for the number it needs before."""
        if self.native.ensure(num_blocks) < num_blocks:
            raise ValueError(f"Cannot get {num_blocks} free blocks from the pool")
        return self.objects.take(self.blocks, num_blocks)

    def get_num_free_blocks(self) -> int:
        """Blocks that can be had at once: mapped and free, or holding a cached prefix only."""
        return self.native.num_available()

    # --- references

    def touch(self, blocks: Sequence[Any]) -> None:
        """One reference more each; a cached block is in use again."""
        self.objects.touch(blocks)
        if self.metrics_collector:
            for block in blocks:
                self.metrics_collector.on_block_accessed(block)

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """One reference less each, in eviction order. At none, a block with a hash stays as cached prefix."""
        foreign = self.objects.free(ordered_blocks, self.enable_caching, self)
        if foreign:
            by_pool: defaultdict[Any, list[Any]] = defaultdict(list)
            for block in foreign:
                by_pool[block.pool].append(block)
            for pool, blocks in by_pool.items():
                pool.free_blocks(blocks)

    def unpin_blocks(self, blocks: Iterable[Any], on_reuse: Callable[[Any], None]) -> None:
        """One reference less each; at none the block stays readable, as the last to be evicted, until `on_reuse`."""
        released = []
        for block in blocks:
            block.ref_cnt -= 1
            self._reuse_watchers[block.block_id] = on_reuse
            if block.ref_cnt == 0:
                released.append(block.block_id)
        self.native.release(released, True)

    # --- forgetting

    def forget(self, block_ids: Iterable[int]) -> None:
        """The pool has given these cached blocks away: drops their hashes, with events, and tells who still reads."""
        blocks = [self.blocks[block_id] for block_id in block_ids]
        if self._reuse_watchers:
            self._notify_reuse(blocks)
        for block in blocks:
            self._maybe_evict_cached_block(block)

    def _remove_cached_block_hashes(self, block: Any) -> list[Any]:
        """Also makes a block that was held for its hash alone a free one."""
        removed: list[Any] = super()._remove_cached_block_hashes(block)
        if block.ref_cnt == 0 and not block.is_null and block.block_id not in self._reuse_watchers:
            self.native.uncache([block.block_id])
        return removed

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix. False, with a warning, while any block is in use."""
        used = self.native.num_used()
        if used:
            _logger.warning("Failed to reset prefix cache because some blocks (%d) are not freed yet", used)
            return False
        cached: set[int] = set(self._reuse_watchers)
        hashes: Any = self.cached_block_hash_to_block
        for entry in hashes._cache.values():
            for block in entry.values() if isinstance(entry, dict) else (entry,):
                block.reset_hash()
                cached.add(block.block_id)
        self.cached_block_hash_to_block: Any = BlockHashToBlockMap()
        self.cached_block_hashes_by_block.clear()
        if self._reuse_watchers:
            self._notify_reuse([self.blocks[block_id] for block_id in list(self._reuse_watchers)])
        self.native.uncache(sorted(cached))
        if self.metrics_collector:
            self.metrics_collector.reset()
        _logger.info("Successfully reset prefix cache")
        if self.enable_kv_cache_events:
            self.kv_event_queue.append(AllBlocksCleared())
        return True

    # --- numbers

    def get_usage(self) -> float:
        """Blocks in use over the blocks that the tenant may hold, 0.0 to 1.0."""
        return min(1.0, self.native.num_used() / max(1, self._budget_blocks()))
