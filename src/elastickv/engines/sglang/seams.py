"""The places of SGLang that the plug-in attaches to, and that every release that is managed has."""

from __future__ import annotations

from typing import Final

from elastickv.engines.seams import Seam

__all__ = ["COMMON"]

_SCHEDULER: Final = "sglang.srt.managers.scheduler"
_CONFIGURATOR: Final = "sglang.srt.mem_cache.kv_cache_configurator"
_POOL: Final = "sglang.srt.mem_cache.memory_pool"
_TOKEN: Final = "sglang.srt.mem_cache.allocator.token"
_PAGED: Final = "sglang.srt.mem_cache.allocator.paged"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater"
_CONTROL: Final = "sglang.srt.managers.tokenizer_control_mixin"

COMMON: Final = (
    # hooked
    Seam(_SCHEDULER, "Scheduler.__init__", ("self", "server_args", "port_args")),
    Seam("sglang.srt.server_args", "ServerArgs.check_server_args", ("self",)),
    Seam(_CONFIGURATOR, "KVCacheConfigurator._profile_available_bytes", ("self", "pre_model_load_memory")),
    Seam(
        _CONFIGURATOR,
        "KVCacheConfigurator._build_token_to_kv_pool_allocator",
        ("self", "sizes", "token_to_kv_pool", "is_dsv4_model", "req_to_token_pool", "token_to_kv_pool_allocator"),
    ),
    Seam("sglang.srt.managers.schedule_batch", "ScheduleBatch.retract_decode", ("self",)),
    Seam("sglang.srt.managers.utils", "validate_input_length", ("req", "max_req_input_len", "allow_auto_truncate")),
    Seam(_UPDATER, "SchedulerWeightUpdaterManager.release_memory_occupation", ("self", "recv_req")),
    Seam(_UPDATER, "SchedulerWeightUpdaterManager.resume_memory_occupation", ("self", "recv_req")),
    Seam(_SCHEDULER, "Scheduler.get_next_batch_to_run", ("self", "running_batch", "last_batch")),
    Seam(_CONTROL, "TokenizerControlMixin.release_memory_occupation", ("self", "obj", "request")),
    Seam(_CONTROL, "TokenizerControlMixin.resume_memory_occupation", ("self", "obj", "request")),
    Seam("sglang.srt.utils.torch_memory_saver_adapter", "TorchMemorySaverAdapter.create", ("enable",)),
    Seam("sglang.srt.utils.common", "add_prometheus_middleware", ("app",)),
    # relied on
    Seam("sglang.srt.managers.schedule_batch", "NextBatchPlan", ("batch_to_run", "running_batch")),
    Seam("sglang.srt.configs.model_config", "ModelConfig.from_server_args", ("server_args",)),
    Seam("sglang.srt.configs.model_config", "is_deepseek_dsa", ("config",)),
    Seam("sglang.srt.configs.model_config", "is_deepseek_v4", ("config",)),
    Seam("sglang.srt.configs.hybrid_arch", "mambaish_config", ("model_config",)),
    Seam(_SCHEDULER, "Scheduler.is_fully_idle", ("self",)),
    Seam(_POOL, "MHATokenToKVPool._create_buffers_normal", ("self",)),
    Seam(_POOL, "MLATokenToKVPool._create_buffers", ("self",)),
    Seam(_TOKEN, "TokenToKVPoolAllocator.alloc", ("self", "need_size")),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.alloc", ("self", "need_size")),
    Seam(
        _PAGED,
        "PagedTokenToKVPoolAllocator.alloc_extend",
        ("self", "prefix_lens", "prefix_lens_cpu", "seq_lens", "seq_lens_cpu", "last_loc", "extend_num_tokens"),
    ),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.alloc_decode", ("self", "seq_lens", "seq_lens_cpu", "last_loc")),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.merge_and_sort_free", ("self",)),
)
