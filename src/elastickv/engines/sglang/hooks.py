"""What SGLang calls through its hook registry, where every release that is managed has the same place for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

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


def _released(result: Any, updater: Any, request: Any) -> None:
    """SGLang has made sure that it is idle, and has dropped its prefixes."""
    from elastickv.engines.sglang import session

    if not request.tags or "kv_cache" in request.tags:
        session.current().release_cache()


def _resumed(result: Any, updater: Any, request: Any) -> None:
    from elastickv.engines.sglang import session

    session.current().resumed()


_CONFIGURATOR: Final = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

COMMON: Final = (
    Hook(f"{_CONFIGURATOR}._profile_available_bytes", _profile, "around"),
    Hook(f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator", _allocator, "after"),
    Hook("sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode", _retract, "around"),
    Hook("sglang.srt.managers.utils.validate_input_length", _too_long, "after"),
    Hook(f"{_UPDATER}.release_memory_occupation", _released, "after"),
    Hook(f"{_UPDATER}.resume_memory_occupation", _resumed, "after"),
)
