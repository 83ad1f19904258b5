"""SGLang 0.5.23 and later 0.5 versions: the allocator is asked for capacity, and the platform for the pool's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from elastickv.engines.seams import Seam
from elastickv.engines.sglang import hooks, seams
from elastickv.engines.sglang.release import Hook, Release
from elastickv.errors import EngineRefused

__all__ = ["RELEASE"]

_SCHEDULER: Final = "sglang.srt.managers.scheduler"
_PLATFORM: Final = "sglang.srt.platforms.interface"
_REGISTRY: Final = "sglang.srt.mem_cache.registry"
_BASE: Final = "sglang.srt.mem_cache.allocator.base"
_BUDGET: Final = "sglang.srt.mem_cache.prefill_budget"
_TREE: Final = "sglang.srt.mem_cache.unified_radix_cache"


def _init_model_worker(original: Callable[..., Any], scheduler: Any) -> Any:
    """On the ledger before anything is loaded."""
    from elastickv.engines.sglang import session

    session.current().begin()
    return original(scheduler)


def _pool_class(original: Callable[..., Any], platform: Any, *, kind: str) -> Any:
    """SGLang asks for every kind before it knows which it needs, so one that is not managed is refused later."""
    from elastickv.engines.sglang import pools

    return pools.pool_class(kind) if kind in ("mha", "mla") else original(platform, kind=kind)


def _tree(original: Callable[..., Any], ctx: Any, *, cache_class: type | None = None) -> Any:
    from elastickv.engines.sglang.tree import ElasticUnifiedRadixCache

    if cache_class is not None:
        raise EngineRefused(
            f"elastickv cannot manage the prefix cache {cache_class.__qualname__}; leave out --radix-cache-backend"
        )
    return original(ctx, cache_class=ElasticUnifiedRadixCache)


def _backends() -> set[str]:
    from sglang.srt.runtime_context import attention_backends

    return {str(name) for name in attention_backends()}


def _device() -> str:
    from sglang.srt.runtime_context import get_device

    return str(get_device().device)


def _idle(scheduler: Any) -> bool:
    return bool(scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused))


_HOOKS: Final = (
    Hook(f"{_SCHEDULER}.Scheduler.init_model_worker", _init_model_worker, "around"),
    Hook(f"{_SCHEDULER}.Scheduler.ingest_requests", hooks.ingested, "after"),
    Hook(f"{_PLATFORM}.SRTPlatform.get_kv_pool_cls", _pool_class, "around"),
    Hook(f"{_REGISTRY}.create_unified_radix_cache", _tree, "around"),
    *hooks.COMMON,
)

_SEAMS: Final = (
    # hooked
    Seam(_SCHEDULER, "Scheduler.init_model_worker", ("self",)),
    Seam(_SCHEDULER, "Scheduler.ingest_requests", ("self",)),
    Seam(_PLATFORM, "SRTPlatform.get_kv_pool_cls", ("self", "kind")),
    Seam(_REGISTRY, "create_unified_radix_cache", ("ctx", "cache_class")),
    # relied on
    Seam("sglang.srt.arg_groups.model_override_base", "resolving_view", ("server_args",)),
    Seam("sglang.srt.runtime_context", "attention_backends", ()),
    Seam("sglang.srt.runtime_context", "get_device", ()),
    Seam(_BASE, "BaseTokenToKVPoolAllocator.evict_to_free_tokens", ("self", "tree_cache", "num_tokens")),
    Seam(
        _BASE,
        "BaseTokenToKVPoolAllocator.check_decode_capacity",
        ("self", "num_tokens", "tree_cache", "requests", "spec_algorithm"),
    ),
    Seam(
        _BASE,
        "BaseTokenToKVPoolAllocator.create_prefill_budget",
        ("self", "tree_cache", "num_mixed_decode_tokens"),
    ),
    Seam(
        _BUDGET,
        "PrefillBudget.check_prefill",
        ("self", "extend_input_len", "total_tokens", "max_new_tokens", "input_tokens"),
    ),
    Seam(_BUDGET, "PrefillBudget.can_allocate_prefill", ("self", "paged_input")),
    Seam(_BUDGET, "PrefillBudget.available_chunk_tokens", ("self", "chunk_limit")),
    Seam(_TREE, "UnifiedRadixCache.evict", ("self", "params")),
    Seam(_TREE, "UnifiedRadixCache.protected_size", ("self",)),
    Seam(_TREE, "UnifiedRadixCache.evictable_size", ("self",)),
    *seams.COMMON,
)

RELEASE: Final = Release(
    versions=">=0.5.23,<0.6",
    lowest=(0, 5, 23),
    below=(0, 6, 0),
    hooks=_HOOKS,
    seams=_SEAMS,
    # Those that SGLang 0.5.23 itself lets read token-major views (arg_groups/kv_cache_hook.py), and PyTorch's own.
    strided={
        "mha": frozenset({"triton", "fa3", "fa4", "flashinfer", "trtllm_mha", "torch_native"}),
        "mla": frozenset({"triton", "fa3", "trtllm_mla", "flashinfer", "cutedsl_mla", "flashmla", "torch_native"}),
    },
    backends=_backends,
    device=_device,
    idle=_idle,
)
