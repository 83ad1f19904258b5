"""Methods that harness.py gives to vLLM's workers (vLLM mixes this class into its own)."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any


class WorkerExtension:
    """Mixed into the worker; called by name over the engine's own RPC, between two steps."""

    def used_blocks(self: Any) -> list[int]:
        """Ids of the blocks that running requests use in the first cache group, in order and without repeats."""
        batch = self.model_runner.input_batch
        table = batch.block_table[0]
        rows = table.get_numpy_array()
        ids: dict[int, None] = {}
        for row in range(batch.num_reqs):
            ids.update(dict.fromkeys(int(block) for block in rows[row, : table.num_blocks_per_row[row]]))
        ids.pop(0, None)
        return list(ids)

    def shared_blocks(self: Any) -> int:
        """How many blocks stand in more than one row of the worker's tables, the null block apart."""
        batch = self.model_runner.input_batch
        seen: set[int] = set()
        twice: set[int] = set()
        for table in batch.block_table.block_tables:
            rows = table.get_numpy_array()
            for row in range(batch.num_reqs):
                ids = {int(block) for block in rows[row, : table.num_blocks_per_row[row]]} - {0}
                twice |= seen & ids
                seen |= ids
        return len(twice)

    def pool_blocks(self: Any) -> list[int]:
        """How many blocks of the elastic pool are used, and how many cached; of an engine in one process."""
        from elastickv.engines.vllm import session

        stats = session.find(self.vllm_config).pool.native.stats()
        return [int(stats["used_blocks"]), int(stats["cached_blocks"])]

    def corrupt_blocks(self: Any, count: int) -> list[int]:
        """Overwrites, in every layer, `count` blocks that running requests use; returns which."""
        chosen = self.used_blocks()[:count]
        for cache in self.model_runner.kv_caches:
            for block in chosen:
                cache[block].fill_(0.25)
        return chosen

    def corrupt_all_blocks(self: Any, count: int) -> list[int]:
        """Overwrites the whole cache of a plain engine, whatever its tables are; `count` is not asked."""
        for cache in self.model_runner.kv_caches:
            cache.fill_(0.25)
        return []

    def unmap_blocks(self: Any, count: int) -> list[int]:
        """Takes the memory away behind `count` blocks that running requests use, in every layer; returns which.

        Only whole pages inside a block are taken. The next access to one is a fault.
        """
        chosen = self.used_blocks()[:count]
        libc = ctypes.CDLL(None, use_errno=True)
        for cache in self.model_runner.kv_caches:
            for block in chosen:
                part = cache[block]
                first = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (part.data_ptr() + part.numel() * part.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last and libc.munmap(ctypes.c_void_p(first), ctypes.c_size_t(last - first)) != 0:
                    raise OSError(ctypes.get_errno(), f"munmap of {last - first} bytes of block {block}")
        return chosen
