"""SGLang's radix cache with what is withheld counted among what is protected."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

__all__ = ["ElasticRadixCache"]


class ElasticRadixCache(UnifiedRadixCache):  # type: ignore[misc]
    """The tree itself is SGLang's own: what it drops, when and in which order.

    SGLang's check for lost memory adds up what is available, evictable, protected and in use, and expects the whole
    virtual cache. Blocks that no memory can be had for are none of these: they are said to be protected.
    """

    def protected_size(self) -> int:
        allocator: Any = self.token_to_kv_pool_allocator
        return int(super().protected_size()) + int(allocator.withheld_size())
