"""Puts every hook in place, through SGLang's own registry. Called once in each process of a managed engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import metadata
from typing import Any, Final

from elastickv.config import Settings
from elastickv.errors import EngineRefused

__all__ = ["install"]

_HOOKS: Final = (
    "sglang.srt.managers.scheduler.Scheduler.init_model_worker",
    "sglang.srt.managers.scheduler.Scheduler.ingest_requests",
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool_allocator",
    "sglang.srt.platforms.interface.SRTPlatform.get_kv_pool_cls",
    "sglang.srt.mem_cache.registry.create_unified_radix_cache",
    "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.release_memory_occupation",
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.resume_memory_occupation",
)

_installed: list[str] = []


def install() -> None:
    """Checks version and seams, then registers. Raises an ElasticKVError, with nothing registered, if it cannot."""
    if _installed:
        return
    settings = Settings.load()
    from elastickv import _core  # noqa: F401 - a native part that cannot be loaded must show here
    from elastickv.engines.sglang import gate, guard, seams

    version = metadata.version("sglang")
    gate.check_version(version)
    seams.check(version)
    logging.getLogger("sglang.elastickv").setLevel(settings.log.upper())
    _register()
    _watch(guard.watch, settings, version)
    _installed.append(version)


def _watch(watch: Callable[..., None], settings: Settings, version: str) -> None:
    from elastickv.engines.sglang import session

    def before(scheduler: Any) -> None:
        _check_applied()
        session.start(settings, version)

    watch(before, lambda scheduler: session.current().engaged(scheduler), session.forget)


def _check_applied() -> None:
    """SGLang logs a hook that it cannot apply, and goes on."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _HOOKS if target not in HookRegistry._patched]
    if missing:
        raise EngineRefused(
            f"SGLang has not applied elastickv's hooks to {', '.join(missing)}; its log says why. "
            "Correct that, or unset ELASTICKV to serve without it"
        )


def _register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    around, after = HookType.AROUND, HookType.AFTER
    hooks = (
        (_init_model_worker, around),
        (_ingested, after),
        (_profile, around),
        (_allocator, after),
        (_pool_class, around),
        (_tree, around),
        (_retracted, after),
        (_released, after),
        (_resumed, after),
    )
    for target, (hook, kind) in zip(_HOOKS, hooks, strict=True):
        HookRegistry.register(target, hook, kind)


def _init_model_worker(original: Callable[..., Any], scheduler: Any) -> Any:
    """On the ledger before anything is loaded."""
    from elastickv.engines.sglang import session

    session.current().begin(scheduler)
    return original(scheduler)


def _ingested(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
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


def _pool_class(original: Callable[..., Any], platform: Any, *, kind: str) -> Any:
    """SGLang asks for every kind before it knows which it needs, so one that is not managed is refused later."""
    from elastickv.engines.sglang import pools

    return pools.pool_class(kind) if kind in ("mha", "mla") else original(platform, kind=kind)


def _tree(original: Callable[..., Any], ctx: Any, *, cache_class: type | None = None) -> Any:
    from elastickv.engines.sglang.tree import ElasticRadixCache

    if cache_class is not None:
        raise EngineRefused(
            f"elastickv cannot manage the prefix cache {cache_class.__qualname__}; leave out --radix-cache-backend"
        )
    return original(ctx, cache_class=ElasticRadixCache)


def _retracted(result: Any, *args: Any, **kwargs: Any) -> Any:
    from elastickv.engines.sglang import retract

    return retract.keep_last(result)


def _released(result: Any, updater: Any, request: Any) -> None:
    """SGLang has made sure that it is idle, and has dropped its prefixes."""
    from elastickv.engines.sglang import session

    if not request.tags or "kv_cache" in request.tags:
        session.current().release_cache()


def _resumed(result: Any, updater: Any, request: Any) -> None:
    from elastickv.engines.sglang import session

    session.current().resumed()
