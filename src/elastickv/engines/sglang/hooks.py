"""What SGLang calls through its hook registry, where every release that is managed has the same place for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from elastickv.config import Settings
from elastickv.engines.sglang import memory_calls
from elastickv.engines.sglang.release import Hook

__all__ = ["COMMON", "ingested"]


def ingested(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After the requests were received, and before a step is chosen: every loop does it, also while it is paused."""
    from elastickv.engines.sglang import session

    session.current().tick()


def _profile(original: Callable[..., Any], configurator: Any, pre_model_load_memory: int) -> int:
    """The size of the virtual cache is decided, not measured: what is free now depends on who came first."""
    from elastickv.engines.sglang import session

    return session.current().virtual_bytes()


def _allocator(result: Any, *args: Any, **kwargs: Any) -> Any:
    from elastickv.engines.sglang import session

    return session.current().adopt_allocator(result)


def _retract(original: Callable[..., Any], batch: Any, *arguments: Any) -> Any:
    """0.5.16 passes its arguments, too."""
    from elastickv.engines.sglang import retract

    return retract.keep_last(lambda same: original(same, *arguments), batch)


def _too_long(result: str | None, *args: Any, **kwargs: Any) -> str | None:
    """Of a request that SGLang refuses for its length, to its client."""
    from elastickv.engines.sglang import session

    return None if result is None else session.current().explain_length(result)


def _metrics_page(original: Callable[..., Any], app: Any) -> Any:
    """In the process that serves, once SGLang has said where the processes' common files are."""
    from elastickv.engines.metrics import of_common_files

    of_common_files(Settings.load(), logging.getLogger("sglang.elastickv.metrics"))
    return original(app)


_CONFIGURATOR: Final = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_CONTROL: Final = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"

COMMON: Final = (
    Hook(f"{_CONFIGURATOR}._profile_available_bytes", _profile, "around"),
    Hook(f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator", _allocator, "after"),
    Hook("sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode", _retract, "around"),
    Hook("sglang.srt.managers.utils.validate_input_length", _too_long, "after"),
    Hook("sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run", memory_calls.next_batch, "around"),
    Hook(f"{_UPDATER}.release_memory_occupation", memory_calls.released, "around"),
    Hook(f"{_UPDATER}.resume_memory_occupation", memory_calls.resumed, "around"),
    Hook(f"{_CONTROL}.release_memory_occupation", memory_calls.release_answered, "around"),
    Hook(f"{_CONTROL}.resume_memory_occupation", memory_calls.resume_answered, "around"),
    Hook("sglang.srt.utils.torch_memory_saver_adapter.TorchMemorySaverAdapter.create", memory_calls.saver, "around"),
    Hook("sglang.srt.utils.common.add_prometheus_middleware", _metrics_page, "around"),
)
