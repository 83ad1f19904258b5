"""SGLang's allocators over elastic memory: the list of free pages holds only pages with memory behind them.

A page of SGLang's is a block of the pool's. The list is a tensor on the device, so nothing here reads it but census(),
which is called when blocks are to be given back. Growing appends ids that this process knows already.

What SGLang counts stays exact: every block is available (on the list, or one that could be mapped now), cached or in
use, or withheld (no memory behind it, and none to be had now). Its checks for lost memory stay on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from elastickv.errors import EngineRefused

if TYPE_CHECKING:
    from elastickv.engines.sglang.admission import ElasticPrefillBudget
    from elastickv.engines.sglang.ration import Ration, Runs

__all__ = ["ElasticPagedAllocator", "ElasticTokenAllocator", "adopt"]


def adopt(allocator: Any, ration: Ration) -> Any:
    """Makes SGLang's `allocator` elastic, in place. It must be fresh: nothing handed out."""
    classes = {TokenToKVPoolAllocator: ElasticTokenAllocator, PagedTokenToKVPoolAllocator: ElasticPagedAllocator}
    made = classes.get(type(allocator))
    if made is None:
        raise EngineRefused(
            f"elastickv cannot manage the allocator {type(allocator).__qualname__}; it was written for SGLang's "
            f"{' and '.join(cls.__name__ for cls in classes)}"
        )
    allocator.__class__ = made
    allocator.elastic_init(ration)
    return allocator


class _Elastic(BaseTokenToKVPoolAllocator):  # type: ignore[misc]
    """What both allocators do differently. Belongs to the scheduler's thread, like its base."""

    ration: Ration
    page_size: int

    def elastic_init(self, ration: Ration) -> None:
        """Called once, by adopt()."""
        self.ration = ration
        # What is freed is put aside and sorted in when the list runs short: low addresses are used first, and the
        # large extents at the top become empty.
        self.need_sort = True
        ration.adopt(self)
        self.clear()

    # --- the list

    def clear(self) -> None:
        """All blocks with memory behind them are free again."""
        super().clear()
        ration = getattr(self, "ration", None)
        if ration is not None:
            self.free_pages = ration.held_ids().to(self.device)

    def free_blocks(self) -> int:
        """Blocks on the list; known without a look at it."""
        return int(super().available_size()) // self.page_size

    def append(self, runs: Runs) -> None:
        """Blocks that have become ours, ascending."""
        self.free_pages = torch.cat((self.free_pages, *self._ids(runs)))

    def replace(self, runs: Runs) -> None:
        """What is left of the list after blocks were given back, ascending."""
        self.merge_and_sort_free()
        kept = [torch.arange(first, first + n, dtype=torch.int64) for first, n in runs]  # many: one copy for all
        self.free_pages = torch.cat([torch.empty(0, dtype=torch.int64), *kept]).to(self.device)

    def census(self) -> torch.Tensor:
        """The ids on the list, in this process's memory. On a GPU it waits for the device: only for giving back."""
        self.merge_and_sort_free()
        return self.free_pages.cpu()

    def _ids(self, runs: Runs) -> list[torch.Tensor]:
        return [torch.arange(first, first + n, dtype=torch.int64, device=self.device) for first, n in runs]

    # --- what the scheduler asks

    def available_size(self) -> int:
        """Tokens that are free, or could be given memory now."""
        return (self.free_blocks() + self.ration.growable) * self.page_size

    def withheld_size(self) -> int:
        """Tokens that no memory can be had for now."""
        return (self.ration.blocks - self.ration.held - self.ration.growable) * self.page_size

    def secure(self, tokens: int) -> int:
        """Has memory for so many free tokens if it can be had; returns how many there are."""
        if (missing := -(-tokens // self.page_size) - self.free_blocks()) > 0:
            self.ration.grow(missing)
        return self.free_blocks() * self.page_size

    def admits(self, tree_cache: Any, *, promised: int, tokens: int) -> bool:
        """Whether what was `promised` in a pass over the waiting requests and `tokens` more have memory now, or cached
        prefixes to take it from."""
        need = promised + -(-tokens // self.page_size) * self.page_size + self.page_size
        return bool(self.secure(need) + tree_cache.evictable_size() >= need)

    def demand(self, tree_cache: Any, *, promised: float, tokens: int) -> None:
        """Asks for what a request lacks that SGLang's own count would not let in; else no neighbour would hear of it.

        `promised`: with SGLang's estimate of what running requests may need yet, which is no whole number.
        """
        self.secure(math.ceil(promised + tokens + self.page_size - tree_cache.evictable_size()))

    def room(self, tree_cache: Any, *, promised: int, tokens: int) -> int:
        """So many of `tokens` more could be computed now, in whole pages unless it is all of them."""
        self.secure(promised + tokens + self.page_size)
        room = self.secure(0) + int(tree_cache.evictable_size()) - promised - self.page_size
        return tokens if room >= tokens else max(0, room // self.page_size * self.page_size)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool | None:
        """Grows first, then drops cached prefixes. Called by SGLang before it allocates."""
        missing = num_tokens - self.secure(num_tokens)
        if missing > 0 and tree_cache is not None and tree_cache.evictable_size() > 0:
            gone = tree_cache.evict(EvictParams(num_tokens=missing)).num_tokens_evicted
            self.ration.count_evicted(gone // self.page_size)
        return None

    def check_decode_capacity(self, *, num_tokens: int, tree_cache: Any, **_: Any) -> bool:
        """Whether the next step of the running requests has memory; SGLang retracts one where it has not."""
        if self.ration.must_preempt():
            return False
        self.evict_to_free_tokens(tree_cache, num_tokens)
        return self.free_blocks() * self.page_size >= num_tokens

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> ElasticPrefillBudget:
        """What an admission may count on."""
        from elastickv.engines.sglang.admission import ElasticPrefillBudget  # not every release has what it builds on

        return ElasticPrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def resize(self, config: Any) -> None:
        """SGLang's own way to size the cache late."""
        raise EngineRefused("elastickv sizes the cache itself; unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING")


class ElasticTokenAllocator(_Elastic, TokenToKVPoolAllocator):  # type: ignore[misc]
    """For --page-size 1."""

    def alloc(self, need_size: int) -> Any:
        self.secure(need_size)
        return super().alloc(need_size)


class ElasticPagedAllocator(_Elastic, PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """For larger pages."""

    def alloc(self, need_size: int) -> Any:
        self.secure(need_size)
        return super().alloc(need_size)

    def alloc_extend(
        self,
        prefix_lens: Any,
        prefix_lens_cpu: Any,
        seq_lens: Any,
        seq_lens_cpu: Any,
        last_loc: Any,
        extend_num_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # SGLang's own bound of the pages that may be taken; it counts exactly only where they are not there.
        self.secure((extend_num_tokens // self.page_size + len(prefix_lens) + 1) * self.page_size)
        size = self.page_size
        new = int(((seq_lens_cpu + size - 1) // size - (prefix_lens_cpu + size - 1) // size).sum())
        if new > self.free_blocks():  # 0.5.16 hands the list to a kernel before it looks how long it is
            return None
        return super().alloc_extend(
            prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, *args, **kwargs
        )

    def alloc_decode(self, seq_lens: Any, seq_lens_cpu: Any, last_loc: Any) -> Any:
        new = int((seq_lens_cpu % self.page_size == 1).sum())
        if self.secure(new * self.page_size) < new * self.page_size:
            return None
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
