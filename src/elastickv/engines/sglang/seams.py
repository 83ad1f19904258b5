"""The places of SGLang that the plug-in attaches to."""

from __future__ import annotations

from typing import Final

from elastickv.engines import seams
from elastickv.engines.seams import Seam

__all__ = ["SEAMS", "check"]

_SCHEDULER: Final = "sglang.srt.managers.scheduler"
_CONFIGURATOR: Final = "sglang.srt.mem_cache.kv_cache_configurator"
_PLATFORM: Final = "sglang.srt.platforms.interface"
_POOL: Final = "sglang.srt.mem_cache.memory_pool"
_TOKEN: Final = "sglang.srt.mem_cache.allocator.token"
_PAGED: Final = "sglang.srt.mem_cache.allocator.paged"
_BASE: Final = "sglang.srt.mem_cache.allocator.base"
_BUDGET: Final = "sglang.srt.mem_cache.prefill_budget"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater"
_TREE: Final = "sglang.srt.mem_cache.unified_radix_cache"

SEAMS: Final = (
    # hooked
    Seam(_SCHEDULER, "Scheduler.__init__", ("self", "server_args", "port_args")),
    Seam(_SCHEDULER, "Scheduler.init_model_worker", ("self",)),
    Seam(_SCHEDULER, "Scheduler.ingest_requests", ("self",)),
    Seam(_CONFIGURATOR, "KVCacheConfigurator._profile_available_bytes", ("self", "pre_model_load_memory")),
    Seam(
        _CONFIGURATOR,
        "KVCacheConfigurator._build_token_to_kv_pool_allocator",
        ("self", "sizes", "token_to_kv_pool", "is_dsv4_model", "req_to_token_pool", "token_to_kv_pool_allocator"),
    ),
    Seam(_PLATFORM, "SRTPlatform.get_kv_pool_cls", ("self", "kind")),
    Seam("sglang.srt.mem_cache.registry", "create_unified_radix_cache", ("ctx", "cache_class")),
    Seam("sglang.srt.managers.schedule_batch", "ScheduleBatch.retract_decode", ("self",)),
    Seam(_UPDATER, "SchedulerWeightUpdaterManager.release_memory_occupation", ("self", "recv_req")),
    Seam(_UPDATER, "SchedulerWeightUpdaterManager.resume_memory_occupation", ("self", "recv_req")),
    # relied on
    Seam(_SCHEDULER, "Scheduler.is_fully_idle", ("self",)),
    Seam("sglang.srt.runtime_context", "attention_backends", ()),
    Seam(_POOL, "MHATokenToKVPool._create_buffers_normal", ("self",)),
    Seam(_POOL, "MLATokenToKVPool._create_buffers", ("self",)),
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
    Seam(_TOKEN, "TokenToKVPoolAllocator.alloc", ("self", "need_size")),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.alloc", ("self", "need_size")),
    Seam(
        _PAGED,
        "PagedTokenToKVPoolAllocator.alloc_extend",
        ("self", "prefix_lens", "prefix_lens_cpu", "seq_lens", "seq_lens_cpu", "last_loc", "extend_num_tokens"),
    ),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.alloc_decode", ("self", "seq_lens", "seq_lens_cpu", "last_loc")),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.merge_and_sort_free", ("self",)),
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
)


def check(version: str) -> None:
    """Refuses with every seam that is not as expected. `version` is only for the text."""
    seams.check(f"SGLang {version}", SEAMS)
