"""The places of vLLM that the plug-in attaches to."""

from __future__ import annotations

from typing import Final

from elastickv.engines import seams
from elastickv.engines.seams import Seam, find, wrap

__all__ = ["SEAMS", "Seam", "check", "find", "here", "wrap"]

_CORE: Final = "vllm.v1.engine.core"
_EXECUTOR: Final = "vllm.v1.executor.abstract"
_SCHEDULER: Final = "vllm.v1.core.sched.scheduler"
_WORKER: Final = "vllm.v1.worker.gpu_worker"
_POOL: Final = "vllm.v1.core.block_pool"
_MANAGER: Final = "vllm.v1.core.single_type_kv_cache_manager"
_CPU_WORKER: Final = "vllm.v1.worker.cpu_worker"
_OPERATIONS: Final = "vllm._custom_ops"

_ON_CPU: Final = (
    # hooked
    Seam("vllm.platforms.cpu", "CpuPlatform.is_sleep_mode_available", ("self",)),
    Seam(_CPU_WORKER, "CPUWorker.sleep", ("self", "level")),
    Seam(_CPU_WORKER, "CPUWorker.wake_up", ("self", "tags")),
    Seam(_CPU_WORKER, "CPUWorker.discard", ("self", "tags")),
    Seam(_OPERATIONS, "create_onednn_mm", ("weight", "primitive_cache_size")),
    Seam(_OPERATIONS, "create_onednn_scaled_mm", ("weight", "weight_scales", "output_type")),
    # relied on
    Seam(_OPERATIONS, "CPUDNNLGEMMHandler.__init__", ("self",)),
    Seam(_OPERATIONS, "CPUDNNLGEMMHandler.__del__", ("self",)),
    Seam("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
)
"""Sleep on the CPU, see cpu_sleep.py."""

SEAMS: Final = (
    # hooked
    Seam(_CORE, "EngineCore._initialize_kv_caches", ("self", "vllm_config")),
    Seam(_CORE, "EngineCore.shutdown", ("self",)),
    Seam(_CORE, "EngineCore.sleep", ("self", "level", "mode")),
    Seam(_CORE, "EngineCore.reset_prefix_cache", ("self", "reset_running_requests", "reset_connector")),
    Seam(_CORE, "EngineCore.release_kv_cache_memory", ("self",)),
    Seam(_CORE, "get_kv_cache_configs", ("vllm_config", "kv_cache_specs", "available_memory")),
    Seam(_CORE, "resolve_kv_cache_layout", ("vllm_config", "supported_layouts", "kv_cache_specs")),
    Seam(_EXECUTOR, "Executor.__init__", ("self", "vllm_config")),
    Seam(_EXECUTOR, "Executor.determine_available_memory", ("self",)),
    Seam(_EXECUTOR, "Executor.initialize_from_config", ("self", "kv_cache_configs")),
    Seam(_EXECUTOR, "Executor.compile_or_warm_up_model", ("self",)),
    Seam(_EXECUTOR, "Executor.sleep", ("self", "level")),
    Seam(_EXECUTOR, "Executor.wake_up", ("self", "tags")),
    Seam(_EXECUTOR, "Executor.discard", ("self", "tags")),
    Seam("vllm.config.scheduler", "SchedulerConfig.get_scheduler_cls", ("self",)),
    Seam(_WORKER, "Worker._maybe_get_memory_pool_context", ("self", "tag")),
    Seam(_WORKER, "Worker.load_model", ("self",)),
    Seam(_WORKER, "Worker.reload_weights", ("self",)),
    Seam(_WORKER, "Worker.initialize_from_config", ("self", "kv_cache_config")),
    Seam(_WORKER, "Worker.execute_model", ("self", "scheduler_output")),
    Seam(_WORKER, "Worker.compile_or_warm_up_model", ("self",)),
    Seam(_WORKER, "Worker.sleep", ("self", "level")),
    Seam(_WORKER, "Worker.shutdown", ("self",)),
    # relied on
    Seam(_CORE, "EngineCore.collective_rpc", ("self", "method", "timeout", "args", "kwargs")),
    Seam(_CORE, "EngineCoreProc._notify_idle_state_callbacks", ("self",)),
    Seam(_CORE, "EngineCoreProc._process_input_queue", ("self",)),
    Seam("vllm.v1.worker.utils", "allocate_kv_cache", ("kv_cache_config", "device", "layout")),
    Seam(_SCHEDULER, "Scheduler.schedule", ("self", "throttle_prefills")),
    Seam(_SCHEDULER, "Scheduler._preempt_request", ("self", "request", "timestamp", "drop_stale_output")),
    Seam(_SCHEDULER, "Scheduler._request_blocks_can_be_freed", ("self", "request")),
    Seam("vllm.v1.core.kv_cache_manager", "KVCacheManager.allocate_slots", ("self", "request", "num_new_tokens")),
    Seam(
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator.get_num_blocks_to_allocate",
        ("self", "request_id", "num_tokens"),
    ),
    Seam(
        _MANAGER, "SingleTypeKVCacheManager.remove_skipped_blocks", ("self", "request_id", "processed_computed_tokens")
    ),
    Seam(_MANAGER, "SingleTypeKVCacheManager.pop_blocks_for_free", ("self", "request_id")),
    Seam("vllm.v1.core.kv_cache_utils", "get_max_concurrency_for_kv_cache_config", ("vllm_config", "kv_cache_config")),
    Seam(_POOL, "BlockPool.get_new_blocks", ("self", "num_blocks")),
    Seam(_POOL, "BlockPool.free_blocks", ("self", "ordered_blocks")),
    Seam(_POOL, "BlockPool.touch", ("self", "blocks")),
    Seam(_POOL, "BlockPool.evict_blocks", ("self", "block_ids")),
    Seam(_POOL, "BlockPool.unpin_blocks", ("self", "blocks", "on_reuse")),
    Seam(_POOL, "BlockPool.reset_prefix_cache", ("self",)),
    Seam(_POOL, "BlockPool.get_num_free_blocks", ("self",)),
    Seam(_POOL, "BlockPool.get_usage", ("self",)),
    Seam(_POOL, "BlockPool._maybe_evict_cached_block", ("self", "block")),
    Seam(_POOL, "BlockPool._remove_cached_block_hashes", ("self", "block")),
    Seam(_POOL, "BlockPool._notify_reuse", ("self", "blocks")),
)


def here() -> tuple[Seam, ...]:
    """Those of the platform that vLLM has chosen."""
    from vllm.platforms import current_platform

    return (*SEAMS, *_ON_CPU) if current_platform.is_cpu() else SEAMS


def check(version: str) -> None:
    """Refuses with every seam that is not as expected. `version` is only for the text."""
    seams.check(f"vLLM {version}", here())
