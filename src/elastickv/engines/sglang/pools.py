"""SGLang's KV pools over the elastic range: the same classes, with their buffers made elsewhere."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from elastickv.engines.sglang import session
from elastickv.engines.sglang.layout import Rows, layout_for
from elastickv.errors import EngineRefused

__all__ = ["ElasticMHATokenToKVPool", "ElasticMLATokenToKVPool", "pool_class"]


class ElasticMHATokenToKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """Keys and values of a token in two buffers a layer."""

    def _create_buffers_normal(self) -> None:
        _check_plain(self)
        if self.kv_cache_layout != "nhd":
            raise EngineRefused(
                f"elastickv cannot manage the KV layout {self.kv_cache_layout}; unset SGLANG_USE_HND_KVCACHE and "
                "SGLANG_AITER_KV_CACHE_LAYOUT, or unset ELASTICKV to serve without it"
            )
        shapes = ((self.head_num, self.head_dim), (self.head_num, self.v_head_dim))
        engine = session.current()
        rows = _layout(self, "mha", shapes)
        self.k_buffer, self.v_buffer = engine.attach_memory(rows)


class ElasticMLATokenToKVPool(MLATokenToKVPool):  # type: ignore[misc]
    """One latent row of a token in each layer."""

    def _create_buffers(self) -> None:
        _check_plain(self)
        engine = session.current()
        rows = _layout(self, "mla", ((1, self.kv_cache_dim),))
        (self.kv_buffer,) = engine.attach_memory(rows)


def _layout(pool: Any, kind: str, shapes: tuple[tuple[int, ...], ...]) -> Rows:
    release = session.current().release
    return layout_for(pool, kind, shapes, release.backends(), release.strided[kind])


def _check_plain(pool: Any) -> None:
    """Refuses a pool that asks for memory of another kind."""
    if getattr(pool, "post_capture_active", False):
        raise EngineRefused("elastickv maps the cache itself; unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING")
    if pool.enable_custom_mem_pool:
        raise EngineRefused(
            "elastickv cannot manage a cache in a custom memory pool; unset SGLANG_MOONCAKE_CUSTOM_MEM_POOL"
        )


def pool_class(kind: str) -> type:
    """The elastic class for a kind of pool ("mha", "mla"); EngineRefused for every other."""
    classes = {"mha": ElasticMHATokenToKVPool, "mla": ElasticMLATokenToKVPool}
    if kind not in classes:
        raise EngineRefused(f"elastickv cannot manage a KV pool of the kind {kind}; it manages {', '.join(classes)}")
    return classes[kind]
