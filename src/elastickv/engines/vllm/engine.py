"""The hooks in the process that schedules, around vLLM's Executor and EngineCore. What they do is session.py's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_cache_layout import KVCacheLayout

from elastickv.config import Settings
from elastickv.engines.vllm import blocksize, cpu_sleep, idle, scheduler, sleep, watch
from elastickv.engines.vllm.session import Session, close, find, leave

__all__ = ["CORE", "ENGINE", "EXECUTOR", "SCHEDULER_CONFIG", "executor_init"]

Method = Callable[..., Any]


def executor_init(original: Method, settings: Settings, version: str) -> Method:
    """A session begins before the workers get their copy of the configuration."""

    def wrapped(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        session = Session(vllm_config, settings, version)
        try:
            blocksize.raise_block_size(vllm_config)
            session.begin()
            original(self, vllm_config, *args, **kwargs)
        except BaseException:  # whatever it was goes on; the session must not stay
            session.close()
            raise

    return wrapped


def _determine_available_memory(original: Method) -> Method:
    """The workers profile, and say who they are; what they say of free memory is not used."""

    def wrapped(self: Any) -> Any:
        self.collective_rpc("elastickv_begin")
        answer = original(self)
        find(self.vllm_config).look_at_ranks(self)
        return answer

    return wrapped


def _initialize_from_config(original: Method) -> Method:
    def wrapped(self: Any, kv_cache_configs: list[Any]) -> Any:
        session = find(self.vllm_config)
        session.create_cache(kv_cache_configs)
        return original(self, kv_cache_configs)

    return wrapped


def _compile_or_warm_up_model(original: Method) -> Method:
    def wrapped(self: Any) -> Any:
        result = original(self)
        find(self.vllm_config).warmed_up(self)
        return result

    return wrapped


def _sleep(original: Method) -> Method:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = set(self.sleeping_tags)
        try:
            result = original(self, *args, **kwargs)
        except Exception:  # whatever a rank could not do goes on; the others must not sleep alone
            sleep.stayed_awake(find(self.vllm_config))
            raise
        if self.sleeping_tags != before:
            sleep.fell_asleep(find(self.vllm_config), self.sleeping_tags)
        return result

    return wrapped


def _wake_up(original: Method) -> Method:
    def wrapped(self: Any, tags: list[str] | None = None) -> Any:
        session = find(self.vllm_config)
        sleep.before_wake(session, tags, self.sleeping_tags)
        before = set(self.sleeping_tags)
        try:
            result = original(self, tags)
        except Exception:  # whatever a rank could not do goes on; what was leased for it must not stay
            sleep.stayed_asleep(session)
            raise
        if self.sleeping_tags != before:
            sleep.woke(session, self.sleeping_tags)
        return result

    return wrapped


def _initialize_kv_caches(original: Method) -> Method:
    def wrapped(self: Any, vllm_config: Any) -> Any:
        session = find(vllm_config)
        session.engine = self
        if hasattr(self, "input_queue"):
            watch.end_with_parent()  # a process of vLLM's own, not its caller's
        else:
            idle.lock_calls(self, session.lock)
        try:
            return original(self, vllm_config)
        except BaseException:  # the engine will not be; its place on the ledger must not stay
            session.close()
            raise

    return wrapped


def _get_kv_cache_configs(original: Method) -> Method:
    def wrapped(vllm_config: Any, kv_cache_specs: list[dict[str, Any]], available_memory: list[int]) -> Any:
        return find(vllm_config).plan(original, kv_cache_specs)

    return wrapped


def _resolve_kv_cache_layout(original: Method) -> Method:
    """Block-outermost layouts first, where the backends leave a choice: a page then serves whole blocks.

    Not on a CPU: its backend for latent attention says that it takes any layout, and fails with these.
    """

    def wrapped(vllm_config: Any, supported_layouts: list[list[str]], kv_cache_specs: Any = None) -> Any:
        if current_platform.is_cpu():
            return original(vllm_config, supported_layouts, kv_cache_specs)
        ordered = [
            sorted(names, key=lambda name: not KVCacheLayout[name].is_block_outermost) for names in supported_layouts
        ]
        return original(vllm_config, ordered, kv_cache_specs)

    return wrapped


def _then_flush(original: Method) -> Method:
    """For calls that free memory outside of steps: the orders that came of them go out at once."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        find(self.vllm_config).flush()
        return result

    return wrapped


def _engine_sleep(original: Method) -> Method:
    """The same for sleep; and whether it was this call that stopped the scheduler is known if it fails."""

    def wrapped(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        session = find(self.vllm_config)
        cpu_sleep.check_level(self.vllm_config, level)
        session.was_paused = self.is_scheduler_paused()
        result = original(self, level, *args, **kwargs)
        session.flush()
        return result

    return wrapped


def _shutdown(original: Method) -> Method:
    def wrapped(self: Any) -> Any:
        leave(self.vllm_config)
        try:
            return original(self)
        finally:
            close(self.vllm_config)

    return wrapped


def _get_scheduler_cls(original: Method) -> Method:
    def wrapped(self: Any) -> type:
        return scheduler.managed(original(self), find)

    return wrapped


EXECUTOR = {
    "determine_available_memory": _determine_available_memory,
    "initialize_from_config": _initialize_from_config,
    "compile_or_warm_up_model": _compile_or_warm_up_model,
    "sleep": _sleep,
    "discard": _sleep,
    "wake_up": _wake_up,
}
ENGINE = {
    "_initialize_kv_caches": _initialize_kv_caches,
    "sleep": _engine_sleep,
    "reset_prefix_cache": _then_flush,
    "release_kv_cache_memory": _then_flush,
    "shutdown": _shutdown,
}
CORE = {"get_kv_cache_configs": _get_kv_cache_configs, "resolve_kv_cache_layout": _resolve_kv_cache_layout}
SCHEDULER_CONFIG = {"get_scheduler_cls": _get_scheduler_cls}
