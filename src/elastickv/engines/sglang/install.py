"""Puts every hook in place, through SGLang's own registry. Called once in each process of a managed engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

from elastickv.config import Settings
from elastickv.engines import seams
from elastickv.engines.sglang.release import Hook, Release
from elastickv.errors import EngineRefused

__all__ = ["install"]

_installed: list[str] = []


def install() -> None:
    """Checks version and seams, then registers. Raises an ElasticKVError, with nothing registered, if it cannot."""
    if _installed:
        return
    settings = Settings.load()
    from elastickv import _core  # noqa: F401 - a native part that cannot be loaded must show here
    from elastickv.engines.sglang import entry, guard, releases

    version = metadata.version("sglang")
    release = releases.find(version)
    seams.check(f"SGLang {version}", release.seams)
    logging.getLogger("sglang.elastickv").setLevel(settings.log.upper())
    _register(release.hooks)
    _watch(guard.watch, settings, version, release)
    guard.examine(entry.check)
    _installed.append(version)


def _watch(watch: Callable[..., None], settings: Settings, version: str, release: Release) -> None:
    from elastickv.engines.sglang import session

    def before(scheduler: Any) -> None:
        _check_applied(release.hooks)
        session.start(settings, version, release, scheduler)

    watch(before, lambda scheduler: session.current().engaged(scheduler), session.forget)


def _check_applied(hooks: Iterable[Hook]) -> None:
    """SGLang logs a hook that it cannot apply, and goes on."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [hook.target for hook in hooks if hook.target not in HookRegistry._patched]
    if missing:
        raise EngineRefused(
            f"SGLang has not applied elastickv's hooks to {', '.join(missing)}; its log says why. "
            "Correct that, or unset ELASTICKV to serve without it"
        )


def _register(hooks: Iterable[Hook]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, hook.call, HookType(hook.kind))
