"""SGLang's prefix caches with what is withheld counted among what is protected.

The caches are SGLang's own: what they drop, when and in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from elastickv.errors import EngineRefused

__all__ = ["Elastic", "ElasticUnifiedRadixCache", "adopt"]

_ADOPTED: Final = ("sglang.srt.mem_cache.radix_cache.RadixCache", "sglang.srt.mem_cache.chunk_cache.ChunkCache")


class Elastic:
    """What they do differently.

    SGLang's check for lost memory adds up what is available, evictable, protected and in use, and expects the whole
    virtual cache. Blocks that no memory can be had for are none of these: they are said to be protected.
    """

    token_to_kv_pool_allocator: Any

    def protected_size(self) -> int:
        """Before SGLang's class among the bases."""
        stock: Any = super()
        return int(stock.protected_size()) + int(self.token_to_kv_pool_allocator.withheld_size())


class ElasticUnifiedRadixCache(Elastic, UnifiedRadixCache):  # type: ignore[misc]
    """For a release that is told the class."""


def adopt(cache: Any, parked: Callable[[], int]) -> Any:
    """Makes the cache of a release that chooses the class itself elastic, in place. It must be fresh.

    `parked`: tokens that nothing else counts, and that are in use; they are protected, too.
    """
    stock = type(cache)
    if f"{stock.__module__}.{stock.__qualname__}" not in _ADOPTED:
        raise EngineRefused(
            f"elastickv cannot manage the prefix cache {stock.__qualname__}; unset SGLANG_ENABLE_UNIFIED_RADIX_TREE "
            "and SGLANG_EXPERIMENTAL_CPP_RADIX_TREE, or unset ELASTICKV to serve without it"
        )

    def protected_size(self: Any) -> int:
        return int(stock.protected_size(self)) + int(self.token_to_kv_pool_allocator.withheld_size()) + parked()

    # SGLang's class comes first: where it has its attributes from another base, Python lets an object change its class
    # for no other order.
    cache.__class__ = type(f"Elastic{stock.__name__}", (stock, Elastic), {"protected_size": protected_size})
    return cache
