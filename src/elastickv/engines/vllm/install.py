"""Puts every hook in place. Called once in each process of a managed engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from elastickv.config import Settings

__all__ = ["install"]

_installed: list[str] = []


def install() -> None:
    """Checks version and seams, then hooks. Raises an ElasticKVError, with nothing hooked, if it cannot."""
    if _installed:
        return
    settings = Settings.load()
    from elastickv import _core  # noqa: F401 - a native part that cannot be loaded must show here
    from elastickv.engines.vllm import gate, metrics, seams

    version = _version()
    gate.check_version(version)
    seams.check(version)
    logging.getLogger("vllm.elastickv").setLevel(settings.log.upper())
    _hook_engine(settings, version)
    _hook_worker()
    _hook_cpu()
    metrics.hook(settings)
    _installed.append(version)


def _version() -> str:
    from vllm.version import __version__

    return str(__version__)


def _hook_worker() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    from elastickv.engines.vllm import seams, sleep, worker

    for name, method in worker.METHODS.items():
        setattr(Worker, name, method)
    for name, wrapper in worker.WRAPPERS.items():
        seams.wrap(Worker, name, wrapper)
    seams.wrap(Worker, "sleep", sleep.worker_sleep)


def _hook_cpu() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm import _custom_ops
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker

    from elastickv.engines.vllm import cpu_sleep

    for owner, wrappers in (
        (CpuPlatform, cpu_sleep.PLATFORM),
        (CPUWorker, cpu_sleep.CPU_WORKER),
        (_custom_ops, cpu_sleep.OPERATIONS),
    ):
        _wrap_all(owner, wrappers)


def _hook_engine(settings: Settings, version: str) -> None:
    from vllm.config.scheduler import SchedulerConfig
    from vllm.v1.engine import core
    from vllm.v1.executor.abstract import Executor

    from elastickv.engines.vllm import engine, seams

    seams.wrap(Executor, "__init__", lambda original: engine.executor_init(original, settings, version))
    for owner, wrappers in (
        (Executor, engine.EXECUTOR),
        (core.EngineCore, engine.ENGINE),
        (core, engine.CORE),
        (SchedulerConfig, engine.SCHEDULER_CONFIG),
    ):
        _wrap_all(owner, wrappers)


def _wrap_all(owner: Any, wrappers: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> None:
    from elastickv.engines.vllm import seams

    for name, wrapper in wrappers.items():
        seams.wrap(owner, name, wrapper)
